"""From the cells of a label column to what a loss takes: what kind of problem it is, which labels, which numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from craft_cli.errors import DataError, listed
from craft_cli.tasks.base import OWN

if TYPE_CHECKING:
    from craft_cli.tasks.sequence_classification import SequenceClassification as Task

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
"""As `transformers` names them in a model's configuration."""

NUMBER = ("score",)
"""The one output of a regression, where others have the names of their labels."""

OWN_METRICS = {
    SINGLE: ("accuracy", "f1_macro"),
    MULTI: ("f1_micro", "f1_macro"),
    REGRESSION: ("pearson", "spearman", "mae", "rmse", "r2"),
}

Place = Callable[[int], str]
"""Where a row stands, for messages: `train.csv, line 3`."""

ALL_DIFFERENT = 10
"""So many labels, each in one row only, are no labels; fewer may be an example of each."""

_LARGEST = 1e30
"""Squares of numbers in their own units are far from it; float32 ends at 3e38."""

HIDDEN = (None, -1, "-1")
"""GLUE's test sets keep their labels to themselves."""


def settle_task(task: Task, values: Sequence[Any], place: Place, origin: str) -> Task:
    """The user's own task with its problem, labels and metrics, as far as they are not known yet.

    Lists make a multi-label problem, and real numbers a regression; everything else is one label a row.

    Raises:
        DataError: a row without a label, labels of different kinds, a single label in all, or another one in every row.
    """
    if task.name != OWN or task.labels:
        return task
    problem = task.problem_type or _problem_of(values, task)
    task = replace(task, problem_type=problem, metrics=OWN_METRICS[problem])
    if problem == REGRESSION:
        return replace(task, labels=NUMBER)
    if problem == MULTI:
        task = replace(task, label_separator=task.label_separator or ",")
    cells = [name for row, value in enumerate(values) for name in _names(value, task, place, row)]
    names = set(cells)
    labels = tuple(sorted(names, key=_order))
    if len(labels) < 2:
        raise DataError(
            f"{origin}: column '{task.label_column}' holds one label only ({', '.join(labels)}); nothing can be learned from it"
        )
    if len(labels) == len(cells) >= ALL_DIFFERENT:
        amounts = problem == SINGLE and all(_number(name) is not None for name in labels)
        raise DataError(
            f"{origin}: column '{task.label_column}' holds {len(labels):,} labels, each in one row only, as an id or a text "
            f"does: choose another with --label-column{', or --problem-type regression for amounts' if amounts else ''}"
        )
    return replace(task, labels=labels)


def label_numbers(values: Sequence[Any], task: Task, place: Place) -> list[Any] | None:
    """The gold of every row: a label number, a real number, or a 0.0 or 1.0 for every label; None if it is hidden.

    Raises:
        DataError: a label that is not among the task's, or no number where one is needed.
    """
    if task.name != OWN and all(value in HIDDEN for value in values):
        return None
    if task.problem_type == REGRESSION:
        return [_real(value, task, place, row) for row, value in enumerate(values)]
    numbers = {name: number for number, name in enumerate(task.labels)}
    if task.name != OWN:  # a known task's data may hold the numbers themselves
        numbers |= {str(number): number for number in range(len(task.labels))}
    found: list[Any] = []
    for row, value in enumerate(values):
        names = _names(value, task, place, row)
        for name in names:
            if name not in numbers:
                raise DataError(f"{place(row)}: label '{name}' is not among those trained on ({listed(task.labels)})")
        chosen = {numbers[name] for name in names}
        if task.problem_type == MULTI:
            found.append([float(number in chosen) for number in range(len(task.labels))])
        else:
            found.append(chosen.pop())
    return found


def check_numbers(gold: Sequence[float], column: str) -> None:
    """Refuse numbers to train on from which nothing can be learned.

    Raises:
        DataError: all are the same but for rounding, or float32 cannot hold them or what is between them.
    """
    if not gold:
        return
    lowest, highest = min(gold), max(gold)
    largest, between = max(abs(lowest), abs(highest)), highest - lowest
    if between <= 1e-12 * largest:
        raise DataError(
            f"column '{column}' holds one number only ({lowest:.7g}) in the rows to train on; nothing can be learned from it"
        )
    if largest > _LARGEST or between < 1 / _LARGEST:
        what = f"numbers up to {largest:.3g}" if largest > _LARGEST else f"numbers no more than {between:.3g} apart"
        raise DataError(f"column '{column}' holds {what}, which float32 cannot hold; give them in another unit")


def _problem_of(values: Sequence[Any], task: Task) -> str:
    if task.label_separator or any(isinstance(value, (list, tuple)) for value in values):
        return MULTI
    numbers = [_number(value) for value in values]
    if all(number is not None for number in numbers) and not all(float(n).is_integer() for n in numbers if n):
        return REGRESSION
    return SINGLE


def _names(value: Any, task: Task, place: Place, row: int) -> list[str]:
    """The labels of one cell, as text; 1.0 is label 1. Without text there is no label, which only `MULTI` can mean."""
    if value is None or isinstance(value, dict) or (value == "" and task.problem_type != MULTI):
        raise DataError(f"{place(row)}: column '{task.label_column}' has no label")
    if task.problem_type == MULTI:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(task.label_separator) if part.strip()]
        if isinstance(value, (list, tuple)):
            return [_name(part) for part in value]
    elif isinstance(value, (list, tuple)):
        raise DataError(f"{place(row)}: column '{task.label_column}' is a list; one label a row is expected")
    return [_name(value)]


def _name(value: Any) -> str:
    number = _number(value)
    return str(int(number)) if number is not None and number.is_integer() else str(value)


def _real(value: Any, task: Task, place: Place, row: int) -> float:
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise DataError(f"{place(row)}: column '{task.label_column}' holds '{value}', not a number")
    return number


def _order(name: str) -> tuple[bool, float, str]:
    """Numbers first; `nan` is a name, as it has no place among numbers."""
    number = _number(name)
    return (False, number, name) if number is not None and math.isfinite(number) else (True, 0.0, name)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
