"""Find the text columns, and read the text in a cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from craft_cli.data.cells import described, is_missing, list_in, looks_like_list, whole_text
from craft_cli.data.tables import column_named, columns_told
from craft_cli.errors import DataError

if TYPE_CHECKING:
    from craft_cli.data.readers import Row
    from craft_cli.data.tables import Table

_TEXTS = (
    ("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"),
)  # fmt: skip

_LABELS = ("label", "labels", "score", "target", "class")


def guess_texts(columns: Sequence[str]) -> tuple[str, ...]:
    """Find the columns of one text or a pair by their usual names; empty if there are none."""
    guesses = ([column_named(name, columns) for name in guess] for guess in _TEXTS)
    return next((tuple(name for name in guess if name) for guess in guesses if all(guess)), ())


def columns_of(first: Row, origin: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """The text columns to predict: those given, or by their usual names.

    Raises:
        DataError: they are missing.
    """
    columns = list(first.cells)
    named = [it for name in wanted if (it := column_named(name, columns))]
    if wanted and len(named) == len(wanted):
        return tuple(named)
    columns_of_text = guess_texts(columns)
    if not columns_of_text or (wanted and len(wanted) != len(columns_of_text)):
        needed = f"no columns {' and '.join(wanted)}" if wanted else "no column with a usual name of a text"
        raise DataError(f"{origin} has {needed}; {columns_told(columns, '--text-columns')}")
    return columns_of_text


def settled_columns(table: Table, texts: tuple[str, ...], label: str, *, labelled: bool) -> tuple[tuple[str, ...], str]:
    """The text and label columns of a table: those given, or by their usual names, in any case.

    Raises:
        DataError: a column is missing.
    """
    texts = texts or guess_texts(table.columns)
    if not texts:
        problem = columns_told(table.columns, "--text-columns")
        raise DataError(f"{table.origin}: which columns hold the text? I{problem[1:]}")
    label = label or next((guess for guess in _LABELS if column_named(guess, table.columns)), _LABELS[0])
    names = [known_column(table, column, "--text-columns") for column in texts]
    found = known_column(table, label, "--label-column") if labelled else (column_named(label, table.columns) or label)
    check_distinct([*names, found], table.origin)
    return tuple(names), found


def check_distinct(columns: Sequence[str], origin: str) -> None:
    """Refuse a column that is used twice, such as a label that would be read as the text.

    Raises:
        DataError: one is.
    """
    if twice := [name for number, name in enumerate(columns) if name in columns[:number]]:
        raise DataError(
            f"{origin}: column '{twice[0]}' is used twice; choose different columns with --text-columns and --label-column"
        )


def known_column(table: Table, name: str, flag: str) -> str:
    """The exact name of a column in a table.

    Raises:
        DataError: the column is missing.
    """
    column = column_named(name, table.columns)
    if column is None:
        raise DataError(f"{table.origin} has no column '{name}'; {columns_told(table.columns, flag)}")
    return column


def texts_of(table: Table, column: str) -> list[str]:
    """Read the texts of a column.

    Raises:
        DataError: a cell has no text, or all cells are lists of messages written as text.
    """
    texts = [text_of(value, column, partial(table.place, row)) for row, value in enumerate(table.column(column))]
    if all(map(looks_like_list, texts)) and all(isinstance(part, dict) for part in list_in(texts[0]) or [None]):
        raise DataError(
            f"{table.origin}: column '{column}' has lists of messages written as text; write only the text of each row"
        )
    return texts


def text_of(value: Any, column: str, place: Callable[[], str]) -> str:
    """The text in a cell; a number is converted to text.

    Raises:
        DataError: there is no text (`place` returns the location).
    """
    if is_missing(value):
        raise DataError(f"{place()}: column '{column}' has no text")
    if not isinstance(value, (str, int, float)):
        raise DataError(f"{place()}: column '{column}' is {described(value)}, not a text")
    text = str(value)
    if not whole_text(text):
        raise DataError(f"{place()}: column '{column}' contains an invalid character (a lone surrogate); remove it")
    return text
