"""Tables: rows with named columns from files, folders, saved datasets or the Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_cli.config.hub import NOT_ASKED, patience, unanswered
from craft_cli.config.names import join_names
from craft_cli.data.cells import plain
from craft_cli.data.conll import holds_tags
from craft_cli.data.opened import ending, stem
from craft_cli.data.readers import CONLL, MARKS, SUFFIXES, TEXT, read_rows
from craft_cli.errors import DataError, listed

WHOLE = "train"
"""Split name for a saved dataset without splits."""


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    Attributes:
        origin: file or Hub name, for messages.
        columns: column names.
        column: returns all cells of a column.
        place: returns the location of a row, for messages.
    """

    origin: str
    columns: Sequence[str]
    column: Callable[[str], list[Any]]
    place: Callable[[int], str]


def read_file(path: Path) -> Table:
    """Read a file as a table.

    Raises:
        DataError: the file is missing, empty or of an unknown format, or a row is invalid (names file and line).
    """
    tagged = ending(path) == TEXT and holds_tags(path)
    rows = list(read_rows(path, (*SUFFIXES, TEXT), CONLL) if tagged else read_rows(path))
    if not rows:
        raise DataError(f"{path} has no rows")
    columns = list(dict.fromkeys(name for row in rows for name in row.cells))
    places = [row.place for row in rows]  # kept by a split after the cells are released
    return Table(
        origin=str(path),
        columns=columns,
        column=lambda name: [row.cells.get(name) for row in rows],
        place=lambda row: f"{path}, {places[row]}",
    )


def _of_dataset(dataset: Any, origin: str) -> Table:
    """Wrap a `datasets.Dataset` as a table; ClassLabel numbers become names."""

    def column(name: str) -> list[Any]:
        values, feature = [plain(value) for value in dataset[name]], dataset.features[name]
        if hasattr(feature, "int2str"):
            return [feature.int2str(value) if value is not None and value >= 0 else None for value in values]
        inner: Any = getattr(feature, "feature", None)
        if hasattr(inner, "int2str"):
            return [[inner.int2str(number) for number in value] if value is not None else None for value in values]
        return values

    return Table(origin, dataset.column_names, column, lambda row: f"{origin}, row {row + 1}")


def column_named(name: str, columns: Sequence[str]) -> str | None:
    """Find a column by exact name, or by the only name that differs in case; None if there is no match."""
    if name in columns:
        return name
    alike = [column for column in columns if column.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def columns_told(columns: Sequence[str], flag: str) -> str:
    """The end of an error about a missing column: the existing columns, and the flag that selects one."""
    if len(columns) == 1 and any(mark in columns[0] for mark in MARKS):
        return f"it has one column '{columns[0]}'; a .tsv file needs tabs between columns, rename it to .csv if it uses another separator"
    return f"it has {columns_listed(columns)} (choose with {flag})"


def columns_listed(columns: Iterable[str]) -> str:
    """Column names for an error, as a flag takes them: a name with a comma in quotes."""
    return listed([join_names([name]) for name in columns])


NAMES = {"validation": ("validation", "valid", "val", "dev")}
"""Other names for a split."""


def named(split: str, names: Sequence[str]) -> str | None:
    """Find a split among these names; None if it is missing."""
    return next((name for name in NAMES.get(split, (split,)) if name in names), None)


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a folder for this split; a text file counts only if it is the only one and has tags."""
    names = NAMES.get(split, (split,))
    stems = (
        [path for path in sorted(folder.iterdir()) if stem(path) in names and path.is_file()] if folder.is_dir() else []
    )
    found = [path for name in names for path in stems if stem(path) == name and ending(path) in SUFFIXES]
    return found or [path for path in stems if ending(path) == TEXT and holds_tags(path)]


def split_file(folder: Path, split: str) -> Path:
    """The file of a folder for this split.

    Raises:
        DataError: there is no such file, or more than one.
    """
    if folder.is_file():
        raise DataError(f"--data-dir: {folder} is a file; pass it as --{split}-file")
    if not folder.is_dir():
        raise DataError(f"--data-dir: {folder}: no such folder")
    found = split_files(folder, split)
    if len(found) != 1:
        names = ", ".join(f"{split}{suffix}" for suffix in (*SUFFIXES, TEXT))
        problem = f"holds {' and '.join(path.name for path in found)}" if found else "holds none"
        raise DataError(f"--data-dir: expected one of {names} in {folder}, which {problem}")
    return found[0]


def is_saved(folder: Path) -> bool:
    """Whether a folder was saved by `datasets` (`save_to_disk`)."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_splits(folder: Path) -> list[str]:
    """The split names of a folder saved by `datasets`.

    Raises:
        DataError: the folder is damaged.
    """
    with _reading(str(folder)):
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(folder))
        return list(saved) if isinstance(saved, DatasetDict) else [WHOLE]


def saved_table(folder: Path, split: str) -> Table:
    """Read a split of a folder saved by `datasets`.

    Raises:
        DataError: the folder is damaged, or has no such split.
    """
    with _reading(str(folder)):
        from datasets import DatasetDict, load_from_disk

        saved: Any = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        saved = {WHOLE: saved}
    if split not in saved:
        raise DataError(f"{folder} has no split '{split}'; it has {', '.join(map(str, saved))} (choose with --train-split or --validation-split)")  # fmt: skip
    return _of_dataset(saved[split], f"{folder} ({split})")


def hub_splits(name: str, config: str | None) -> list[str]:
    """The split names of a dataset on the Hub.

    Raises:
        DataError: the dataset is neither in the cache nor on the Hub.
    """
    from datasets import get_dataset_split_names

    found: list[str] = _from_hub(name, lambda: get_dataset_split_names(name, config))
    return found


def hub_table(name: str, config: str | None, split: str) -> Table:
    """Read a split of a dataset on the Hub, from the cache if possible.

    Raises:
        DataError: the dataset is neither in the cache nor on the Hub.
    """
    from datasets import load_dataset

    origin = f"{name} ({config + ', ' if config else ''}{split})"
    return _of_dataset(_from_hub(origin, lambda: load_dataset(name, config, split=split), name), origin)


def _from_hub(origin: str, load: Callable[[], Any], name: str | None = None) -> Any:
    """Load from the cache of `datasets`, or else from the Hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with contextlib.suppress(Exception), _quiet_datasets(), _cache_only():
        return load()
    try:
        HfApi().dataset_info(
            name or origin, timeout=patience()
        )  # fails at once, while `datasets` would retry for half a minute
        with _quiet_datasets():
            return load()
    except Exception as error:  # the Hub client, `datasets` and pyarrow each raise their own errors
        if isinstance(error, OfflineModeIsEnabled):
            why, way = f", and {NOT_ASKED}", "turn it off once"
        else:
            why, way = f" and cannot be downloaded ({unanswered(error)})", "connect once"
        raise DataError(f"the dataset {origin} is not in the cache{why}; {way}, or pass --data-dir") from error


@contextmanager
def _reading(folder: str) -> Iterator[None]:
    try:
        with _quiet_datasets():
            yield
    except Exception as error:  # `datasets` and pyarrow each raise their own errors
        raise DataError(f"{folder}: invalid saved dataset ({str(error).splitlines()[0]})") from error


@contextmanager
def _cache_only() -> Iterator[None]:
    """Make `datasets` read from its cache without asking the Hub, so that a second use works offline."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silence progress bars and logs of `datasets` and the Hub client."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    level, hub_level = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_logging.set_verbosity(hub_logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if not bars:
            datasets.enable_progress_bars()
