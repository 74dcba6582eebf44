"""Held-out rows, chosen by a hash of their texts.

Every row has a mark, a checksum of a salt and its texts. For each label, the rows with the lowest marks are held out, and
the highest mark among them is stored. The split therefore does not depend on the order of the rows, and adding rows does
not move old ones: training rows stay training rows, and equal texts of one label are never in both parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256

from craft_cli.data.sources import Split, shares
from craft_cli.errors import DataError

ALL = "all"
"""Key for a split that is not stratified by label."""
SALT = "salt"
"""Salt of the marks: the seed, and a number that is changed if a text with many rows would unbalance the split."""
_TRIES = 8


def hold_out(split: Split, share: float, seed: int, *, stratify: bool) -> dict[str, str]:
    """Choose the held-out rows: the highest held-out mark, by label number or for `ALL`, and the `SALT` of the marks.

    Args:
        split: rows to split.
        share: share of the rows to hold out.
        seed: random seed of the split.
        stratify: whether to keep every label in both parts where possible.

    Raises:
        DataError: there are too few rows, or all have the same text.
    """
    rows, texts = len(split), len(set(split.texts))
    if texts < 2:
        why = f"{rows} row(s)" if rows < 2 else f"{rows:,} rows with the same text"
        raise DataError(
            f"{split.origin}: {why} cannot be split into training and validation rows; pass --validation-file"
        )
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
    """The mark of the n-th row in order, but never of the last row; None if all texts are equal."""
    limit = sorted(marks)[count - 1] if count else ""
    return limit if limit < max(marks) else max((mark for mark in marks if mark < limit), default="")


def divided(split: Split, limits: Mapping[str, str]) -> tuple[list[int], list[int]]:
    """Split rows into training rows and held-out rows, with the marks of `hold_out`.

    Raises:
        DataError: no row is held out, or every row.
    """
    parts = _parts(split, limits, _marks(split, limits.get(SALT, "")))
    if not all(parts):
        which = "no row" if not parts[1] else "every row"
        raise DataError(f"{split.origin}: {which} was held out in training; pass --validation-file")
    return parts


def _parts(split: Split, limits: Mapping[str, str], marks: Sequence[str]) -> tuple[list[int], list[int]]:
    labels = [ALL] * len(split) if ALL in limits or not split.labels else [str(label) for label in split.labels]
    parts: tuple[list[int], list[int]] = ([], [])
    for row, (key, mark) in enumerate(zip(labels, marks, strict=True)):
        parts[mark <= limits.get(key, "")].append(row)
    return parts


def _marks(split: Split, salt: str) -> list[str]:
    seed, _, number = salt.partition(".")
    begin = f'[{seed}, "{number}", '  # prefix of the JSON that is hashed; a stored salt can be any text
    return [sha256((begin + json.dumps(text)[1:]).encode()).hexdigest()[:16] for text in split.texts]
