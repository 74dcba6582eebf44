"""Tasks by name: a table of the GLUE tasks, the files for the GLUE server, and the samples that ship with craft."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import TypeVar

from craft_cli.errors import ConfigError, nearest
from craft_cli.tasks.causal_lm import CausalLM
from craft_cli.tasks.dialogues import MESSAGES
from craft_cli.tasks.labels import NUMBER, REGRESSION
from craft_cli.tasks.sequence_classification import SequenceClassification as Task

GLUE = "nyu-mll/glue"
Kind = TypeVar("Kind", Task, CausalLM)


_MNLI = ("entailment", "neutral", "contradiction")


_ENTAILED = ("entailment", "not_entailment")


_PAIR = ("sentence1", "sentence2")


_F1 = ("accuracy", "f1")


TASKS = {
    task.name: task
    for task in (
        Task("opinions", ("text",), ("negative", "positive"), sample="opinions"),
        Task(
            "cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation", "accuracy"),
            hub=(GLUE, "cola"), server={"CoLA": ("test", 1063)},
        ),
        Task("sst2", ("sentence",), ("negative", "positive"), hub=(GLUE, "sst2"), server={"SST-2": ("test", 1821)}),
        Task(
            "mrpc", _PAIR, ("not_equivalent", "equivalent"), _F1, hub=(GLUE, "mrpc"), server={"MRPC": ("test", 1725)}
        ),
        Task(
            "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _F1, hub=(GLUE, "qqp"),
            server={"QQP": ("test", 390965)},
        ),
        Task(
            "stsb", _PAIR, NUMBER, ("pearson", "spearman"), REGRESSION, hub=(GLUE, "stsb"),
            server={"STS-B": ("test", 1379)},
        ),
        Task(
            "mnli", ("premise", "hypothesis"), _MNLI, hub=(GLUE, "mnli"),
            validation=("validation_matched", "validation_mismatched"),
            server={"MNLI-m": ("test_matched", 9796), "MNLI-mm": ("test_mismatched", 9847)}, server_numbers=False,
        ),
        Task(
            "mnli-mm", ("premise", "hypothesis"), _MNLI, hub=(GLUE, "mnli"), validation=("validation_mismatched",),
            server={"MNLI-mm": ("test_mismatched", 9847)}, server_numbers=False,
        ),
        Task(
            "qnli", ("question", "sentence"), _ENTAILED, hub=(GLUE, "qnli"), server={"QNLI": ("test", 5463)},
            server_numbers=False,
        ),
        Task("rte", _PAIR, _ENTAILED, hub=(GLUE, "rte"), server={"RTE": ("test", 3000)}, server_numbers=False),
        Task("wnli", _PAIR, _ENTAILED[::-1], hub=(GLUE, "wnli"), server={"WNLI": ("test", 146)}),
        Task(
            "ax", ("premise", "hypothesis"), _MNLI, ("matthews_correlation", "accuracy"), hub=(GLUE, "ax"), train=None,
            validation=("test",), server={"AX": ("test", 1104)}, server_numbers=False,
        ),
    )
}  # fmt: skip
"""GLUE tasks by the names of `run_glue` and the Hub, with label numbers as in nyu-mll/glue."""


SAMPLES = {"lighthouse": CausalLM("lighthouse", ("messages",), MESSAGES, sample="lighthouse")}
"""Sample tasks of language models."""


_ALIASES = {"mnlim": "mnli", "mnlimatched": "mnli", "mnlimm": "mnli-mm", "mnlimismatched": "mnli-mm", "sts": "stsb"}


def task_named(name: str) -> Task | CausalLM:
    """The task with this name, in any common spelling: `stsb`, `STS-B`, `sts_b`.

    Raises:
        ConfigError: there is no such task.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    known = _ALIASES.get(plain, plain)
    tasks: dict[str, Task | CausalLM] = {**TASKS, **SAMPLES}
    if known not in tasks:
        raise ConfigError(f"--task: unknown task '{name}'{nearest(name, tasks)}")
    return tasks[known]


def task_of(kind: type[Kind], name: str) -> Kind:
    """The task of this name, for an adapter that says it was trained for it.

    Raises:
        ConfigError: there is none of this kind.
    """
    found = task_named(name)
    if not isinstance(found, kind):
        raise ConfigError(f"it was trained for the task '{found.name}' as {kind.kind}: it contradicts itself")
    return found


HIGHEST = 5.0
"""Maximum score of STS-B."""


def server_answers(predictions: Sequence[float], task: Task) -> list[str]:
    """Format predictions for the server."""
    if task.problem_type == REGRESSION:
        return [f"{min(max(value, 0.0), HIGHEST):.3f}" for value in predictions]
    return [str(int(number)) if task.server_numbers else task.labels[int(number)] for number in predictions]


def zipped(answers: Mapping[str, Sequence[str]]) -> bytes:
    """The zip for the server, with one file per task."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(answers):
            lines = [f"{index}\t{answer}" for index, answer in enumerate(answers[name])]
            archive.writestr(f"{name}.tsv", "\n".join(["index\tprediction", *lines]) + "\n")
    return content.getvalue()
