"""Files that are never half there: each is written beside its place and moved there when whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from craft_cli.errors import FileError
from craft_cli.files.locks import take, turn
from craft_cli.files.marker import HIDDEN, MARKER, delete_listed

_LINKS = 40
_DESCRIPTORS = re.compile(r"/dev/fd|/proc/[^/]+(/task/[^/]+)?/fd")
_OLD = 24 * 3600
"""Seconds after which, where there are no locks, a hidden part is left over."""


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


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` as indented JSON; of a path that is no UTF-8 the odd bytes are escaped."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that replaces it when the block ends well; a failure leaves the former one whole.

    A link stays and the file it points to is replaced; a former file keeps its permissions. A device, a pipe or
    `/dev/stdout` is written to as it is.

    Raises:
        FileError: it cannot be written (disk full, no permission, a folder, write-protected).
    """
    try:
        if _is_stream(path):
            with open(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        _check_replaceable(path, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _new_part(target)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                with contextlib.suppress(OSError):  # a file system without permissions
                    os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
                os.fsync(descriptor)
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def _is_stream(path: Path) -> bool:
    """Whether a path is no regular file, or stands for an open one, such as /dev/stdout."""
    place = Path(os.path.abspath(path))
    for _ in range(_LINKS):
        folder = os.path.realpath(place.parent)
        if _DESCRIPTORS.fullmatch(folder):
            return True
        if not place.is_symlink():
            return place.exists() and not place.is_file() and not place.is_dir()
        place = Path(folder, os.readlink(place))
    return False


def _check_replaceable(path: Path, target: Path) -> None:
    if target.is_dir():
        raise FileError(f"cannot write {path}: it is a folder; give the name of a file")
    if target.exists() and not os.access(target, os.W_OK):
        raise FileError(f"cannot write {path}: it is write-protected; allow it with chmod, or choose another name")


def _new_part(target: Path) -> tuple[Path, int]:
    """A temporary file for one in this place, open and locked. What a killed process left in this folder is cleared away."""
    with tidied(target.parent):
        name = os.fsencode(target.name)[:200].decode(errors="ignore")  # with ours, no longer than names may be
        temporary = hidden(target.with_name(name), "part")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        take(descriptor)
    return temporary, descriptor


def hidden(path: Path, end: str) -> Path:
    """A name beside `path` that no other process uses, on whatever machine; see `HIDDEN`."""
    return path.with_name(f".{path.name}.craft-{secrets.token_hex(8)}.{end}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut, as `fsync` does for the contents of a file."""
    with contextlib.suppress(OSError):  # some file systems cannot; a full disk was noticed when writing
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cannot_write(path: Path, error: Exception) -> FileError:
    """One line for a failed write: the reason, and that nothing was lost."""
    reason = getattr(error, "strerror", None) or str(error)
    return FileError(f"cannot write {path}: {reason}; free space or choose another place (what was there is untouched)")


def cannot_change(path: Path, error: OSError) -> FileError:
    """One line for what could not be deleted or renamed."""
    return FileError(f"cannot delete or rename {path}: {error.strerror}; allow it with chmod, or choose another place")


def make_folder(path: Path) -> None:
    """Make it and those above it, where they are missing.

    Raises:
        FileError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


# -- what a killed process left ----------------------------------------------------------------------------------------------


@contextmanager
def tidied(folder: Path) -> Iterator[None]:
    """Hold a folder (`turn`) without what killed processes left of writing its entries; one cut while it was replaced is back.

    Where there are no locks, only what is a day old is cleared away.
    """
    with turn(folder) as ours:
        if ours is not False:
            with contextlib.suppress(OSError):  # it can be written all the same
                for entry in list(os.scandir(folder)):
                    with contextlib.suppress(OSError):
                        if found := HIDDEN.fullmatch(entry.name):
                            _clear(Path(entry.path), found, ours=bool(ours))
        yield


def _clear(entry: Path, found: re.Match[str], *, ours: bool) -> None:
    if entry.is_symlink():
        entry.unlink()
    elif found["end"] == "old" and (ours or _is_old(entry)):  # its owner would hold the folder
        bring_home(entry, entry.with_name(found["name"]))
    elif found["end"] == "part" and _is_left_over(entry):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def bring_home(former: Path, place: Path) -> None:
    """End the replacing of a folder: what was not craft's in the former one moves into the new one, the rest is deleted.

    Args:
        former: the former folder, under a hidden name.
        place: where it lay; where nothing is there, it comes back.

    Raises:
        OSError: something cannot be moved or deleted.
    """
    if not os.path.lexists(place):
        former.rename(place)
        return
    delete_listed(former)
    _move_into(former, place)
    (former / MARKER).unlink(missing_ok=True)
    former.rmdir()


def _move_into(former: Path, place: Path) -> None:
    for entry in former.iterdir():
        there = place / entry.name
        if entry.name == MARKER:
            continue
        if found := HIDDEN.fullmatch(entry.name):
            _clear(entry, found, ours=True)
        elif not os.path.lexists(there):
            entry.rename(there)
        elif entry.is_dir() and not entry.is_symlink() and there.is_dir():
            _move_into(entry, there)
            entry.rmdir()


def _is_left_over(entry: Path) -> bool:
    """Whether nobody is writing it any more."""
    descriptor = os.open(entry, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        held = take(descriptor)
    finally:
        os.close(descriptor)
    return _is_old(entry) if held is None else held


def _is_old(entry: Path) -> bool:
    return time.time() - entry.stat().st_mtime > _OLD
