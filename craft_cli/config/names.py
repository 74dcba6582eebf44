"""Comma-separated names, as in a cell, a flag or a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable

SEPARATOR = ","
"""Default separator."""


def join_names(names: Iterable[str], separator: str = SEPARATOR) -> str:
    """Join names into one text that `split_names` splits into the same names."""
    return separator.join(_quoted(name) if _needs_quotes(name, separator) else name for name in names)


def split_names(text: str, separator: str = SEPARATOR) -> list[str]:
    """Split a text into names, stripped of whitespace; a name in double quotes may contain the separator."""
    names = []
    rest = text
    while rest:
        quoted = re.match(r'\s*"((?:[^"]|"")*)"', rest)
        behind = rest[quoted.end() :] if quoted else rest
        behind = behind if behind.startswith(separator) else behind.lstrip()
        if quoted and (not behind or behind.startswith(separator)):
            names.append(quoted[1].replace('""', '"'))
            rest = behind[len(separator) :]
        else:
            name, _, rest = rest.partition(separator)
            names += [name.strip()] if name.strip() else []
    return names


def _needs_quotes(name: str, separator: str) -> bool:
    return not name or name != name.strip() or '"' in name or (separator.strip() or separator) in name


def _quoted(name: str) -> str:
    escaped = name.replace('"', '""')
    return f'"{escaped}"'
