"""Checks for suspicious rows, reported before training: one line per finding, with a count.

These checks never stop a training. Data that cannot be trained on is refused in `tasks/labels.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from craft_cli.data.sources import TRAIN, Split
from craft_cli.errors import listed

_FEW = 2
"""Labels with fewer training rows are reported."""
_FAR = 1e5
"""Regression targets with a larger ratio of mean to spread are reported: float32 has seven digits."""
_SHOWN = 3
"""Maximum labels, or groups of labels, to list in a note."""


def row_notes(rows: Mapping[str, Split]) -> list[str]:
    """Report rows without text, repeated texts, and validation rows that are also training rows.

    Args:
        rows: splits by name, including `train`.
    """
    train = rows[TRAIN]
    earlier: dict[tuple[str, ...], int] = {}
    repeated = [
        row for row, text in enumerate(train.texts) if not _blank(text) and earlier.setdefault(text, row) != row
    ]
    apart = [text for name, split in rows.items() if name != TRAIN for text in split.texts]
    notes = [
        _empty(rows),
        _repeated(train, repeated, earlier),
        _shared(sum(map(earlier.__contains__, apart)), len(apart)),
    ]
    return [note for note in notes if note]


def _empty(rows: Mapping[str, Split]) -> str:
    places = [(split, row) for split in rows.values() for row, text in enumerate(split.texts) if _blank(text)]
    if not places:
        return ""
    split, row = places[0]
    return f"{_rows(len(places))} without text; the first is {split.place_of(row)}"


def _repeated(train: Split, repeated: Sequence[int], earlier: Mapping[tuple[str, ...], int]) -> str:
    if not repeated:
        return ""
    note = f"{len(repeated):,} of {len(train):,} rows of {train.origin} {'repeats' if len(repeated) == 1 else 'repeat'} an earlier text"
    gold = train.labels or [None] * len(train)
    contradicting = [row for row in repeated if gold[row] != gold[earlier[train.texts[row]]]]
    if not contradicting:
        return note
    place = train.place_of(contradicting[0]).removeprefix(f"{train.origin}, ")
    return f"{note}, {len(contradicting):,} with another label (the first is {place})"


def _shared(count: int, apart: int) -> str:
    if not count:
        return ""
    return (
        f"{count:,} of {apart:,} validation rows {'has' if count == 1 else 'have'} a text that is also in the training rows: "
        "the metrics will look too good"
    )


def label_notes(rows: Mapping[str, Split], labels: Sequence[str], column: str) -> list[str]:
    """Report too many labels, labels that differ only in case or whitespace, and labels with few rows.

    Args:
        rows: splits by name, including `train`. Gold is a label number, or 0 or 1 for every label.
        labels: label names.
        column: the label column.
    """
    train = _counts([rows[TRAIN]], len(labels))
    apart = _counts([split for name, split in rows.items() if name != TRAIN], len(labels))
    notes = [_many(rows[TRAIN], labels, column), _alike(labels, train + apart), _rare(labels, train, apart)]
    return [note for note in notes if note]


def number_notes(rows: Mapping[str, Split], column: str) -> list[str]:
    """Report regression targets whose mean is large compared with their spread.

    Args:
        rows: splits by name, including `train`. Gold is a number.
        column: the label column.
    """
    gold = rows[TRAIN].labels or [0.0]
    mean, spread = float(np.mean(gold)), float(np.std(gold))
    if not spread or abs(mean) <= _FAR * spread:
        return []
    return [
        f"the numbers in '{column}' have a mean of {mean:.7g} and a spread of only {spread:.2g}, close to the precision of "
        "float32: subtract a constant from all of them first"
    ]


def _many(train: Split, labels: Sequence[str], column: str) -> str:
    if len(labels) <= max(2, len(train) / 10):  # two labels are never too many
        return ""
    amounts = isinstance((train.labels or [None])[0], int) and all(name.lstrip("-").isdecimal() for name in labels)
    way_out = "; for amounts --problem-type regression" if amounts else ""
    return f"{len(labels):,} labels for {_rows(len(train))}: is '{column}' the right column? (--label-column{way_out})"


def _alike(labels: Sequence[str], counts: np.ndarray) -> str:
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(labels):
        groups.setdefault(" ".join(name.split()).casefold(), []).append(number)
    alike = sorted((group for group in groups.values() if len(group) > 1), key=lambda it: -sum(counts[n] for n in it))
    if not alike:
        return ""
    shown = [", ".join(f"{counts[n]:,} x {_quoted(labels[n])}" for n in group) for group in alike[:_SHOWN]]
    more = f"; and {len(alike) - _SHOWN:,} more" if len(alike) > _SHOWN else ""
    return f"labels that differ only in case or whitespace count as different labels: {'; '.join(shown)}{more}"


def _rare(labels: Sequence[str], train: np.ndarray, apart: np.ndarray) -> str:
    """One line about labels with too few training rows or no validation rows."""
    rare = [name for name, count in zip(labels, train, strict=True) if count < _FEW]
    unseen = [name for name, count in zip(labels, apart, strict=True) if not count] if apart.any() else []
    parts = [
        f"with {what}: {len(names):,} of {len(labels):,} ({listed([*map(_quoted, names)], _SHOWN)})"
        for names, what in ((rare, f"fewer than {_FEW} training rows"), (unseen, "no validation row"))
        if names
    ]
    return "labels " + ", ".join(parts) if parts else ""


def _counts(splits: Iterable[Split], labels: int) -> np.ndarray:
    """Number of rows of every label (labels,)."""
    counts = np.zeros(labels, dtype=int)
    for split in splits:
        if split.labels:
            table = np.asarray(split.labels, dtype=int)  # label numbers (rows,), or (rows, labels)
            counts += np.bincount(table, minlength=labels) if table.ndim == 1 else table.sum(axis=0)
    return counts


def _quoted(name: str) -> str:
    """Quote a name so that its whitespace is visible, also at the end of a long name."""
    return repr(name if len(name) <= 38 else f"{name[:17]}...{name[-18:]}")


def _blank(text: tuple[str, ...]) -> bool:
    return not any(part.strip() for part in text)


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
