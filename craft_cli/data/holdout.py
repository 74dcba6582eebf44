"""Rows held out to evaluate on, remembered by what they say.

Every row has a mark, a checksum of salt and texts. Of every label the rows with the lowest marks are held out, and the
highest of these is remembered. So a row is held out or not wherever it stands and whatever is added: rows that were
trained on stay rows to train on, and equal texts of one label are never in both parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256

from craft_cli.data.sources import Split, shares
from craft_cli.errors import DataError

ALL = "all"
"""Where rows are not divided by label."""
SALT = "salt"
"""Goes into the marks: the seed, and another number where a text of many rows would go to the wrong side."""
_TRIES = 8


def hold_out(split: Split, share: float, seed: int, *, stratify: bool) -> dict[str, str]:
    """The highest mark that is held out, by label number or for `ALL`, and the `SALT` of the marks.

    Args:
        split: rows to divide.
        share: of them that is to be held out.
        seed: decides which.
        stratify: whether every label is to be in both parts, where it can be.

    Raises:
        DataError: too few rows, or all with one text.
    """
    rows, texts = len(split), len(set(split.texts))
    if texts < 2:
        why = f"{rows} row(s)" if rows < 2 else f"{rows:,} rows of one text"
        raise DataError(f"{split.origin}: {why} cannot be divided into training and validation")
    apart = min(max(1, round(share * rows)), rows - 1)
    keys = [str(label) for label in split.labels] if stratify and split.labels else [ALL] * rows
    if len(set(keys)) > min(apart, rows - apart):
        keys = [ALL] * rows
    tries = []
    for number in range(_TRIES):
        marks = _marks(split, salt := f"{seed}.{number}")
        limits = _limits(keys, marks, apart) | {SALT: salt}
        tries.append((abs(len(_parts(split, limits, marks)[1]) - apart), limits))
        if tries[-1][0] <= apart / 10:
            break
    return min(tries, key=lambda found: found[0])[1]


def _limits(keys: Sequence[str], marks: Sequence[str], apart: int) -> dict[str, str]:
    by_key: dict[str, list[str]] = {}
    for key, mark in zip(keys, marks, strict=True):
        by_key.setdefault(key, []).append(mark)
    quotas = shares({key: len(those) for key, those in by_key.items()}, apart, spared=1)
    found = {key: _limit(by_key[key], quota) for key, quota in quotas.items()}
    return {key: limit for key, limit in found.items() if limit} or {ALL: _limit(list(marks), apart)}


def _limit(marks: list[str], count: int) -> str:
    """The mark of the last of so many rows in their order, but never of all rows; nothing where equal texts are all there is."""
    limit = sorted(marks)[count - 1] if count else ""
    return limit if limit < max(marks) else max((mark for mark in marks if mark < limit), default="")


def divided(split: Split, limits: Mapping[str, str]) -> tuple[list[int], list[int]]:
    """Rows to train on and rows held out, by what `hold_out` found.

    Raises:
        DataError: no row of these is held out, or every one.
    """
    parts = _parts(split, limits, _marks(split, limits.get(SALT, "")))
    if not all(parts):
        which = "no row" if not parts[1] else "every row"
        raise DataError(f"{split.origin}: {which} of these was held out in training: give --validation-file")
    return parts


def _parts(split: Split, limits: Mapping[str, str], marks: Sequence[str]) -> tuple[list[int], list[int]]:
    labels = [ALL] * len(split) if ALL in limits or not split.labels else [str(label) for label in split.labels]
    parts: tuple[list[int], list[int]] = ([], [])
    for row, (key, mark) in enumerate(zip(labels, marks, strict=True)):
        parts[mark <= limits.get(key, "")].append(row)
    return parts


def _marks(split: Split, salt: str) -> list[str]:
    seed, _, number = salt.partition(".")
    begin = f'[{seed}, "{number}", '  # of the JSON of all; a salt that is read from a record may be any text
    return [sha256((begin + json.dumps(text)[1:]).encode()).hexdigest()[:16] for text in split.texts]
