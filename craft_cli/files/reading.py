"""Reads of files that may be damaged or come from an untrusted source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from craft_cli.errors import FileError

_TRIES = 50
T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        FileError: the file does not exist or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except PermissionError as error:
        raise cannot_read(path, error) from error
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged or not JSON ({reason_of(error)})") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} is damaged: it is not a JSON object")
    return content


def read_content(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        FileError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> FileError:
    """The error for an existing file that cannot be read, such as another user's."""
    return FileError(f"cannot read {path}: {error.strerror or error}")


def quoted(value: Any, most: int = 80) -> str:
    """Format a value from an untrusted file for a message: printable and short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def reason_of(error: BaseException) -> str:
    """Format a reader's error as one short line; the error may quote the file, or be empty."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(line.split())[:200] or type(error).__name__


@contextmanager
def entries_of(path: Path) -> Iterator[None]:
    """Report a missing or invalid entry of a file's header or tensors as damage.

    Raises:
        FileError: the block raised a KeyError, TypeError or ValueError.
    """
    try:
        yield
    except KeyError as error:
        raise FileError(f"{path} is damaged: {error} is missing") from error
    except TypeError as error:
        raise FileError(f"{path} is damaged: its header holds a value of the wrong type") from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: {error}") from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in chunks.

    Raises:
        FileError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise cannot_read(path, error) from error


def stamp(path: Path) -> list[int]:
    """What identifies an unchanged file: device, inode, size, and the times of the last changes.

    Raises:
        FileError: the file does not exist.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def stamp_or_none(path: Path) -> list[int] | None:
    """The stamp of a file; None if it does not exist."""
    try:
        return stamp(path)
    except FileError:
        return None


def read_unchanged(path: Path, identity: Callable[[], Any], read: Callable[[], T]) -> T:
    """Read a file or folder that another process may be replacing, again if it was replaced in the meantime.

    Args:
        path: the file or folder, for messages.
        identity: returns what differs once it is replaced.
        read: reads it.

    Raises:
        FileError: `read` raised it for an unchanged file or folder; or it keeps being replaced.
    """
    for _ in range(_TRIES):
        before = identity()
        try:
            result = read()
        except FileError:
            if identity() == before:
                raise
        else:
            if identity() == before:
                return result
    raise FileError(f"{path} keeps being replaced by another process; try again later")
