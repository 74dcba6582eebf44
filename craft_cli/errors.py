"""The errors a user is meant to read: one line each, saying what was wrong, where, and what to do.

And how names, numbers and results are written, on a screen as in a file.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class CraftError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with 1."""


class ConfigError(CraftError):
    """A flag, a recipe key or a combination of them that cannot be used."""


class ModelError(CraftError):
    """A model or checkpoint that is missing, unsupported or not the one expected."""


class DataError(CraftError):
    """A data file, column, row or label that cannot be used."""


class FileError(CraftError):
    """A file of ours that is damaged, or a place that cannot be written."""


class OtherVersion(FileError):
    """A file of ours that is whole, but was written by an earlier or later version."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or the list of all known ones."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def figure(value: float) -> str:
    """A number as it is read best, however small or large: 0.6686, 3.142, 2.1e-09, 12,346, 1.7e+15."""
    size = abs(value)
    if 1e-4 <= size < 1:
        return f"{value:.4f}"
    return f"{value:,.0f}" if 1e4 <= size < 1e12 else f"{value:.4g}"


def in_bytes(size: float) -> str:
    """A number of bytes as it is read best: 850 MB, 1.2 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 1e3:.0f} kB"


def listed(names: Sequence[str], most: int = 20) -> str:
    """`a, b, c and 7 more`: names in a line, however many and however long they are."""
    shown = ", ".join(name if len(name) <= 40 else f"{name[:37]}..." for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def in_words(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def plain(text: str, kept: str = "") -> str:
    """Without control characters, but for those to be kept: a name in a stranger's file must not steer the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_json(content: Any, *, indent: int | None = None, ascii: bool = False) -> str:
    """JSON that every parser reads: a number that is not finite is null, what cannot be printed is escaped.

    Args:
        content: what `json` takes; of anything else its text.
        indent: as `json.dumps` has it.
        ascii: escape everything else too, for a stream that is not UTF-8.
    """
    try:
        text = json.dumps(content, indent=indent, ensure_ascii=ascii, allow_nan=False, default=str)
    except ValueError:
        text = json.dumps(_finite(content), indent=indent, ensure_ascii=ascii, default=str)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1].replace("\x7f", "\\u007f") for c in text)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def is_utf8(stream: Any) -> bool:
    """Whether a text stream writes UTF-8."""
    try:
        return codecs.lookup(stream.encoding).name == "utf-8"
    except (AttributeError, LookupError, TypeError):  # in memory
        return True


def below_home(path: Path) -> str:
    """A path as it is shown: `~/models` for what lies in the home directory, where there is one."""
    try:
        home = Path.home()
    except RuntimeError:  # a user id without a name
        return str(path)
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) and path != home else str(path)
