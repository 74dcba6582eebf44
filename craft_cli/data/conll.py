"""CoNLL: a word a line with its tag in the last column, an empty line between sentences."""

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
"""How the comments of CoNLL-U and of MultiCoNER begin."""


def holds_tags(path: Path) -> bool:
    """Whether a text file begins with words and their tags, as CoNLL's do, and not with texts."""
    if not path.is_file():
        return False
    with opened(path) as file:
        try:
            lines = [text.split() for _, text in islice(lines_of(file, str(path)), 200)]
        except DataError:
            return False
    return any(len(line) > 1 and re.fullmatch(_TAG, line[-1]) for line in lines)


def sentences(lines: Iterable[tuple[int, str]], origin: str) -> Iterator[Row]:
    """Rows of `tokens` and `tags`; without a second column there are no tags.

    Lines of `-DOCSTART-` divide documents; comments before a sentence (`# id ...`, `# text = ...`) are left out.

    Raises:
        DataError: a word without a tag among words with one, other columns than on the first line, columns that are no words.
    """
    words: list[str] = []
    tags: list[str] = []
    start, tagged = 0, None
    shape: tuple[int, int] | None = None  # columns of the first line, and how many of them are filled
    for number, text in chain(lines, [(0, "")]):
        line = text.strip(" \t\r\n")
        if not words and _is_comment(line):
            continue
        if line and not line.startswith("-DOCSTART-"):
            fields = _fields(text, f"{origin}, line {number}")
            if tagged is None:
                tagged = len(fields) > 1
            if tagged != (len(fields) > 1):
                found = "has none" if tagged else f"has one, '{fields[-1]}'"
                raise DataError(f"{origin}, line {number}: every word needs a tag in the last column, or none; '{fields[0]}' {found}")  # fmt: skip
            found_shape = len(fields), sum(map(bool, fields))
            shape = shape or found_shape
            if not any(map(int.__eq__, shape, found_shape)):
                raise DataError(f"{origin}, line {number}: {len(fields)} columns, where the lines before it have {shape[0]}; is its tag missing?")  # fmt: skip
            start = start or number
            words.append(fields[0])
            tags += [fields[-1]] if tagged else []
        elif words:
            if len(words) > 2 and tagged and words == [str(place) for place in range(1, len(words) + 1)]:
                raise DataError(
                    f"{origin}, line {start}: its first column numbers the words, as CoNLL-U does; write each word first and its "
                    "tag last"
                )
            yield Row(f"line {start}", {"tokens": words, "tags": tags} if tagged else {"tokens": words})
            words, tags, start = [], [], 0


def _is_comment(line: str) -> bool:
    """Whether a line before a sentence is none of its words, as `# O` is one."""
    fields = line.split()
    if not line.startswith("#") or len(fields) < 2:
        return False
    if re.fullmatch(_TAG, fields[-1]) and (len(fields) == 2 or not _KEY.match(line)):
        return False
    return bool(_KEY.match(line)) or (line.startswith("# ") and len(fields) > 2)


def _fields(text: str, place: str) -> list[str]:
    """The columns of a line, divided by tabs, or by blanks where there is no tab."""
    line = text.rstrip("\r\n")
    if "\r" in line:
        raise DataError(f"{place}: a carriage return inside of it; convert the file with: tr '\\r' '\\n'")
    fields = [field.strip(" ") for field in line.split("\t")] if "\t" in line else re.split(" +", line.strip(" "))
    if not fields[0] or not fields[-1]:
        raise DataError(f"{place}: {'a tag without a word' if not fields[0] else 'a tab without a tag behind it'}")
    if " " in fields[0] and len(fields) > 1:
        raise DataError(f"{place}: '{fields[0]}' is divided by blanks, and by a tab from its tag; use one of them")
    return fields
