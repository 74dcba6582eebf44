"""Cell values: conversions from other libraries, lists stored as text, and csv cells that are safe in a spreadsheet."""

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
    """One row: its location (`line 3`, or `row 3` in a binary file), and its cells by column."""

    place: str
    cells: dict[str, Any]


def plain(value: Any) -> Any:
    """Convert a value of pyarrow or `datasets` to its JSON form; text may arrive as bytes."""
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
    """Whether a cell is empty: null, an empty csv cell, or pandas' NaN; never the text `nan`."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def described(value: Any) -> str:
    """Describe an invalid cell, for messages."""
    kinds: dict[type, str] = {list: "a list", tuple: "a list", dict: "a mapping", bytes: "bytes that are not UTF-8"}
    if isinstance(value, (str, int, float)) and not is_missing(value):
        return str(value)
    return "nothing" if is_missing(value) else kinds.get(type(value), f"a {type(value).__name__}")


def whole_text(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON can spell but no tokenizer accepts."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


# -- lists stored as text --------------------------------------------------------------------------------------------------


def looks_like_list(cell: Any) -> bool:
    """Whether a text looks like a list written by a library."""
    return isinstance(cell, str) and cell.strip()[:1] == "[" and cell.strip()[-1:] == "]"


def list_in(cell: Any) -> list[Any] | None:
    """Parse a list written as text by Python, pandas or JSON; None if the text is not such a list.

    numpy's form `['a' 'b']` is refused, because Python would read it as one name.
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
    with warnings.catch_warnings():  # for invalid escape sequences
        warnings.simplefilter("ignore")
        return ast.literal_eval(text)


def _joins(cell: str) -> bool:
    """Whether two quoted strings follow each other without a comma; Python would join them."""
    return bool(re.search(r"""(?<!\\)(['"])\s+\1""", cell))


def as_list(cell: Any) -> Any:
    """The cell as a list, if it is one or stores one as text; else the cell itself."""
    found = list_in(cell)
    return cell if found is None else found


def all_lists(cells: Sequence[Any]) -> list[list[Any] | None] | None:
    """Parse a column of lists stored as text, with None for missing cells; None if any cell is not such a list."""
    found = [None if is_missing(cell) else list_in(cell) for cell in cells]
    given = [cell for cell in cells if not is_missing(cell)]
    return found if given and len(given) == sum(it is not None for it in found) else None


# -- spreadsheets ----------------------------------------------------------------------------------------------------------

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def for_spreadsheets(value: Any) -> Any:
    """Escape a csv cell that a spreadsheet would run as a formula, with a leading apostrophe, which spreadsheets hide."""
    if isinstance(value, str) and value.startswith(_FORMULA) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value
