"""Which columns hold the texts, and the text in a cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from craft_cli.errors import DataError

if TYPE_CHECKING:
    from craft_cli.data.readers import Row
    from craft_cli.data.tables import Table

_TEXTS = (
    ("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"),
)  # fmt: skip


def guess_texts(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of one text or a pair by their usual names; none if there are none."""
    return next((guess for guess in _TEXTS if set(guess) <= set(columns)), ())


def columns_of(first: Row, origin: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """The columns of texts to predict for: those wanted, or as they are usually called.

    Raises:
        DataError: they are not there.
    """
    if wanted and all(column in first.cells for column in wanted):
        return tuple(wanted)
    found = guess_texts(list(first.cells))
    if not found or (wanted and len(wanted) != len(found)):
        needed = f"no columns {' and '.join(wanted)}" if wanted else "no column that is usually a text"
        raise DataError(f"{origin} has {needed}; it has {', '.join(first.cells)} (choose with --text-columns)")
    return found


def texts_of(table: Table, column: str) -> list[str]:
    """The texts of a column.

    Raises:
        DataError: a cell without one.
    """
    return [text_of(value, column, partial(table.place, row)) for row, value in enumerate(table.column(column))]


def text_of(value: Any, column: str, place: Callable[[], str]) -> str:
    """The text in a cell.

    Raises:
        DataError: there is none (`place` tells where).
    """
    if value is None or isinstance(value, (list, dict)):
        raise DataError(f"{place()}: column '{column}' {'has no text' if value is None else 'is a list, not a text,'}")
    return str(value)
