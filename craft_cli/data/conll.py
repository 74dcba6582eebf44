"""The CoNLL format: one word per line with its tag in the last column, and an empty line between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from craft_cli.data.cells import Row
from craft_cli.data.lines import lines_of
from craft_cli.data.opened import opened
from craft_cli.errors import DataError

_TAG = r"O|[BIESLUM][-_].+"
_KEY = re.compile(r"#\s*[\w.:-]+\s*=|#\s*(new(doc|par)|id)\b")
"""Start of a comment in CoNLL-U and MultiCoNER."""


def holds_tags(path: Path) -> bool:
    """Whether a text file starts with tagged words, as in CoNLL, rather than with texts."""
    if not path.is_file():
        return False
    with opened(path) as file:
        try:
            lines = [text.split() for _, text in islice(lines_of(file, str(path)), 200)]
        except DataError:
            return False
    return any(len(line) > 1 and re.fullmatch(_TAG, line[-1]) for line in lines)


def sentences(lines: Iterable[tuple[int, str]], origin: str) -> Iterator[Row]:
    """Read rows of `tokens` and `tags`; without a second column there are no tags.

    `-DOCSTART-` lines separate documents. Comments before a sentence (`# id ...`, `# text = ...`) are skipped.

    Raises:
        DataError: a tag is missing, the number of columns changes, or the first column does not hold words.
    """
    words: list[str] = []
    tags: list[str] = []
    start, tagged = 0, None
    shape: tuple[int, int] | None = None  # columns of the first line, and how many are not empty
    for number, text in chain(lines, [(0, "")]):
        line = text.strip(" \t\r\n")
        if not words and _is_comment(line):
            continue
        if line and not line.startswith("-DOCSTART-"):
            fields = _fields(text, f"{origin}, line {number}")
            if tagged is None:
                tagged = len(fields) > 1
            if tagged != (len(fields) > 1):
                problem = "has none" if tagged else f"has one, '{fields[-1]}'"
                raise DataError(f"{origin}, line {number}: every word needs a tag in the last column, or none; '{fields[0]}' {problem}")  # fmt: skip
            found_shape = len(fields), sum(map(bool, fields))
            shape = shape or found_shape
            if not any(map(int.__eq__, shape, found_shape)):
                raise DataError(f"{origin}, line {number}: {len(fields)} columns, but the lines before it have {shape[0]}; is its tag missing?")  # fmt: skip
            start = start or number
            words.append(fields[0])
            tags += [fields[-1]] if tagged else []
        elif words:
            if len(words) > 2 and tagged and words == [str(place) for place in range(1, len(words) + 1)]:
                raise DataError(
                    f"{origin}, line {start}: the first column holds word numbers, as in CoNLL-U; put the word first and its "
                    "tag last"
                )
            yield Row(f"line {start}", {"tokens": words, "tags": tags} if tagged else {"tokens": words})
            words, tags, start = [], [], 0


def _is_comment(line: str) -> bool:
    """Whether a line before a sentence is a comment; `# O` is a tagged word."""
    fields = line.split()
    if not line.startswith("#") or len(fields) < 2:
        return False
    if re.fullmatch(_TAG, fields[-1]) and (len(fields) == 2 or not _KEY.match(line)):
        return False
    return bool(_KEY.match(line)) or (line.startswith("# ") and len(fields) > 2)


def _fields(text: str, place: str) -> list[str]:
    """Split a line into columns at tabs, or at spaces if it has no tab."""
    line = text.rstrip("\r\n")
    if "\r" in line:
        raise DataError(f"{place}: the line contains a carriage return; convert the file with: tr '\\r' '\\n'")
    fields = [field.strip(" ") for field in line.split("\t")] if "\t" in line else re.split(" +", line.strip(" "))
    if not fields[0] or not fields[-1]:
        raise DataError(f"{place}: {'a tag without a word' if not fields[0] else 'a tab without a tag after it'}")
    if " " in fields[0] and len(fields) > 1:
        raise DataError(f"{place}: columns are separated by spaces ('{fields[0]}') and by a tab; use one of them")
    return fields
