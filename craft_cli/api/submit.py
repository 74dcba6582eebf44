"""Use-case: predictions for GLUE's test sets, as the GLUE server takes them.

The server wants one zip with a file for each task at its top, `index` and `prediction` separated by a tab. Label names
for MNLI, AX, QNLI and RTE, numbers for the others, a real number from 0 to 5 for STS-B. It refuses a zip in which a task
is missing, so those not predicted are filled with one constant answer; AX is answered by the model of MNLI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from craft_cli.api.predictor import load_predictor
from craft_cli.data.sources import TEST, DataSource, Split
from craft_cli.errors import ConfigError, DataError
from craft_cli.files import write_bytes
from craft_cli.tasks.glue import TASKS, Task, server_answers, zipped
from craft_cli.tasks.splits import load_splits


@dataclass(frozen=True)
class Submission:
    """What `submit` wrote.

    Attributes:
        output: the zip.
        predicted: rows predicted by file.
        filled: rows of a constant answer by file.
    """

    output: str
    predicted: Mapping[str, int]
    filled: Mapping[str, int]


def submit(
    paths: Sequence[str | Path | None],
    output: str | Path,
    *,
    source: DataSource | None = None,
    max_eval_samples: int | None = None,
    max_seq_length: int | None = None,
    per_device_eval_batch_size: int | None = None,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Submission:
    """Predict the test sets of some runs' tasks and write the zip.

    Args:
        paths: runs or adapters of GLUE tasks; the latest run for None.
        output: the zip to write.
        source: where the test sets lie; as in training without (`test.*` beside `train.*`, or the hub).
        max_eval_samples: only the first rows, to try things out; the others get the constant answer.
        max_seq_length: tokens kept; as in training without.
        per_device_eval_batch_size: rows at once.
        use_cpu: stay on the CPU.
        trust_remote_code: run Python code that comes with the model.
        allow_other_base: take an adapter whose base is not as it was in training.
        progress: called with (rows done, rows in all).

    Raises:
        ConfigError: a run of no GLUE task, or two of the same one.
        DataError: a test set is missing, or has another number of rows than the server expects.
    """
    if Path(output).suffix != ".zip":
        raise ConfigError(f"--submission: {output}: the server takes a .zip")
    answers: dict[str, list[str]] = {}
    for path in paths:
        predictor = load_predictor(
            path, use_cpu=use_cpu, trust_remote_code=trust_remote_code, allow_other_base=allow_other_base
        )
        trained = TASKS.get(predictor.task.name)
        if trained is None or trained.server is None:
            raise ConfigError(f"{predictor.name} was trained on '{predictor.task.name}', which is no task of GLUE's")
        where = predictor.source(source or DataSource())
        for task in (trained, TASKS["ax"]) if trained.name == "mnli" else (trained,):
            for name, split in _test_sets(task, trained, where).items():
                if name in answers:
                    raise ConfigError(f"{predictor.name}: {name} is answered by a run before it; give one run a task")
                encoded = predictor.encode(split.first(max_eval_samples), task, max_seq_length)
                scores = predictor.scores(encoded, task, per_device_eval_batch_size, progress)
                answers[name] = server_answers(task.decide(scores), task)
    predicted = {name: len(rows) for name, rows in answers.items()}
    filled = {}
    for task in TASKS.values():
        for name, (_, rows) in (task.server or {}).items():
            done = answers.setdefault(name, [])
            if len(done) < rows:
                filled[name] = rows - len(done)
                done += server_answers([0] * (rows - len(done)), task)
    write_bytes(Path(output).expanduser(), zipped(answers))
    return Submission(str(output), predicted, filled)


def _test_sets(task: Task, trained: Task, source: DataSource) -> dict[str, Split]:
    """The rows of each of the server's files, complete."""
    if task is not trained:  # AX, in a folder beside that of MNLI or in the hub's
        beside = Path(source.data_dir).parent / task.name if source.data_dir else None
        if beside is not None and not beside.is_dir():
            return {}
        source = replace(source, task=task.name, data_dir=str(beside) if beside else None)
    loaded = load_splits(source, [TEST])
    sets = {}
    for name, (split, rows) in (task.server or {}).items():
        found = loaded.splits[split]
        if len(found) != rows:
            raise DataError(f"{found.origin} holds {len(found):,} rows, but GLUE's test set {name} has {rows:,}")
        sets[name] = found
    return sets
