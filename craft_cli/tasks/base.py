"""Tasks: which columns, which labels, which metrics. A GLUE task is a row of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from craft_cli.errors import ConfigError, DataError, nearest

GLUE = "nyu-mll/glue"
SINGLE, MULTI, REGRESSION = PROBLEM_TYPES = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
"""As `transformers` names them in a model's configuration."""

NUMBER = ("score",)
"""The one output of a regression, where classifiers have the names of their labels."""


@dataclass(frozen=True)
class Task:
    """What is to be told of one text or of a pair.

    Attributes:
        name: as typed after `--task`; `own` for the user's own data.
        text_columns: one or two.
        labels: the names, in the order of the label numbers; `NUMBER` for a regression.
        metrics: what is reported; the first one chooses the best adapter.
        problem_type: one of `PROBLEM_TYPES`.
        label_column: the gold label, as number or as name (or several, or a real number).
        label_separator: what stands between the labels of one cell, where several apply.
        hub: data set on the hub, with its configuration.
        sample: folder below `craft_cli/samples`, for data that ships with craft.
        train: split to train on; None for a task that is only evaluated.
        validation: splits to evaluate on; the first one chooses the best adapter.
        server: for each of the GLUE server's files its split and its rows.
        server_numbers: whether the server takes label numbers, not names.
    """

    name: str
    text_columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    problem_type: str = SINGLE
    label_column: str = "label"
    label_separator: str | None = None
    hub: tuple[str, str] | None = None
    sample: str | None = None
    train: str | None = "train"
    validation: tuple[str, ...] = ("validation",)
    server: Mapping[str, tuple[str, int]] | None = None
    server_numbers: bool = True


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
"""By the names that `run_glue` and the hub use; label numbers as in the hub's nyu-mll/glue."""

OWN = Task("own", problem_type="")
"""The user's own data: columns, labels and the kind of problem are found in it."""

OWN_METRICS = {SINGLE: _F1, MULTI: ("f1_micro", "f1_macro"), REGRESSION: ("pearson", "spearman")}

_ALIASES = {"mnlim": "mnli", "mnlimatched": "mnli", "mnlimm": "mnli-mm", "mnlimismatched": "mnli-mm", "sts": "stsb"}


def task_named(name: str) -> Task:
    """The task of this name, in any of the spellings people use: `stsb`, `STS-B`, `sts_b`.

    Raises:
        ConfigError: there is none.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    known = _ALIASES.get(plain, plain)
    if known not in TASKS:
        raise ConfigError(f"--task: unknown task '{name}'{nearest(name, TASKS)}")
    return TASKS[known]


def align_labels(labels: Sequence[str], id2label: Mapping[int, str] | None) -> tuple[str, ...]:
    """The label names in the order of a checkpoint's head, if it has names; by name, never by position.

    Raises:
        DataError: the checkpoint names other labels.
    """
    if not id2label:
        return tuple(labels)
    theirs = [id2label[number] for number in sorted(id2label)]
    if all(name.startswith("LABEL_") for name in theirs) and len(theirs) == len(labels):
        return tuple(labels)
    by_lower = {label.lower(): label for label in labels}
    if sorted(name.lower() for name in theirs) != sorted(by_lower):
        raise DataError(f"the checkpoint has the labels {', '.join(theirs)}, the data {', '.join(labels)}")
    return tuple(by_lower[name.lower()] for name in theirs)
