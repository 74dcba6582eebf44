"""Write predictions for the GLUE test sets in the format of the GLUE server.

The server expects one zip with one file per task, with tab-separated `index` and `prediction`: label names for MNLI, AX,
QNLI and RTE, label numbers for the others, and a real number from 0 to 5 for STS-B. It rejects a zip with missing tasks,
so those are filled with a constant answer. AX is predicted by the MNLI model.
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
    """The result of `submit`.

    Attributes:
        output: the zip file.
        predicted: number of predicted rows by file.
        filled: number of rows with a constant answer by file.
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
    """Predict the test sets of the runs' tasks and write the zip.

    Args:
        paths: runs or adapters of GLUE tasks; None for the latest run.
        output: the zip file.
        source: location of the test sets. Default: as in training (`test.*` next to `train.*`, or the Hub).
        max_eval_samples: predict only the first rows, for a trial; the others get the constant answer.
        max_seq_length: maximum tokens per row. Default: as in training.
        per_device_eval_batch_size: batch size.
        use_cpu: use the CPU even if a GPU is available.
        trust_remote_code: run Python code from the model's repository.
        allow_other_base: accept a base that has changed since the training.
        progress: called with (rows done, total rows).

    Raises:
        ConfigError: a run is not of a GLUE task, or two runs are of the same task.
        DataError: a test set is missing, or has a different number of rows than the server expects.
    """
    if Path(output).suffix != ".zip":
        raise ConfigError(f"--submission: {output}: the file name must end in .zip")
    answers: dict[str, list[str]] = {}
    for path in paths:
        predictor = load_predictor(
            path, use_cpu=use_cpu, trust_remote_code=trust_remote_code, allow_other_base=allow_other_base
        )
        trained = TASKS.get(predictor.task.name)
        if trained is None or trained.server is None:
            raise ConfigError(f"{predictor.name} was trained on '{predictor.task.name}', which is not a GLUE task")
        where = predictor.source(source or DataSource())
        for task in (trained, TASKS["ax"]) if trained.name == "mnli" else (trained,):
            for name, split in _test_sets(task, trained, where).items():
                if name in answers:
                    raise ConfigError(
                        f"{predictor.name}: {name} is already predicted by an earlier run; pass one run per task"
                    )
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
    """The complete rows of each file for the server."""
    if task is not trained:  # AX, in a folder next to MNLI's or on the Hub
        beside = Path(source.data_dir).parent / task.name if source.data_dir else None
        if beside is not None and not beside.is_dir():
            return {}
        source = replace(source, task=task.name, data_dir=str(beside) if beside else None)
    loaded = load_splits(source, [TEST])
    sets = {}
    for name, (split, rows) in (task.server or {}).items():
        found = loaded.splits[split]
        if len(found) != rows:
            raise DataError(f"{found.origin} has {len(found):,} rows, but the GLUE test set {name} has {rows:,}")
        sets[name] = found
    return sets
