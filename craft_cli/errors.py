"""The errors a user is meant to read: one line each, saying what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


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


def listed(names: Sequence[str], most: int = 20) -> str:
    """`a, b, c and 7 more`: names in a line, however many and however long they are."""
    shown = ", ".join(name if len(name) <= 40 else f"{name[:37]}..." for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown
