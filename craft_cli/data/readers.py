"""Read rows one by one: jsonl, json, csv, tsv, parquet, CoNLL and plain text, from a path or stdin.

All formats but parquet can be compressed with gzip (`train.csv.gz`).

Training and prediction use the same reader. It streams the file (except json, which is one value), names the line of each
error, and keeps csv cells as text: "007" stays "007" and "NA" stays "NA". Only an empty cell is missing.
"""

from __future__ import annotations

import csv
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from craft_cli.data import conll, json_rows
from craft_cli.data.cells import Row, plain
from craft_cli.data.lines import STDIN, lines_of
from craft_cli.data.opened import ending, opened
from craft_cli.errors import DataError
from craft_cli.files import reason_of

CONLL = ".conll"
"""CoNLL extension: one word per line with its tag in the last column, read as rows of `tokens` and `tags`."""
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", CONLL)
TEXT = ".txt"
"""Plain text extension: one text per line for prediction; CoNLL if labels are needed."""

MARKS = ",;\t|"
"""Possible column separators of a .csv file; a .tsv file uses tabs."""
_DIALECTS: dict[str, Any] = {
    ".csv": {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL, "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},  # as in GLUE: quotes are ordinary characters
}


def read_rows(path: Path, kinds: Sequence[str] = SUFFIXES, kind: str | None = None) -> Iterator[Row]:
    """Read a file with one of the extensions `kinds`, in the format of the extension or of `kind`.

    Raises:
        DataError: the file is missing, empty or of an unknown format, or a row is invalid (names file and line).
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; pass a file in it, or train with --data-dir {shlex.quote(str(path))}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if ending(path) not in kinds:
        raise DataError(f"{path}: unknown file format; supported: {', '.join(kinds)} (also with .gz, except .parquet)")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    with opened(path) as file:
        yield from rows_of(file, kind or ending(path), str(path))


def read_stdin(kind: str) -> Iterator[Row]:
    """Read standard input in the format of files with the extension `kind`.

    Raises:
        DataError: standard input is closed.
    """
    if sys.stdin is None:
        raise DataError("standard input is closed; pass a file with --input")
    return rows_of(sys.stdin.buffer, kind, STDIN)


def rows_of(file: BinaryIO, kind: str, origin: str) -> Iterator[Row]:
    """Read an open file.

    Args:
        file: file opened in binary mode.
        kind: extension that names the format.
        origin: name of the file in messages.

    Raises:
        DataError: a row is invalid.
    """
    if kind == ".parquet":
        return _parquet(file, origin)
    lines = lines_of(file, origin)
    if kind == ".json":
        return json_rows.rows(lines, origin)
    if kind == ".jsonl":
        return json_rows.objects(lines, origin)
    if kind in _DIALECTS:
        return _separated(lines, kind, origin)
    if kind == CONLL:
        return conll.sentences(lines, origin)
    return (Row(f"line {number}", {"text": text.rstrip("\r\n")}) for number, text in lines)


def _separated(lines: Iterable[tuple[int, str]], kind: str, origin: str) -> Iterator[Row]:
    """Read rows with a header; empty cells are None, and column names are stripped of whitespace."""
    csv.field_size_limit(2**31 - 1)  # the default limit is too small for long texts
    lines = iter(lines)
    number, first = next(lines, (1, ""))
    dialect = dict(_DIALECTS[kind]) | (_as_in_header(first) if kind == ".csv" else {})
    reader = csv.reader((text for _, text in chain([(number, first)], lines)), **dialect)
    start = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        named = [name for name in header if name]  # unnamed columns cannot be selected
        if len(set(named)) < len(named):
            raise DataError(f"{origin}, line 1: the header names a column twice")
        start = reader.line_num + 1
        for fields in reader:
            if len(fields) != len(header) and fields:
                raise DataError(f"{origin}, line {start}: {len(fields)} fields, but the header names {len(header)}")
            if fields:
                cells = zip(header, fields, strict=True)
                yield Row(f"line {start}", {name: cell if cell else None for name, cell in cells if name})
            start = reader.line_num + 1
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
        raise DataError(f"{origin}, line {start}: {reason}") from error


def _as_in_header(line: str) -> dict[str, Any]:
    """The most frequent separator in the header. Excel writes semicolons; some files have a space after each comma."""
    line = re.sub('"[^"]*"', "", line)
    delimiter = max(MARKS, key=line.count)
    blank = f"{delimiter} "
    return {"delimiter": delimiter, "skipinitialspace": line.count(delimiter) == line.count(blank) > 0}


def _parquet(file: BinaryIO, origin: str) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        opened = parquet.ParquetFile(file)
        names = opened.schema_arrow.names
        if len(set(names)) < len(names):
            raise DataError(f"{origin}: two columns have the same name")
        for batch in opened.iter_batches(batch_size=1000):
            for cells in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", plain(cells))
    except (ArrowException, OSError) as error:
        raise DataError(f"{origin}: invalid parquet ({reason_of(error)})") from error
