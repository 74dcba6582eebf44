"""Open data files: format and split from the file name, gzip decompressed on the fly."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from craft_cli.errors import DataError

GZIP = ".gz"
_BUFFER = 1 << 16
_PLENTY, _MOST_TIMES = 100_000_000, 100
"""Limits against decompression bombs: beyond `_PLENTY` bytes, the ratio must not exceed `_MOST_TIMES`."""


def ending(path: Path) -> str:
    """The file extension that names the format: `.csv` for `train.csv` and `Train.CSV.gz`."""
    last = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower()
    return inner if last == GZIP and inner and inner != ".parquet" else last  # parquet compresses internally


def stem(path: Path) -> str:
    """The file name without extensions: `train` for `train.csv` and `train.csv.gz`."""
    return path.with_suffix("").stem if ending(path) != path.suffix.lower() else path.stem


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file as bytes, decompressed if its name ends in .gz.

    Raises:
        DataError: while reading, if it is not gzip, is damaged, or looks like a decompression bomb.
    """
    with open(path, "rb") as file:
        if path.suffix.lower() != GZIP:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield io.BufferedReader(_Bounded(unpacked, path), _BUFFER)


class _Bounded(io.RawIOBase):
    """A gzip reader with a limit on the decompressed size."""

    def __init__(self, file: gzip.GzipFile, path: Path) -> None:
        self._file, self._path, self._read = file, path, 0
        self._most = max(_PLENTY, _MOST_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._file.readinto(buffer)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{self._path}: invalid gzip ({error})") from error
        self._read += count
        if self._read > self._most:
            raise DataError(
                f"{self._path} decompresses to more than {_MOST_TIMES} times its size, which is unusual for data; "
                "if it is correct, decompress it yourself"
            )
        return count
