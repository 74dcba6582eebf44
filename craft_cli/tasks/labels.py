"""From the cells of a label column to what a loss takes: what kind of problem it is, which labels, which numbers."""

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

_PLAIN = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
"""A number as people and libraries write it: neither `007` nor `1_000` nor `nan`."""
_OF_LISTS = re.compile(r"""[,'"]|^[][\d.\s+-]+$""")
"""What lists written as text hold, and names in brackets do not."""
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0")
"""A whole number as pandas writes it in a column with gaps."""
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")


def settle_task(task: Task, values: Sequence[Any], place: Place, origin: str) -> Task:
    """The user's own task with its problem, labels and metrics, as far as they are not known yet.

    Lists make a multi-label problem, and real numbers a regression; everything else is one label a row. Text is a number
    only where all cells are numbers and none is written in two ways; a label keeps its text.

    Raises:
        DataError: a row without a label, labels of different kinds, a single label in all, or another one in every row.
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
        raise DataError(f"{origin}: column '{task.label_column}' holds {held}; nothing can be learned from it")
    if len(labels) == len(cells) >= ALL_DIFFERENT:
        amounts = problem == SINGLE and all(_PLAIN.fullmatch(name) for name in labels)
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
    nameless = task.labels == _nameless(len(task.labels))
    found: list[Any] = []
    for row, value in enumerate(values):
        if task.problem_type == MULTI and isinstance(value, str) and value not in numbers:
            value = as_list(value)
        if nameless and _is_vector(value) and len(value) == len(task.labels):
            found.append([float(part) for part in value])
            continue
        chosen = set()
        for name in _names(value, task, place, row):
            number = _number_of(name, numbers, nameless=nameless)
            if number is None:
                raise DataError(f"{place(row)}: label '{name}' is not among those trained on ({listed(task.labels)})")
            chosen.add(number)
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


# -- columns --------------------------------------------------------------------------------------------------------------


def _lists_read(values: Sequence[Any], task: Task, origin: str) -> Sequence[Any]:
    """The cells, with the lists that a csv holds as text where all of them are such.

    Raises:
        DataError: they look like lists, but nothing can read them.
    """
    given = [value for value in values if not is_missing(value)]
    if not given or not all(map(looks_like_list, given)):
        return values
    found = all_lists(values)
    if found is None and not any(_OF_LISTS.search(value) for value in given):
        return values  # names in brackets
    if found is None:
        bad = next(value for value in given if list_in(value) is None)
        raise DataError(
            f"{origin}: column '{task.label_column}' looks like lists written as text, but {listed([bad])} cannot be read: write "
            'them as JSON (["a", "b"]), or the names with commas between them'
        )
    return found


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
    """Whether a cell says of every label whether it applies: a list of 0 and 1."""
    return isinstance(value, (list, tuple)) and len(value) > 1 and all(
        isinstance(part, (int, float)) and part in (0, 1) for part in value
    )  # fmt: skip


def _width_of_vectors(values: Sequence[Any], task: Task, origin: str) -> int:
    """The length of the vectors of 0 and 1 in all cells; 0 where cells are lists of labels.

    Raises:
        DataError: the vectors have different lengths.
    """
    if not all(map(_is_vector, values)):
        return 0
    widths = {len(value) for value in values}
    if len(widths) > 1:
        if any(len(set(value)) < len(value) for value in values):
            raise DataError(
                f"{origin}: column '{task.label_column}' holds vectors of 0 and 1 of different lengths ({min(widths)} to {max(widths)})"
            )
        return 0
    return widths.pop()


def _nameless(count: int) -> tuple[str, ...]:
    """The names that transformers gives to labels without any."""
    return tuple(f"LABEL_{number}" for number in range(count))


# -- cells ----------------------------------------------------------------------------------------------------------------


def _names(value: Any, task: Task, place: Place, row: int) -> list[str]:
    """The labels of one cell, as text. Where several can apply, an empty cell means that none does."""
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
            f"{place(row)}: column '{task.label_column}' is a list; one label a row is expected "
            f"(--problem-type {MULTI} where several can apply)"
        )
    else:
        parts = [value]
    for part in parts:
        if not isinstance(part, (str, int, float)) or (isinstance(part, float) and not math.isfinite(part)):
            raise DataError(f"{place(row)}: column '{task.label_column}' holds {described(part)}, not a label")
        if isinstance(part, str) and not whole_text(part):
            raise DataError(f"{place(row)}: column '{task.label_column}' holds half a character (a lone surrogate)")
    return [_name(part) for part in parts]


def _name(value: Any) -> str:
    """Text as it is; the number 1.0 is label 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _number_of(name: str, numbers: Mapping[str, int], *, nameless: bool) -> int | None:
    """The number of a label: by its very name, else as another library writes the same whole number, true or false."""
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
        raise DataError(f"{place(row)}: column '{task.label_column}' holds {held}, not a number")
    if abs(number) > _LARGEST:
        raise DataError(
            f"{place(row)}: column '{task.label_column}' holds {number:.3g}, which float32 cannot hold; give the numbers in another unit"
        )
    return number


def _order(name: str) -> tuple[bool, int, str]:
    """Whole numbers first, by their value; then names by their characters, `007` and `nan` among them."""
    return (False, int(name), name) if _INTEGER.fullmatch(name) and len(name) < 1000 else (True, 0, name)


def _number(value: Any) -> float | None:
    """The number that a cell is, or whose plain text it holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or is_missing(value):
        return None
    if isinstance(value, str) and not _PLAIN.fullmatch(value.strip()):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf
