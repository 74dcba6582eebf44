"""Decode lines of text: UTF-8, or UTF-16 as written by Windows, with any of the three line endings."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

from craft_cli.errors import DataError

STDIN = "standard input"
"""Its name in messages."""

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FIRST = 1 << 16
"""Bytes to read for detecting encoding and line ending; a first line is rarely longer."""
_UNDECODED = re.compile("[\udc80-\udcff]")
"""Characters that `surrogateescape` decodes invalid UTF-8 to; valid UTF-8 never contains them."""


def lines_of(file: BinaryIO, origin: str) -> Iterator[tuple[int, str]]:
    r"""Decode lines with their numbers and line endings, without a byte order mark; the file stays open.

    The line ending of most of the first lines is used throughout: in a file with `\n`, a lone `\r` is part of its line.

    Raises:
        DataError: the bytes are not text; `origin` names the file.
    """
    start = _peek(file)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), _unmarked(start))
    strict = "strict" if encoding.startswith("utf-16") else "surrogateescape"
    text = io.TextIOWrapper(file, encoding, errors=strict, newline=_line_end(start.decode(encoding, "replace")))
    number = 0
    try:
        for number, line in enumerate(text, start=1):
            if not line.isascii() and _UNDECODED.search(line):
                way = f"convert the file (of Windows: iconv -f cp1252 -t utf-8 {origin} > NEW)"
                if origin == STDIN:
                    way = "convert it first (of Windows: pipe it through iconv -f cp1252 -t utf-8)"
                raise DataError(f"{origin}, line {number}: not UTF-8; {way}")
            yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}, after line {number}: invalid UTF-16, although the file starts as UTF-16") from error
    finally:
        with suppress(ValueError):  # already closed
            text.detach()


def _peek(file: BinaryIO) -> bytes:
    """Peek at the first bytes; for a pipe, those received so far."""
    if file.seekable():
        here = file.tell()
        start = file.read(_FIRST)
        file.seek(here)
        return start
    return file.peek(_FIRST) if isinstance(file, io.BufferedReader) else b""


def _unmarked(start: bytes) -> str:
    """Whether this is UTF-16 without a byte order mark: every ASCII character comes with a zero byte."""
    if len(start) >= 4 and not start[1] and not start[3] and start[0] and start[2]:
        return "utf-16-le"
    if len(start) >= 4 and not start[0] and not start[2] and start[1] and start[3]:
        return "utf-16-be"
    return "utf-8"


def _line_end(start: str) -> str:
    """Whether lines end with a lone carriage return, as on old Macs; one inside quotes does not count."""
    unquoted = re.sub('"[^"]*"', "", start)
    alone = re.findall(r"\r(?!\n)", unquoted)
    return "\r" if len(alone) > unquoted.count("\n") else "\n"
