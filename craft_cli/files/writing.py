"""Atomic writes: each file is written under a temporary name and renamed when complete."""

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
"""Age in seconds at which a temporary file counts as abandoned on a file system without locks."""


def cache_folder(given: str | Path | None = None) -> Path:
    """The cache folder. Default: `~/.cache/craft`, or `craft` in XDG_CACHE_HOME.

    Raises:
        FileError: the user has no home directory.
    """
    if given:
        return Path(given).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "craft"
    except RuntimeError:
        raise FileError(
            "cannot use the cache folder: this user has no home directory; pass --cache-dir, or set HOME or XDG_CACHE_HOME"
        ) from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically; on failure the previous file stays intact.

    Raises:
        FileError: the file cannot be written (disk full, no permission).
    """
    with whole_file(path) as file:
        file.write(data)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON atomically; bytes of a path that are not UTF-8 are escaped."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path` when the block succeeds; on failure the previous file stays intact.

    A symbolic link is followed and its target replaced. File permissions are kept. A device, a pipe or `/dev/stdout` is
    written to directly.

    Raises:
        FileError: the file cannot be written (disk full, no permission, a folder, write-protected).
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
                with contextlib.suppress(OSError):  # the file system has no permissions
                    os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
                os.fsync(descriptor)
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def _is_stream(path: Path) -> bool:
    """Whether a path is not a regular file, or names an open stream such as /dev/stdout."""
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
        raise FileError(f"cannot write {path}: it is a folder; pass a file name")
    if target.exists() and not os.access(target, os.W_OK):
        raise FileError(f"cannot write {path}: it is write-protected; allow it with chmod, or choose another name")


def _new_part(target: Path) -> tuple[Path, int]:
    """Open and lock a temporary file for `path`. Temporary files of killed processes in this folder are removed."""
    with tidied(target.parent):
        name = os.fsencode(target.name)[:200].decode(
            errors="ignore"
        )  # leaves room for our suffix within the name limit
        temporary = hidden(target.with_name(name), "part")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        take(descriptor)
    return temporary, descriptor


def hidden(path: Path, end: str) -> Path:
    """A temporary name next to `path`, unique across processes and machines; see `HIDDEN`."""
    return path.with_name(f".{path.name}.craft-{secrets.token_hex(8)}.{end}")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, as `fsync` does for the contents of a file."""
    with contextlib.suppress(OSError):  # not supported everywhere; a full disk raises earlier, on write
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cannot_write(path: Path, error: Exception) -> FileError:
    """The error for a failed write: the reason, and that nothing was lost."""
    reason = getattr(error, "strerror", None) or str(error)
    return FileError(
        f"cannot write {path}: {reason}; free space or choose another path (the previous contents are unchanged)"
    )


def cannot_change(path: Path, error: OSError) -> FileError:
    """The error for a path that could not be deleted or renamed."""
    return FileError(f"cannot delete or rename {path}: {error.strerror}; allow it with chmod, or choose another path")


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents.

    Raises:
        FileError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


# -- leftovers of killed processes -------------------------------------------------------------------------------------------


@contextmanager
def tidied(folder: Path) -> Iterator[None]:
    """Lock a folder (`turn`), remove the leftovers of killed processes, and restore folders whose replacement was interrupted.

    On a file system without locks, only leftovers older than a day are removed.
    """
    with turn(folder) as ours:
        if ours is not False:
            with contextlib.suppress(OSError):  # leftovers do not prevent writing
                for entry in list(os.scandir(folder)):
                    with contextlib.suppress(OSError):
                        if match := HIDDEN.fullmatch(entry.name):
                            _clear(Path(entry.path), match, ours=bool(ours))
        yield


def _clear(entry: Path, match: re.Match[str], *, ours: bool) -> None:
    if entry.is_symlink():
        entry.unlink()
    elif match["end"] == "old" and (ours or _is_old(entry)):  # a live owner would hold the lock
        bring_home(entry, entry.with_name(match["name"]))
    elif match["end"] == "part" and _is_left_over(entry):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def bring_home(former: Path, place: Path) -> None:
    """Finish replacing a folder: move files that craft did not write into the new folder, delete the rest.

    Args:
        former: the previous folder, under its temporary name.
        place: its original path. If nothing exists there, the previous folder is restored.

    Raises:
        OSError: a file cannot be moved or deleted.
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
        if match := HIDDEN.fullmatch(entry.name):
            _clear(entry, match, ours=True)
        elif not os.path.lexists(there):
            entry.rename(there)
        elif entry.is_dir() and not entry.is_symlink() and there.is_dir():
            _move_into(entry, there)
            entry.rmdir()


def _is_left_over(entry: Path) -> bool:
    """Whether no process is writing it any more."""
    descriptor = os.open(entry, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        held = take(descriptor)
    finally:
        os.close(descriptor)
    return _is_old(entry) if held is None else held


def _is_old(entry: Path) -> bool:
    return time.time() - entry.stat().st_mtime > _OLD
