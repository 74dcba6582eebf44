"""Cells: what libraries make of values, lists that were written as text, what spreadsheets would run."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row: where it stands (`line 3`, or `row 3` where there are no lines), and its cells by column."""

    place: str
    cells: dict[str, Any]


def plain(value: Any) -> Any:
    """A value of pyarrow or `datasets` as JSON would hold it: text without the mark of UTF-8 comes as bytes."""
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return value


def is_missing(value: Any) -> bool:
    """Whether there is nothing in a cell: null, an empty cell of a csv, pandas' NaN; never the text `nan`."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def described(value: Any) -> str:
    """What a cell holds that is of no use, for messages."""
    kinds: dict[type, str] = {list: "a list", tuple: "a list", dict: "a mapping", bytes: "bytes that are not UTF-8"}
    if isinstance(value, (str, int, float)) and not is_missing(value):
        return str(value)
    return "nothing" if is_missing(value) else kinds.get(type(value), f"a {type(value).__name__}")


def whole_text(text: str) -> bool:
    """Whether a text has no half characters (lone surrogates, as JSON can spell them), which no tokenizer takes."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


# -- lists written as text -------------------------------------------------------------------------------------------------


def looks_like_list(cell: Any) -> bool:
    """Whether a text begins and ends as the list that a library wrote."""
    return isinstance(cell, str) and cell.strip()[:1] == "[" and cell.strip()[-1:] == "]"


def list_in(cell: Any) -> list[Any] | None:
    """The list that Python, pandas or JSON wrote as this text; None if it is none of theirs.

    What numpy writes, `['a' 'b']`, is none: Python would read it as one name.
    """
    if not looks_like_list(cell):
        return None
    for read in (json.loads, _python):
        try:
            found = read(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list) else None
    return None


def _python(text: str) -> Any:
    if _joins(text):
        raise ValueError("numpy wrote it")
    with warnings.catch_warnings():  # of escapes that Python does not know
        warnings.simplefilter("ignore")
        return ast.literal_eval(text)


def _joins(cell: str) -> bool:
    """Whether two quoted texts stand beside each other without a comma: Python would join them."""
    return bool(re.search(r"""(?<!\\)(['"])\s+\1""", cell))


def as_list(cell: Any) -> Any:
    """The list that a cell is or holds as text; else the cell."""
    found = list_in(cell)
    return cell if found is None else found


def all_lists(cells: Sequence[Any]) -> list[list[Any] | None] | None:
    """The lists in the cells of a column, None where one is missing; None if any cell is no list written as text."""
    found = [None if is_missing(cell) else list_in(cell) for cell in cells]
    given = [cell for cell in cells if not is_missing(cell)]
    return found if given and len(given) == sum(it is not None for it in found) else None


# -- spreadsheets ----------------------------------------------------------------------------------------------------------

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def for_spreadsheets(value: Any) -> Any:
    """A csv cell that no spreadsheet runs as a formula: such a text gets an apostrophe before it, which they do not show."""
    if isinstance(value, str) and value.startswith(_FORMULA) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value
