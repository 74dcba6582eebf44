"""Which columns hold the texts, and the text in a cell."""

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
    """The columns of one text or a pair by their usual names; none if there are none."""
    guesses = ([column_named(name, columns) for name in guess] for guess in _TEXTS)
    return next((tuple(name for name in guess if name) for guess in guesses if all(guess)), ())


def columns_of(first: Row, origin: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """The columns of texts to predict for: those wanted, or as they are usually called.

    Raises:
        DataError: they are not there.
    """
    columns = list(first.cells)
    named = [it for name in wanted if (it := column_named(name, columns))]
    if wanted and len(named) == len(wanted):
        return tuple(named)
    found = guess_texts(columns)
    if not found or (wanted and len(wanted) != len(found)):
        needed = f"no columns {' and '.join(wanted)}" if wanted else "no column that is usually a text"
        raise DataError(f"{origin} has {needed}; {columns_told(columns, '--text-columns')}")
    return found


def settled_columns(table: Table, texts: tuple[str, ...], label: str, *, labelled: bool) -> tuple[tuple[str, ...], str]:
    """The columns of texts and of labels in a table: those wanted, or as they are usually called, whatever their case.

    Raises:
        DataError: one of them is not there.
    """
    texts = texts or guess_texts(table.columns)
    if not texts:
        told = columns_told(table.columns, "--text-columns")
        raise DataError(f"{table.origin}: which columns hold the text? I{told[1:]}")
    label = label or next((guess for guess in _LABELS if column_named(guess, table.columns)), _LABELS[0])
    found = [known_column(table, column, "--text-columns") for column in texts]
    return tuple(found), known_column(table, label, "--label-column") if labelled else (
        column_named(label, table.columns) or label
    )


def known_column(table: Table, name: str, flag: str) -> str:
    """What a column is called in a table.

    Raises:
        DataError: it is not there.
    """
    found = column_named(name, table.columns)
    if found is None:
        raise DataError(f"{table.origin} has no column '{name}'; {columns_told(table.columns, flag)}")
    return found


def texts_of(table: Table, column: str) -> list[str]:
    """The texts of a column.

    Raises:
        DataError: a cell without one, or all of them lists of messages that were written as text.
    """
    texts = [text_of(value, column, partial(table.place, row)) for row, value in enumerate(table.column(column))]
    if all(map(looks_like_list, texts)) and all(isinstance(part, dict) for part in list_in(texts[0]) or [None]):
        raise DataError(
            f"{table.origin}: column '{column}' holds lists of messages written as text: write the text of each row alone"
        )
    return texts


def text_of(value: Any, column: str, place: Callable[[], str]) -> str:
    """The text in a cell; a number is the text it is written as.

    Raises:
        DataError: there is none (`place` tells where).
    """
    if is_missing(value):
        raise DataError(f"{place()}: column '{column}' has no text")
    if not isinstance(value, (str, int, float)):
        raise DataError(f"{place()}: column '{column}' is {described(value)}, not a text")
    text = str(value)
    if not whole_text(text):
        raise DataError(
            f"{place()}: column '{column}' holds half a character (a lone surrogate), which no tokenizer takes"
        )
    return text
