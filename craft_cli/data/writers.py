"""Write predictions, one JSON object or csv line per example."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from craft_cli.config.names import join_names
from craft_cli.data.cells import for_spreadsheets
from craft_cli.errors import ConfigError, as_json, is_utf8
from craft_cli.files import whole_file

FORMATS = ("jsonl", "csv")
SCORES = "scores"
"""The field of a record that csv splits into one column per label."""


class RecordWriter:
    """Write records to an open text file in one of `FORMATS`."""

    def __init__(self, file: TextIO, kind: str) -> None:
        self._file, self._kind = file, kind
        self._headed = False

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows and flush."""
        for row in rows:
            if self._kind == "jsonl":
                self._file.write(as_json(row, ascii=not is_utf8(self._file)) + "\n")
            else:
                self._write_csv(row)
        self._file.flush()

    def _write_csv(self, row: dict[str, Any]) -> None:
        cells = {name: value for name, value in parts_of(row).items() if name != SCORES}
        if not self._headed:
            self._file.write(csv_line(cells))
            self._headed = True
        self._file.write(csv_line(map(_cell, cells.values())))


def parts_of(record: dict[str, Any]) -> dict[str, Any]:
    """Field names of a record in any format: the scores together, and each of them as in csv."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        found[name] = value
        if name == SCORES:
            found |= {f"score_{label}": score for label, score in value.items()}
    return found


def csv_line(cells: Iterable[Any]) -> str:
    """A csv line that is safe in a spreadsheet. Cells with a carriage return are quoted, which csv does only for its own line ending."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(map(for_spreadsheets, cells))
    return text.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> Any:
    """Comma-separated names, quoted if they contain a comma; nested values as JSON."""
    if isinstance(value, dict):
        return as_json(value)
    if not isinstance(value, list):
        return value
    named = all(isinstance(part, str) for part in value)
    return join_names(value) if named else as_json(value)


def format_of(path: Path, given: str | None = None) -> str:
    """The format of a predictions file: the one given, or that of its extension.

    Raises:
        ConfigError: the format is unknown.
    """
    kind = given or path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ConfigError(f"{path}: predictions are written as {' or '.join('.' + name for name in FORMATS)}")
    return kind


@contextmanager
def open_records(path: Path, kind: str) -> Iterator[RecordWriter]:
    """Open a writer to a file that is replaced atomically; on failure the previous file stays intact.

    Raises:
        FileError: the file cannot be written.
    """
    with whole_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        yield RecordWriter(text, kind)
        text.detach()
