"""Detect the problem type and the labels of a label column, and convert its cells to numbers for the loss."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from craft_cli.config.names import SEPARATOR, split_names
from craft_cli.data.cells import all_lists, as_list, described, is_missing, list_in, looks_like_list, whole_text
from craft_cli.errors import DataError, listed
from craft_cli.tasks.base import OWN

if TYPE_CHECKING:
    from craft_cli.tasks.sequence_classification import SequenceClassification as Task

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
"""Problem types, named as in the configuration of transformers."""

NUMBER = ("score",)
"""Label name of a regression's single output."""

OWN_METRICS = {
    SINGLE: ("accuracy", "f1_macro"),
    MULTI: ("f1_micro", "f1_macro"),
    REGRESSION: ("pearson", "spearman", "mae", "rmse", "r2"),
}

Place = Callable[[int], str]
"""Returns the location of a row, for messages: `train.csv, line 3`."""

ALL_DIFFERENT = 10
"""From this many labels with a single row, the column is refused; a smaller table may have one example per label."""

_LARGEST = 1e30
"""Largest regression target, so that its square stays below the float32 maximum of 3e38."""

HIDDEN = (None, -1, "-1")
"""Label of the GLUE test sets, whose labels are hidden."""

_PLAIN = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
"""A plainly written number: not `007`, `1_000` or `nan`."""
_OF_LISTS = re.compile(r"""[,'"]|^[][\d.\s+-]+$""")
"""Characters in lists written as text, but not in names in brackets."""
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0")
"""An integer as written by pandas in a column with missing values."""
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")


def settle_task(task: Task, values: Sequence[Any], place: Place, origin: str) -> Task:
    """Complete a task on the user's own data with problem type, labels and metrics, where they are not known yet.

    Lists make a multi-label problem, real numbers a regression; everything else is single-label. Text counts as numbers
    only if all cells are numbers and no number is written in two ways; labels keep their text.

    Raises:
        DataError: a row has no label, labels have mixed types, there is only one label, or every row has its own label.
    """
    if task.name != OWN or task.labels:
        return task
    values = _lists_read(values, task, origin)
    problem = task.problem_type or _problem_of(values, task)
    task = replace(task, problem_type=problem, metrics=OWN_METRICS[problem])
    if problem == REGRESSION:
        return replace(task, labels=NUMBER)
    if problem == MULTI:
        values = [as_list(value) for value in values]
        task = replace(task, label_separator=task.label_separator or SEPARATOR)
        if width := _width_of_vectors(values, task, origin):
            return replace(task, labels=_nameless(width))
    cells = [name for row, value in enumerate(values) for name in _names(value, task, place, row)]
    names = set(cells)
    if all(_WHOLE.fullmatch(name) for name in names):
        names = {name.removesuffix(".0") for name in names}
    labels = tuple(sorted(names, key=_order))
    if len(labels) < 2:
        held = f"one label only ({labels[0]})" if labels else "no label"
        raise DataError(f"{origin}: column '{task.label_column}' has {held}; choose another with --label-column")
    if len(labels) == len(cells) >= ALL_DIFFERENT:
        amounts = problem == SINGLE and all(_PLAIN.fullmatch(name) for name in labels)
        raise DataError(
            f"{origin}: column '{task.label_column}' has {len(labels):,} labels, each in one row only, like an id or a "
            f"text: choose another with --label-column{', or --problem-type regression for amounts' if amounts else ''}"
        )
    return replace(task, labels=labels)


def label_numbers(values: Sequence[Any], task: Task, place: Place) -> list[Any] | None:
    """Convert the labels of all rows to label numbers, real numbers, or 0.0 and 1.0 per label; None if they are hidden.

    Raises:
        DataError: a label is unknown to the task, or a number is missing.
    """
    if task.name != OWN and all(value in HIDDEN for value in values):
        return None
    if task.problem_type == REGRESSION:
        return [_real(value, task, place, row) for row, value in enumerate(values)]
    numbers = {name: number for number, name in enumerate(task.labels)}
    if task.name != OWN:  # a dataset of a built-in task may already have label numbers
        numbers |= {str(number): number for number in range(len(task.labels))}
    nameless = task.labels == _nameless(len(task.labels))
    gold: list[Any] = []
    for row, value in enumerate(values):
        if task.problem_type == MULTI and isinstance(value, str) and value not in numbers:
            value = as_list(value)
        if nameless and _is_vector(value) and len(value) == len(task.labels):
            gold.append([float(part) for part in value])
            continue
        chosen = set()
        for name in _names(value, task, place, row):
            number = _number_of(name, numbers, nameless=nameless)
            if number is None:
                raise DataError(f"{place(row)}: label '{name}' is not a label of the training ({listed(task.labels)})")
            chosen.add(number)
        if task.problem_type == MULTI:
            gold.append([float(number in chosen) for number in range(len(task.labels))])
        else:
            gold.append(chosen.pop())
    return gold


def check_numbers(gold: Sequence[float], column: str) -> None:
    """Refuse regression targets that cannot be learned.

    Raises:
        DataError: all are equal up to rounding, or float32 cannot represent them or their differences.
    """
    if not gold:
        return
    lowest, highest = min(gold), max(gold)
    largest, between = max(abs(lowest), abs(highest)), highest - lowest
    if between <= 1e-12 * largest:
        raise DataError(
            f"column '{column}' has only one number ({lowest:.7g}) in the training rows; choose another with --label-column"
        )
    if largest > _LARGEST or between < 1 / _LARGEST:
        what = f"numbers up to {largest:.3g}" if largest > _LARGEST else f"numbers no more than {between:.3g} apart"
        raise DataError(f"column '{column}' has {what}, which float32 cannot represent; use another unit")


# -- columns --------------------------------------------------------------------------------------------------------------


def _lists_read(values: Sequence[Any], task: Task, origin: str) -> Sequence[Any]:
    """The cells, parsed as lists if all of them are lists written as text.

    Raises:
        DataError: a cell looks like a list but cannot be parsed.
    """
    given = [value for value in values if not is_missing(value)]
    if not given or not all(map(looks_like_list, given)):
        return values
    lists = all_lists(values)
    if lists is None and not any(_OF_LISTS.search(value) for value in given):
        return values  # names in brackets
    if lists is None:
        bad = next(value for value in given if list_in(value) is None)
        raise DataError(
            f"{origin}: column '{task.label_column}' looks like lists written as text, but {listed([bad])} cannot be parsed: write "
            'them as JSON (["a", "b"]), or as comma-separated names'
        )
    return lists


def _problem_of(values: Sequence[Any], task: Task) -> str:
    given = [value for value in values if not is_missing(value)]
    if task.label_separator or any(isinstance(value, (list, tuple)) for value in given):
        return MULTI
    numbers = [_number(value) for value in given]
    texts = {value.strip() for value in given if isinstance(value, str)}
    if not given or None in numbers or not any(math.modf(number)[0] for number in numbers if number):
        return SINGLE
    one_way = not texts or (len(texts) == len(set(map(float, texts))) and all(isinstance(v, str) for v in given))
    return REGRESSION if one_way else SINGLE


def _is_vector(value: Any) -> bool:
    """Whether a cell is a multi-hot vector: a list of 0 and 1, one per label."""
    return isinstance(value, (list, tuple)) and len(value) > 1 and all(
        isinstance(part, (int, float)) and part in (0, 1) for part in value
    )  # fmt: skip


def _width_of_vectors(values: Sequence[Any], task: Task, origin: str) -> int:
    """The common length of the multi-hot vectors; 0 if the cells are lists of labels.

    Raises:
        DataError: the vectors have different lengths.
    """
    if not all(map(_is_vector, values)):
        return 0
    widths = {len(value) for value in values}
    if len(widths) > 1:
        if any(len(set(value)) < len(value) for value in values):
            raise DataError(
                f"{origin}: column '{task.label_column}' has vectors of 0 and 1 of different lengths ({min(widths)} to {max(widths)})"
            )
        return 0
    return widths.pop()


def _nameless(count: int) -> tuple[str, ...]:
    """Default label names of transformers."""
    return tuple(f"LABEL_{number}" for number in range(count))


# -- cells ----------------------------------------------------------------------------------------------------------------


def _names(value: Any, task: Task, place: Place, row: int) -> list[str]:
    """The labels of one cell, as text. In a multi-label task, an empty cell has no labels."""
    if task.problem_type == MULTI:
        if is_missing(value):
            return []
        if isinstance(value, str):
            value = split_names(value, task.label_separator or SEPARATOR)
        parts = value if isinstance(value, (list, tuple)) else [value]
    elif is_missing(value) or value == "":
        raise DataError(f"{place(row)}: column '{task.label_column}' has no label")
    elif isinstance(value, (list, tuple)):
        raise DataError(
            f"{place(row)}: column '{task.label_column}' is a list, but one label per row is expected "
            f"(use --problem-type {MULTI} for several)"
        )
    else:
        parts = [value]
    for part in parts:
        if not isinstance(part, (str, int, float)) or (isinstance(part, float) and not math.isfinite(part)):
            raise DataError(f"{place(row)}: column '{task.label_column}' has {described(part)}, not a label")
        if isinstance(part, str) and not whole_text(part):
            raise DataError(
                f"{place(row)}: column '{task.label_column}' contains an invalid character (a lone surrogate); remove it"
            )
    return [_name(part) for part in parts]


def _name(value: Any) -> str:
    """Convert a cell to a label name: text is unchanged, the number 1.0 becomes `1`."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _number_of(name: str, numbers: Mapping[str, int], *, nameless: bool) -> int | None:
    """The number of a label, by exact name or by another spelling of the same integer or boolean."""
    if name in numbers:
        return numbers[name]
    if (whole := _WHOLE.fullmatch(name)) and whole[1] in numbers:
        return numbers[whole[1]]
    if nameless and f"LABEL_{name}" in numbers:
        return numbers[f"LABEL_{name}"]
    alike = [
        number
        for label, number in numbers.items()
        if name.lower() in ("true", "false") and label.lower() == name.lower()
    ]
    return alike[0] if len(alike) == 1 else None


def _real(value: Any, task: Task, place: Place, row: int) -> float:
    number = _number(value)
    if number is None:
        held = described(value) if is_missing(value) else f"'{listed([str(value)])}'"
        raise DataError(f"{place(row)}: column '{task.label_column}' has {held}, not a number")
    if abs(number) > _LARGEST:
        raise DataError(
            f"{place(row)}: column '{task.label_column}' has {number:.3g}, which float32 cannot represent; use another unit"
        )
    return number


def _order(name: str) -> tuple[bool, int, str]:
    """Sort key: integers first, by value; then names alphabetically, including `007` and `nan`."""
    return (False, int(name), name) if _INTEGER.fullmatch(name) and len(name) < 1000 else (True, 0, name)


def _number(value: Any) -> float | None:
    """The number in a cell, or in its text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or is_missing(value):
        return None
    if isinstance(value, str) and not _PLAIN.fullmatch(value.strip()):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer with hundreds of digits
        return math.inf
