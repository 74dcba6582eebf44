"""From files or the hub to rows, and from rows to token ids.

`datasets` reads the files; what it cannot read is named with its file and line.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.errors import DataError
from craft_cli.tasks import OWN, Task, task_named

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_DIALECTS: dict[str, Any] = {
    ".csv": {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},  # as GLUE's files: a quote is a character
}
_COLUMN_GUESSES = (("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"))


@dataclass(frozen=True)
class DataSource:
    """Where rows come from; the fields are the settings of the same names."""

    task: str | None = None
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None

    @classmethod
    def of(cls, settings: Any) -> DataSource:
        """Taken from an object or mapping that has such settings among others."""
        get = settings.get if isinstance(settings, dict) else lambda name: getattr(settings, name)
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


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        texts: for each row one text or two.
        labels: number of each row's label in the task's `labels`.
        origin: file or hub name, for messages.
    """

    texts: list[tuple[str, ...]]
    labels: list[int]
    origin: str

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, rows: int | None) -> Split:
        """Only the first rows."""
        return self if rows is None else Split(self.texts[:rows], self.labels[:rows], self.origin)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one split, not padded.

    Attributes:
        features: for each row the tokenizer's lists (`input_ids` and what the model needs beside them).
        labels: label numbers.
    """

    features: list[dict[str, list[int]]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(feature["input_ids"]) for feature in self.features]


def load_splits(
    source: DataSource, names: Sequence[str], labels: Sequence[str] | None = None
) -> tuple[Task, list[Split]]:
    """The task and its splits.

    Args:
        source: where from.
        names: `train`, `validation`; labels of the user's own data are collected from the first one.
        labels: the label names, where they are known already.

    Raises:
        ConfigError: an unknown task.
        DataError: a file, column, row or label that cannot be used.
    """
    task = task_named(source.task) if source.task else OWN
    tables = [_table(source, task, name) for name in names]
    columns = tables[0][0].column_names
    task = replace(
        task,
        text_columns=source.text_columns or task.text_columns or _guess_columns(columns, tables[0][1]),
        label_column=source.label_column or task.label_column,
        labels=tuple(labels) if labels is not None else task.labels,
    )
    splits = []
    for table, origin in tables:
        for column in (*task.text_columns, task.label_column):
            if column not in table.column_names:
                wanted = "--label-column" if column == task.label_column else "--text-columns"
                raise DataError(
                    f"{origin} has no column '{column}'; it has {', '.join(table.column_names)} (choose with {wanted})"
                )
        texts = list(zip(*(_texts(table[column], column, origin) for column in task.text_columns), strict=True))
        values = list(table[task.label_column])
        if not task.labels:
            task = replace(task, labels=_collect_labels(values, task.label_column, origin))
        splits.append(Split(texts, _label_numbers(values, task, origin), origin))
    return task, splits


def encode(
    split: Split, tokenizer: Any, max_seq_length: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Encoded:
    """Tokenise a split; of a pair the longer text is cut first.

    Args:
        progress: called with (rows done, rows in all).
    """
    limit = min(max_seq_length, tokenizer.model_max_length)
    features: list[dict[str, list[int]]] = []
    for start in range(0, len(split), 1000):
        columns = list(zip(*split.texts[start : start + 1000], strict=True))
        batch = tokenizer(*[list(column) for column in columns], truncation="longest_first", max_length=limit)
        for row in range(len(batch["input_ids"])):
            features.append({name: batch[name][row] for name in batch if name != "attention_mask"})
        progress(len(features), len(split))
    return Encoded(features, split.labels)


def collate(encoded: Encoded, rows: Sequence[int], tokenizer: Any) -> tuple[dict[str, Tensor], Tensor]:
    """A batch, padded to its longest row: model inputs (rows, tokens) and label numbers (rows,)."""
    inputs = tokenizer.pad([encoded.features[row] for row in rows], padding="longest", return_tensors="pt")
    return dict(inputs), torch.tensor([encoded.labels[row] for row in rows])


# -- reading ------------------------------------------------------------------------------------------------------------


def _table(source: DataSource, task: Task, split: str) -> tuple[Any, str]:
    """The rows of a split as a `datasets.Dataset`, and the name to call it in messages."""
    given = source.train_file if split == "train" else source.validation_file
    if given:
        path = Path(given).expanduser()
    elif source.data_dir:
        path = _split_file(Path(source.data_dir).expanduser(), split)
    elif task.sample:
        shipped = Path(__file__).parent / "samples" / task.sample / f"{split}.jsonl"
        return read_file(shipped), f"the shipped sample {task.sample}, {split}"
    elif task.hub:
        return _hub_table(task.hub, split)
    else:
        raise DataError(f"no {split} data: give --data-dir or --{split}-file")
    return read_file(path), str(path)


def _split_file(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"--data-dir: {folder}: no such folder")
    found = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
        problem = f"holds {' and '.join(path.name for path in found)}" if found else "holds none"
        raise DataError(f"--data-dir: expected one of {names} in {folder}, which {problem}")
    return found[0]


def read_file(path: Path) -> Any:
    """A file as a `datasets.Dataset`.

    Raises:
        DataError: it is missing, empty, of an unknown kind, or a row cannot be read (file and line named).
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    from datasets import Dataset, Features, Value

    if path.suffix != ".parquet":
        _check_utf8(path)
    try:
        with _quiet_datasets():
            if path.suffix == ".parquet":
                table = Dataset.from_parquet(str(path))
            elif path.suffix in _DIALECTS:  # every cell is text: "007" stays "007", "NA" stays "NA"
                with open(path, encoding="utf-8-sig", newline="") as file:
                    header = next(csv.reader(file, **_DIALECTS[path.suffix]))
                features = Features({column: Value("string") for column in header})
                options = {
                    "sep" if name == "delimiter" else name: value for name, value in _DIALECTS[path.suffix].items()
                }
                table = Dataset.from_csv(
                    str(path), features=features, keep_default_na=False, encoding="utf-8-sig", **options
                )
            else:
                table = Dataset.from_json(str(path))
    except Exception as error:  # `datasets` wraps what pandas and pyarrow raise, differently for each
        if "corresponds to no data" in str(error):
            raise DataError(f"{path} holds no rows") from error
        raise _unreadable(path, error) from error
    if len(table) == 0:
        raise DataError(f"{path} holds no rows")
    return table


def _hub_table(hub: tuple[str, str], split: str) -> tuple[Any, str]:
    from datasets import load_dataset
    from huggingface_hub import HfApi

    name = f"{hub[0]} ({hub[1]}, {split})"
    with contextlib.suppress(Exception), _quiet_datasets(), _cache_only():
        return load_dataset(*hub, split=split), name
    try:
        HfApi().dataset_info(hub[0], timeout=10)  # fails at once where `datasets` would try again for half a minute
        with _quiet_datasets():
            return load_dataset(*hub, split=split), name
    except Exception as error:  # the hub's HTTP client, `datasets` and pyarrow each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"the data set {name} is not in the cache and cannot be fetched ({reason}): connect once, or give --data-dir"
        ) from error


@contextmanager
def _cache_only() -> Iterator[None]:
    """`datasets` looks in its cache and asks no hub, so that a second use needs none."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No bars and no log lines of `datasets` and the hub's client among our own output."""
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


def _unreadable(path: Path, error: Exception) -> DataError:
    """The file and the line at fault, found by reading it again slowly."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
    if path.suffix == ".jsonl":
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if text.strip():
                try:
                    row = json.loads(text)
                except ValueError as fault:
                    return DataError(f"{path}, line {number}: not JSON ({fault})")
                if not isinstance(row, dict):
                    return DataError(f"{path}, line {number}: expected a JSON object for each line")
    if path.suffix in _DIALECTS:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, **_DIALECTS[path.suffix])
            header = next(reader, [])
            for fields in reader:
                if len(fields) > len(header):
                    return DataError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields, but the header names {len(header)}"
                    )
    return DataError(f"{path}: {reason}")


def _check_utf8(path: Path) -> None:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                raise DataError(
                    f"{path}, line {number}: not UTF-8; convert the file with: iconv -f latin1 -t utf8 {path}"
                ) from None


def _line_of(path: str, row: int) -> str:
    """Where data row `row` (from 0) stands in its file, as well as can be told."""
    if path.endswith(".jsonl") and Path(path).is_file():
        with open(path, encoding="utf-8") as file:
            filled = [number for number, line in enumerate(file, start=1) if line.strip()]
        return f"{path}, line {filled[row]}"
    if Path(path).suffix in _DIALECTS and Path(path).is_file():
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, **_DIALECTS[Path(path).suffix])
            rows = (reader.line_num for fields in reader if fields)
            for _ in range(row + 1):  # the header first
                next(rows)
            return f"{path}, line {next(rows)}"
    return f"{path}, row {row + 1}"


def _texts(values: Sequence[Any], column: str, origin: str) -> list[str]:
    texts = []
    for row, value in enumerate(values):
        if value is None or isinstance(value, (list, dict)):
            problem = "has no text" if value is None else "is a list, not a text,"
            raise DataError(f"{_line_of(origin, row)}: column '{column}' {problem}")
        texts.append(str(value))
    return texts


def _collect_labels(values: Sequence[Any], column: str, origin: str) -> tuple[str, ...]:
    """The distinct labels, numbers in their order and names in alphabetical order."""
    for row, value in enumerate(values):
        if value is None or value == "" or isinstance(value, (list, dict)):
            raise DataError(f"{_line_of(origin, row)}: column '{column}' has no label")
        if _number(value) is not None and not float(value).is_integer():
            raise DataError(f"{origin}: column '{column}' holds real numbers ({value}); craft trains classifiers")
    labels = sorted(
        {_label_name(value) for value in values}, key=lambda name: (_number(name) is None, _number(name) or 0, name)
    )
    if len(labels) < 2:
        raise DataError(
            f"{origin}: column '{column}' holds one label only ({labels[0]}); nothing can be learned from it"
        )
    return tuple(labels)


def _label_numbers(values: Sequence[Any], task: Task, origin: str) -> list[int]:
    numbers = {name: number for number, name in enumerate(task.labels)}
    if task.name != OWN.name:  # a known task's data may hold the numbers themselves
        numbers |= {str(number): number for number in range(len(task.labels))}
    found = []
    for row, value in enumerate(values):
        name = _label_name(value)
        if name not in numbers:
            known = ", ".join(task.labels)
            raise DataError(f"{_line_of(origin, row)}: label '{name}' is not among those trained on ({known})")
        found.append(numbers[name])
    return found


def _label_name(value: Any) -> str:
    """The label as text; 1.0 is label 1."""
    number = _number(value)
    return str(int(number)) if number is not None and number.is_integer() else str(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _guess_columns(columns: Sequence[str], origin: str) -> tuple[str, ...]:
    for guess in _COLUMN_GUESSES:
        if all(column in columns for column in guess):
            return guess
    raise DataError(f"{origin}: which columns hold the text? It has {', '.join(columns)} (choose with --text-columns)")
