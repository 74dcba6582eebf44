"""Files of rows as they lie on disk: the format and the split that a name tells, and gzip unpacked while it is read."""

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
"""A file that unpacks to more bytes than `_PLENTY` may not be more than `_MOST_TIMES` as large as it is packed."""


def ending(path: Path) -> str:
    """The ending that names the format: `.csv` of `train.csv` and of `Train.CSV.gz`."""
    last = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower()
    return inner if last == GZIP and inner and inner != ".parquet" else last  # parquet is packed inside


def stem(path: Path) -> str:
    """The name without the endings: `train` of `train.csv` and of `train.csv.gz`."""
    return path.with_suffix("").stem if ending(path) != path.suffix.lower() else path.stem


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where its name ends in .gz.

    Raises:
        DataError: while it is read: it is not gzip, is damaged, or unpacks to far more than data does.
    """
    with open(path, "rb") as file:
        if path.suffix.lower() != GZIP:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield io.BufferedReader(_Bounded(unpacked, path), _BUFFER)


class _Bounded(io.RawIOBase):
    """What gzip unpacks, and not without end."""

    def __init__(self, file: gzip.GzipFile, path: Path) -> None:
        self._file, self._path, self._read = file, path, 0
        self._most = max(_PLENTY, _MOST_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._file.readinto(buffer)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{self._path}: not readable as gzip ({error})") from error
        self._read += count
        if self._read > self._most:
            raise DataError(
                f"{self._path} unpacks to more than {_MOST_TIMES} times its size, as no rows of data do: "
                "if it is right, unpack it yourself"
            )
        return count
