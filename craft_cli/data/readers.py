"""Rows out of files, one after another: jsonl, json, csv, tsv, parquet, CoNLL and plain text, from a path or stdin.

One reader serves training and prediction. It never holds a file whole (but json, which is one value), names the line of
whatever it cannot read, and keeps every cell of a csv as the text it is: "007" stays "007" and "NA" stays "NA".
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from craft_cli.errors import DataError

CONLL = ".conll"
"""A word a line with its tag in the last column, an empty line between sentences: rows of `tokens` and `tags`."""
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", CONLL)
TEXT = ".txt"
"""A text a line for prediction, which needs no labels; CoNLL where labels are needed."""

_DIALECTS: dict[str, Any] = {
    ".csv": {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL, "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},  # as GLUE's files: a quote is a character
}


class Row(NamedTuple):
    """One row: where it stands (`line 3`, or `row 3` where there are no lines), and its cells by column."""

    place: str
    cells: dict[str, Any]


def read_rows(path: Path, kinds: Sequence[str] = SUFFIXES, kind: str | None = None) -> Iterator[Row]:
    """The rows of a file whose name ends in one of `kinds`, in the format of that ending or of `kind`.

    Raises:
        DataError: it is missing, empty, of an unknown kind, or a row cannot be read (file and line named).
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in kinds:
        raise DataError(f"{path}: unknown kind of file; use one of {', '.join(kinds)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    with open(path, "rb") as file:
        yield from rows_of(file, kind or path.suffix, str(path))


def read_stdin(kind: str) -> Iterator[Row]:
    """The rows of standard input, in the format of files with the ending `kind`."""
    return rows_of(sys.stdin.buffer, kind, "standard input")


def rows_of(file: BinaryIO, kind: str, origin: str) -> Iterator[Row]:
    """The rows of an open file.

    Args:
        file: opened for bytes.
        kind: ending that names the format.
        origin: what messages call it.

    Raises:
        DataError: a row cannot be read.
    """
    if kind == ".parquet":
        return _parquet(file, origin)
    if kind == ".json":
        return _json(file, origin)
    lines = _lines(file, origin)
    if kind == ".jsonl":
        return _jsonl(lines, origin)
    if kind in _DIALECTS:
        return _separated(lines, kind, origin)
    if kind == CONLL:
        return _conll(lines, origin)
    return (Row(f"line {number}", {"text": text.rstrip("\r\n")}) for number, text in lines)


def _lines(file: Iterable[bytes], origin: str) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers, without a byte order mark."""
    for number, line in enumerate(file, start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{origin}, line {number}: not UTF-8; convert the file with: iconv -f latin1 -t utf8 {origin}"
            ) from error


def _jsonl(lines: Iterable[tuple[int, str]], origin: str) -> Iterator[Row]:
    for number, text in lines:
        if text.strip():
            try:
                cells = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{origin}, line {number}: not JSON ({error})") from error
            if not isinstance(cells, dict):
                raise DataError(f"{origin}, line {number}: expected a JSON object for each line")
            yield Row(f"line {number}", cells)


def _json(file: BinaryIO, origin: str) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(file, origin))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON ({error}); a JSON object a line is .jsonl") from error
    if not isinstance(content, list):
        raise DataError(f"{origin}: expected a JSON list of objects")
    for number, cells in enumerate(content, start=1):
        if not isinstance(cells, dict):
            raise DataError(f"{origin}, row {number}: expected a JSON object")
        yield Row(f"row {number}", cells)


def _separated(lines: Iterable[tuple[int, str]], kind: str, origin: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a row may be long
    reader = csv.reader((text for _, text in lines), **_DIALECTS[kind])
    start = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{origin}, line 1: the header names a column twice")
        start = reader.line_num + 1
        for fields in reader:
            if len(fields) != len(header) and fields:
                raise DataError(f"{origin}, line {start}: {len(fields)} fields, but the header names {len(header)}")
            if fields:
                yield Row(f"line {start}", dict(zip(header, fields, strict=True)))
            start = reader.line_num + 1
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
        raise DataError(f"{origin}, line {start}: {reason}") from error


def holds_tags(path: Path) -> bool:
    """Whether a text file begins with words and their tags, as CoNLL's do, and not with texts."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        lines = [line.split() for line in islice(file, 200)]
    return any(len(line) > 1 and re.fullmatch(rb"O|[BIESLU][-_].+", line[-1]) for line in lines)


def _conll(lines: Iterable[tuple[int, str]], origin: str) -> Iterator[Row]:
    """The sentences of a file; without a second column they have no tags. Lines of `-DOCSTART-` divide documents."""
    words: list[str] = []
    tags: list[str] = []
    start, tagged = 0, None
    for number, text in chain(lines, [(0, "")]):
        line = text.strip(" \t\r\n")
        if line and not line.startswith("-DOCSTART-"):
            fields = _fields(text, f"{origin}, line {number}")
            if tagged is None:
                tagged = len(fields) > 1
            if tagged != (len(fields) > 1):
                found = "has none" if tagged else f"has one, '{fields[-1]}'"
                raise DataError(f"{origin}, line {number}: every word needs a tag in the last column, or none; '{fields[0]}' {found}")  # fmt: skip
            start = start or number
            words.append(fields[0])
            tags += [fields[-1]] if tagged else []
        elif words:
            yield Row(f"line {start}", {"tokens": words, "tags": tags} if tagged else {"tokens": words})
            words, tags, start = [], [], 0


def _fields(text: str, place: str) -> list[str]:
    """The columns of a line, divided by tabs, or by blanks where there is no tab."""
    line = text.rstrip("\r\n")
    if "\r" in line:
        raise DataError(f"{place}: its line ends are carriage returns alone; convert the file with: tr '\\r' '\\n'")
    fields = [field.strip(" ") for field in line.split("\t")] if "\t" in line else re.split(" +", line.strip(" "))
    if not fields[0] or not fields[-1]:
        raise DataError(f"{place}: {'a tag without a word' if not fields[0] else 'a tab without a tag behind it'}")
    return fields


def _parquet(file: BinaryIO, origin: str) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for cells in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", cells)
    except (ArrowException, OSError) as error:
        raise DataError(f"{origin}: not readable as parquet ({str(error).strip().splitlines()[0]})") from error
