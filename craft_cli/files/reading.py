"""Reading what may be damaged or come from a stranger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from craft_cli.errors import FileError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        FileError: there is no such file, or it holds no JSON object.
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
        raise FileError(f"{path} is damaged: it holds no JSON object")
    return content


def read_content(path: Path) -> bytes:
    """All of a file.

    Raises:
        FileError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> FileError:
    """The error for a file that is there and cannot be read, such as another user's."""
    return FileError(f"cannot read {path}: {error.strerror or error}")


def quoted(value: Any, most: int = 80) -> str:
    """Something out of a file that may come from a stranger, for a message: printable and short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def reason_of(error: BaseException) -> str:
    """What a reader says, in one short line: it may quote the file, or say nothing."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(line.split())[:200] or type(error).__name__


@contextmanager
def entries_of(path: Path) -> Iterator[None]:
    """Around what takes entries out of a file's header and tensors: one that is missing or cannot be is damage.

    Raises:
        FileError: so.
    """
    try:
        yield
    except KeyError as error:
        raise FileError(f"{path} is damaged: {error} is missing") from error
    except TypeError as error:
        raise FileError(f"{path} is damaged: its header holds something of another type than expected") from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: {error}") from error


def sha256_of(path: Path) -> str:
    """Of a file of any size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> list[int]:
    """By what a file is known to be the one of before: device, inode, size, and when it was last changed in any way.

    Raises:
        FileError: there is none.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
