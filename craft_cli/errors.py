"""Errors for the user: one line with what was wrong, where, and what to do.

Also formats names, numbers and results, for the screen and for files.
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
    """Base class of errors that the user can fix. The command line prints one line and exits with code 1."""


class ConfigError(CraftError):
    """An invalid flag, recipe key, or combination of them."""


class ModelError(CraftError):
    """A model or base checkpoint that is missing, unsupported or not the expected one."""


class DataError(CraftError):
    """An invalid data file, column, row or label."""


class FileError(CraftError):
    """A damaged file, or a path that cannot be read or written."""


class OtherVersion(FileError):
    """An intact file with the format of an earlier or later craft version."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the option closest to `name`, or the list of all options."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def figure(value: float) -> str:
    """Format a number of any magnitude for reading: 0.6686, 3.142, 2.1e-09, 12,346, 1.7e+15."""
    size = abs(value)
    if 1e-4 <= size < 1:
        return f"{value:.4f}"
    return f"{value:,.0f}" if 1e4 <= size < 1e12 else f"{value:.4g}"


def in_bytes(size: float) -> str:
    """Format a number of bytes for reading: 850 MB, 1.2 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 1e3:.0f} kB"


def listed(names: Sequence[str], most: int = 20) -> str:
    """Format names for one line, with long names and long lists shortened: `a, b, c and 7 more`."""
    shown = ", ".join(name if len(name) <= 40 else f"{name[:37]}..." for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def in_words(names: Sequence[str]) -> str:
    """Join names: `a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def plain(text: str, kept: str = "") -> str:
    """Replace control characters except those in `kept`, so that names from untrusted files cannot control the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_json(content: Any, *, indent: int | None = None, ascii: bool = False) -> str:
    """Serialize to strictly valid JSON: non-finite numbers become null, unprintable characters are escaped.

    Args:
        content: anything `json` accepts; other objects are converted to text.
        indent: as in `json.dumps`.
        ascii: escape all non-ASCII characters, for a stream that is not UTF-8.
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
    """Whether a text stream is encoded as UTF-8."""
    try:
        return codecs.lookup(stream.encoding).name == "utf-8"
    except (AttributeError, LookupError, TypeError):  # an in-memory stream
        return True


def below_home(path: Path) -> str:
    """Format a path for display, with `~` for the home directory."""
    try:
        home = Path.home()
    except RuntimeError:  # the user id has no home directory
        return str(path)
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) and path != home else str(path)
