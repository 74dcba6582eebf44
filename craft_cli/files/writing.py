"""Files that are never half there: each is written beside its place and moved there when whole."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from craft_cli.errors import FileError

LOCK_FILE = ".lock"
"""In a folder that one process at a time may write."""


def cache_folder(given: str | Path | None = None) -> Path:
    """Where craft keeps what it can make again: `~/.cache/craft` (or below XDG_CACHE_HOME) without.

    Raises:
        FileError: there is no home directory (a user id without a name).
    """
    if given:
        return Path(given).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "craft"
    except RuntimeError:
        raise FileError(
            "cannot use the cache folder: this user has no home directory; give --cache-dir, or set HOME or XDG_CACHE_HOME"
        ) from None


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; a failure leaves the former file whole.

    Raises:
        FileError: it cannot be written (disk full, no permission).
    """
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that replaces it when the block ends well; a failure leaves the former one whole.

    Raises:
        FileError: it cannot be written (disk full, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut, as `fsync` does for the contents of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot; a full disk was noticed when writing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` as indented JSON."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def cannot_write(path: Path, error: Exception) -> FileError:
    """One line for a failed write: the reason, and that nothing was lost."""
    reason = getattr(error, "strerror", None) or str(error)
    return FileError(f"cannot write {path}: {reason}; free space or choose another place (what was there is untouched)")
