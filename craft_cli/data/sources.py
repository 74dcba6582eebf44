"""Where rows lie: files, saved data sets, the hub; and the rows of a split, whatever they mean."""

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
    """Where rows come from; the fields are the settings of the same names."""

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
    """No setting: what a training found, see `data.holdout`."""

    @classmethod
    def of(cls, settings: Any) -> DataSource:
        """Taken from an object or mapping that has such settings among others."""
        get = settings.get if isinstance(settings, Mapping) else lambda name: getattr(settings, name, None)
        values = {name: get(name) for name in cls.__dataclass_fields__}
        if values["text_columns"]:
            values["text_columns"] = tuple(values["text_columns"])
        return cls(**values)

    def resolved(self) -> DataSource:
        """With absolute paths, so that it means the same from any folder."""
        absolute = lambda path: str(Path(path).expanduser().resolve()) if path else None  # noqa: E731
        return replace(
            self,
            data_dir=absolute(self.data_dir),
            train_file=absolute(self.train_file),
            validation_file=absolute(self.validation_file),
        )

    @property
    def given(self) -> bool:
        """Whether it says where rows come from at all."""
        return bool(self.task or self.data_dir or self.train_file or self.validation_file or self.dataset_name)


@dataclass(frozen=True)
class Home:
    """Where a known task has its rows, and what its splits are called.

    Attributes:
        hub: data set on the hub, with its configuration.
        sample: folder below `craft_cli/samples`, for data that ships with craft.
        train: split to train on; None for a task that is only evaluated.
        validation: splits to evaluate on; the first one chooses the best adapter.
        test: splits to predict for.
    """

    hub: tuple[str, str] | None = None
    sample: str | None = None
    train: str | None = TRAIN
    validation: tuple[str, ...] = (VALIDATION,)
    test: tuple[str, ...] = (TEST,)


@dataclass(frozen=True)
class Split:
    """Rows of one split, as a task has read them.

    Attributes:
        texts: for each row its parts: one text or two, or the words of a sentence.
        labels: gold of each row, as the task wants it: a number, a number for each label, or a number for each word. None
            if it is not known.
        origin: file or hub name, for messages.
        lines: for each row the line that its words come from, where there was one.
        note: what the user should know of how it was read.
        place: where a row stands, for messages: `train.csv, line 3`.
        rows: the numbers of the rows in what they were read from, from 0; without, these are all of it.
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
        """Of each row its number in what it was read from, from 1."""
        return range(1, len(self) + 1) if self.rows is None else [row + 1 for row in self.rows]

    def place_of(self, row: int) -> str:
        """Where a row stands, for messages."""
        return self.place(row) if self.place else f"{self.origin}, row {row + 1}"

    def checksum(self) -> str:
        """sha256 over texts and gold of all rows, to notice that the data is another."""
        digest = sha256()
        for row in zip(self.texts, self.labels or [None] * len(self), strict=True):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def first(self, rows: int | None, *, by_label: bool = False) -> Split:
        """Only the first rows; `by_label` those of every label, each with its share, in their order."""
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
        """Only these rows; `part` says which, for messages."""
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
    """How many of `total` rows are of each label: in proportion to `counts`, and of as many labels as can be.

    Args:
        counts: rows of each label.
        total: rows to choose.
        spared: labels with so few rows get none above their whole share.
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


# -- where the splits are ------------------------------------------------------------------------------------------------


def split_names(source: DataSource, home: Home, part: str) -> list[str]:
    """What the splits of a part are called: MNLI has two to evaluate on, where they are not given as one file."""
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
    """Whether the user's own data has rows to evaluate on; else some of the training rows are held out."""
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
    """The table of a split.

    Raises:
        DataError: it is missing or cannot be read.
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
    raise DataError(f"no {split} data: give --data-dir or --{split}-file")
