"""Tasks: which columns, which labels, which metrics. A new GLUE task is a new row of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from craft_cli.errors import ConfigError, DataError, nearest

GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """A classification of one text or of a pair.

    Attributes:
        name: as typed after `--task`; `own` for the user's own files.
        text_columns: one or two.
        label_column: the gold label, as number or as name.
        labels: the names, in the order of the label numbers.
        metrics: what is reported; the first one chooses the best adapter.
        hub: data set on the hub, with its configuration.
        sample: folder below `craft_cli/samples`, for data that ships with craft.
    """

    name: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    label_column: str = "label"
    hub: tuple[str, str] | None = None
    sample: str | None = None


TASKS = {
    task.name: task
    for task in (
        Task("opinions", ("text",), ("negative", "positive"), sample="opinions"),
        Task("sst2", ("sentence",), ("negative", "positive"), hub=(GLUE, "sst2")),
        Task(
            "mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1"), hub=(GLUE, "mrpc")
        ),
    )
}

OWN = Task("own", (), (), ("accuracy", "f1"))
"""The user's own files: columns and labels are found in them."""


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"--task: unknown task '{name}'{nearest(name, TASKS)}")
    return TASKS[name]


def align_labels(labels: Sequence[str], id2label: dict[int, str] | None) -> tuple[str, ...]:
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


def compute_metrics(names: Sequence[str], labels: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Metrics of scikit-learn by its names, on label numbers.

    `f1` is that of label 1 where there are two labels, the macro average where there are more.
    """
    return {name: float(_METRICS[name](labels, predictions)) for name in names}


def _accuracy(labels: Sequence[int], predictions: Sequence[int]) -> Any:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, predictions)


def _f1(labels: Sequence[int], predictions: Sequence[int]) -> Any:
    from sklearn.metrics import f1_score

    average = "binary" if max(*labels, *predictions, 1) == 1 else "macro"
    return f1_score(labels, predictions, average=average, zero_division=0.0)


_METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], Any]] = {"accuracy": _accuracy, "f1": _f1}
