"""Data sources (files, saved datasets, the Hub) and the rows of a split."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from craft_cli.data.tables import (
    NAMES,
    Table,
    hub_splits,
    hub_table,
    is_saved,
    named,
    read_file,
    saved_splits,
    saved_table,
    split_file,
    split_files,
)
from craft_cli.errors import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclass(frozen=True)
class DataSource:
    """A data source; the fields are the settings of the same names."""

    task: str | None = None
    task_type: str | None = None
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    validation_share: float | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    label_separator: str | None = None
    problem_type: str | None = None
    seed: int | None = None
    held_out: Mapping[str, str] | None = None
    """Not a setting: the held-out marks of a training, see `data.holdout`."""

    @classmethod
    def of(cls, settings: Any) -> DataSource:
        """Build a source from an object or mapping that has these settings among others."""
        get = settings.get if isinstance(settings, Mapping) else lambda name: getattr(settings, name, None)
        values = {name: get(name) for name in cls.__dataclass_fields__}
        if values["text_columns"]:
            values["text_columns"] = tuple(values["text_columns"])
        return cls(**values)

    def resolved(self) -> DataSource:
        """A copy with absolute paths, valid from any folder."""
        absolute = lambda path: str(Path(path).expanduser().resolve()) if path else None  # noqa: E731
        return replace(
            self,
            data_dir=absolute(self.data_dir),
            train_file=absolute(self.train_file),
            validation_file=absolute(self.validation_file),
        )

    @property
    def given(self) -> bool:
        """Whether any source is set."""
        return bool(self.task or self.data_dir or self.train_file or self.validation_file or self.dataset_name)


@dataclass(frozen=True)
class Home:
    """Location and split names of a built-in task.

    Attributes:
        hub: dataset on the Hub, with its configuration.
        sample: folder in `craft_cli/samples`, for data that ships with craft.
        train: training split; None for a task that is only evaluated.
        validation: validation splits; the first one chooses the best adapter.
        test: test splits to predict.
    """

    hub: tuple[str, str] | None = None
    sample: str | None = None
    train: str | None = TRAIN
    validation: tuple[str, ...] = (VALIDATION,)
    test: tuple[str, ...] = (TEST,)


@dataclass(frozen=True)
class Split:
    """The rows of one split, as read by a task.

    Attributes:
        texts: the parts of each row: one text, two texts, or the words of a sentence.
        labels: the gold of each row in the task's form: one number, one per label, or one per word. None if unknown.
        origin: file or hub name, for messages.
        lines: the source line of each row's words, if there is one.
        note: a note to the user about how the split was read.
        place: the location of a row, for messages: `train.csv, line 3`.
        rows: row numbers in the source, from 0. Default: the split is the whole source.
    """

    texts: list[tuple[str, ...]]
    labels: list[Any] | None
    origin: str
    lines: list[str] | None = None
    note: str = field(default="", compare=False)
    place: Callable[[int], str] | None = field(default=None, compare=False, repr=False)
    rows: Sequence[int] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def numbers(self) -> Sequence[int]:
        """The number of each row in the source, from 1."""
        return range(1, len(self) + 1) if self.rows is None else [row + 1 for row in self.rows]

    def place_of(self, row: int) -> str:
        """The location of a row, for messages."""
        return self.place(row) if self.place else f"{self.origin}, row {row + 1}"

    def checksum(self) -> str:
        """The sha256 of all texts and labels, to detect changed data."""
        digest = sha256()
        for row in zip(self.texts, self.labels or [None] * len(self), strict=True):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def first(self, rows: int | None, *, by_label: bool = False) -> Split:
        """The first rows; with `by_label`, the first rows of each label in proportion, in their original order."""
        if rows is None or rows >= len(self):
            return self
        if not by_label or not self.labels:
            return self.select(range(rows))
        places: dict[Any, list[int]] = {}
        for row, label in enumerate(self.labels):
            places.setdefault(label, []).append(row)
        counts = shares({label: len(those) for label, those in places.items()}, rows)
        return self.select(sorted(row for label, those in places.items() for row in those[: counts[label]]))

    def select(self, rows: Sequence[int], part: str = "") -> Split:
        """A subset of the rows; `part` names it in messages."""
        return replace(
            self,
            texts=[self.texts[row] for row in rows],
            labels=None if self.labels is None else [self.labels[row] for row in rows],
            origin=self.origin + part,
            lines=None if self.lines is None else [self.lines[row] for row in rows],
            place=lambda row: self.place_of(rows[row]),
            rows=[self.rows[row] for row in rows] if self.rows is not None else list(rows),
        )


def shares(counts: Mapping[Any, int], total: int, *, spared: int = 0) -> dict[Any, int]:
    """Distribute `total` rows over labels in proportion to `counts`, covering as many labels as possible.

    Args:
        counts: number of rows of each label.
        total: number of rows to choose.
        spared: labels with at most this many rows are not rounded up.
    """
    rows = sum(counts.values())
    exact = {label: count * total / rows for label, count in counts.items()}
    found = {label: int(part) for label, part in exact.items()}
    by_need = sorted(
        (label for label in counts if counts[label] > spared),
        key=lambda label: (found[label] > 0, found[label] - exact[label], label),
    )
    for label in by_need[: total - sum(found.values())]:
        found[label] += 1
    return found


# -- locating the splits -------------------------------------------------------------------------------------------------


def split_names(source: DataSource, home: Home, part: str) -> list[str]:
    """The split names of a part. MNLI has two validation splits unless one file is given."""
    if part == TRAIN:
        return [TRAIN]
    if part == TEST:
        return list(home.test)
    if source.validation_file:
        return [VALIDATION]
    folder = Path(source.data_dir).expanduser() if source.data_dir else None
    there = [name for name in home.validation if folder is None or is_saved(folder) or split_files(folder, name)]
    return there or [VALIDATION]


def has_validation(source: DataSource) -> bool:
    """Whether the user's data has validation rows; otherwise some training rows are held out."""
    if source.data_dir:
        folder = Path(source.data_dir).expanduser()
        if is_saved(folder):
            return named(VALIDATION, saved_splits(folder)) is not None or source.validation_split is not None
        return not folder.is_dir() or not split_files(folder, TRAIN) or bool(split_files(folder, VALIDATION))
    if source.dataset_name:
        return source.validation_split is not None or named(VALIDATION, _on_hub(source)) is not None
    return source.validation_file is not None


def _on_hub(source: DataSource) -> list[str]:
    return hub_splits(str(source.dataset_name), source.dataset_config_name)


def read_split(source: DataSource, home: Home, split: str) -> Table:
    """Read the table of a split.

    Raises:
        DataError: the split is missing or cannot be read.
    """
    given = source.train_file if split == TRAIN else source.validation_file if split.startswith(VALIDATION) else None
    renamed = source.train_split if split == TRAIN else source.validation_split if split == VALIDATION else None
    if given:
        return read_file(Path(given).expanduser())
    if source.data_dir:
        folder = Path(source.data_dir).expanduser()
        if not is_saved(folder):
            return read_file(split_file(folder, split))
        return saved_table(folder, renamed or named(split, saved_splits(folder)) or split)
    if home.sample:
        shipped = Path(__file__).parent.parent / "samples" / home.sample / f"{split}.jsonl"
        return replace(read_file(shipped), origin=f"the shipped sample {home.sample}, {split}")
    if source.dataset_name:
        other = renamed or (named(split, _on_hub(source)) if split in NAMES else None)
        return hub_table(source.dataset_name, source.dataset_config_name, other or split)
    if home.hub:
        return hub_table(*home.hub, renamed or split)
    raise DataError(f"no {split} data: pass --data-dir or --{split}-file")
