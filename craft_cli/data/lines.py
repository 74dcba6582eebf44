"""Lines of text out of bytes: UTF-8, or UTF-16 as Windows writes it, with any of the three line ends."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

from craft_cli.errors import DataError

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FIRST = 1 << 16
"""So many bytes tell encoding and line end; a first line is hardly ever longer."""
_UNDECODED = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of bytes that are not UTF-8; UTF-8 itself cannot give these."""


def lines_of(file: BinaryIO, origin: str) -> Iterator[tuple[int, str]]:
    r"""Decoded lines with their numbers and ends, without a byte order mark; the file stays open.

    What ends most of the first lines ends every line: inside a file of `\n`, a lone `\r` is a character of its line.

    Raises:
        DataError: bytes that are no text; `origin` names the file.
    """
    start = _peek(file)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), _unmarked(start))
    strict = "strict" if encoding.startswith("utf-16") else "surrogateescape"
    text = io.TextIOWrapper(file, encoding, errors=strict, newline=_line_end(start.decode(encoding, "replace")))
    number = 0
    try:
        for number, line in enumerate(text, start=1):
            if not line.isascii() and _UNDECODED.search(line):
                raise DataError(
                    f"{origin}, line {number}: not UTF-8; convert the file (of Windows: iconv -f cp1252 -t utf-8 {origin} > NEW)"
                )
            yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}, after line {number}: not readable as UTF-16, as it begins") from error
    finally:
        with suppress(ValueError):  # closed before
            text.detach()


def _peek(file: BinaryIO) -> bytes:
    """The first bytes, without taking them; of a pipe what has come so far."""
    if file.seekable():
        here = file.tell()
        start = file.read(_FIRST)
        file.seek(here)
        return start
    return file.peek(_FIRST) if isinstance(file, io.BufferedReader) else b""


def _unmarked(start: bytes) -> str:
    """UTF-16 without its mark has a zero beside every plain character."""
    if len(start) >= 4 and not start[1] and not start[3] and start[0] and start[2]:
        return "utf-16-le"
    if len(start) >= 4 and not start[0] and not start[2] and start[1] and start[3]:
        return "utf-16-be"
    return "utf-8"


def _line_end(start: str) -> str:
    """A carriage return alone, as old Macs wrote, where there are not more lines of the usual kind; in quotes it ends none."""
    unquoted = re.sub('"[^"]*"', "", start)
    alone = re.findall(r"\r(?!\n)", unquoted)
    return "\r" if len(alone) > unquoted.count("\n") else "\n"
