"""Atomic writes of whole folders. Files that craft did not write are never deleted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

from craft_cli.errors import ConfigError, FileError, listed
from craft_cli.files.locks import take, turn, wait_until
from craft_cli.files.marker import (
    HIDDEN,
    MARKER,
    counts,
    delete_listed,
    files_in,
    foreign,
    holds_something,
    read_marker,
)
from craft_cli.files.reading import read_unchanged
from craft_cli.files.writing import bring_home, cannot_write, hidden, sync_folder, tidied, write_bytes

_MOMENT = 1.0
"""Longest time in seconds that a folder may be missing while it is replaced."""
T = TypeVar("T")


@contextmanager
def whole_folder(destination: Path, kind: str, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder that replaces `destination` when the block succeeds and is removed when it fails.

    Files in the previous folder that craft did not write are kept. A symbolic link is followed and its target replaced.

    Args:
        destination: the folder to write.
        kind: the kind of folder; only a folder of the same kind is replaced.
        overwrite: whether an existing folder may be replaced.

    Raises:
        FileError: the destination is not empty and `overwrite` is false, holds a file of the user's where craft would
            write, is a mount point, is the working folder or a parent of it, or cannot be written.
    """
    place = Path(os.path.realpath(destination))
    with tidied(place.parent):  # restores a folder whose replacement was interrupted
        pass
    check_place(destination, kind, overwrite=overwrite)
    if os.path.ismount(place):
        raise FileError(f"{destination} is a mount point and cannot be replaced; choose a folder inside it")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = _new_part(place)
    except OSError as error:
        raise cannot_write(destination, error) from error
    try:
        write_marker(temporary, kind, ())
        yield temporary
        _permit(temporary, place)
        write_marker(temporary, kind, files_in(temporary))
        sync_folder(temporary)
        with turn(place.parent):
            _swap(temporary, place, destination)
        sync_folder(place.parent)
    except OSError as error:
        raise cannot_write(destination, error) from error
    except FileError as error:  # name the path that the user gave
        raise FileError(str(error).replace(str(temporary), str(destination))) from error
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def write_marker(folder: Path, kind: str, files: Iterable[str]) -> None:
    """Record in the marker which files of a folder craft wrote or is about to write.

    Raises:
        FileError: the marker cannot be written.
    """
    content = json.dumps(
        {"craft": kind, "files": sorted(files)}, indent=1
    )  # ASCII, because a file name can be invalid UTF-8
    write_bytes(folder / MARKER, content.encode())


def _new_part(place: Path) -> tuple[Path, int]:
    with turn(place.parent):
        temporary = hidden(place, "part")
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY)
        take(descriptor)
    return temporary, descriptor


def _permit(temporary: Path, place: Path) -> None:
    """Copy the permissions of the previous folder and its files to the new ones."""
    with contextlib.suppress(OSError):  # no previous folder, or no permissions
        temporary.chmod(stat.S_IMODE(place.stat().st_mode))
    for name in files_in(temporary):
        with contextlib.suppress(OSError):
            (temporary / name).chmod(stat.S_IMODE((place / name).stat().st_mode))


def _swap(temporary: Path, place: Path, shown: Path) -> None:
    if not place.exists():
        temporary.rename(place)
        return
    own = read_marker(place)
    for name in files_in(temporary):
        between = [place / parent for parent in PurePosixPath(name).parents]
        odd = [path for path in between if os.path.lexists(path) and (path.is_symlink() or not path.is_dir())]
        if os.path.lexists(place / name) and not (own and name in own.files):
            odd.append(place / name)
        if odd:
            raise FileError(
                f"{shown / odd[0].relative_to(place)} is in the way and was not written by craft; move it elsewhere"
            )
    former = hidden(place, "old")
    place.rename(former)
    try:
        temporary.rename(place)
    except OSError:
        former.rename(place)
        raise
    with contextlib.suppress(OSError):  # a file that cannot be moved stays in the previous folder
        bring_home(former, place)


def delete_folder(folder: Path) -> None:
    """Delete the files that craft wrote to a folder; atomically if the folder holds only these.

    Raises:
        OSError: a file cannot be deleted.
    """
    folder = Path(os.path.realpath(folder))
    marker = read_marker(folder)
    if marker is None:
        return
    if foreign(folder):
        delete_listed(folder)
        write_marker(folder, marker.kind, ())  # marks the folder as craft's, so that it can be written again
        return
    former = hidden(folder, "part")  # renamed first, so that it is never seen half deleted
    folder.rename(former)
    shutil.rmtree(former, ignore_errors=True)


def check_place(destination: Path, kind: str, *, overwrite: bool) -> None:
    """Refuse an output folder that is not empty, unless it is of the same kind and may be overwritten.

    Raises:
        FileError: the folder is not empty; or it is a file, the working folder or a parent of it, or a git repository.
    """
    if not destination.exists():
        return
    if not destination.is_dir():
        raise FileError(f"{destination} is a file; choose a folder")
    if Path.cwd().is_relative_to(destination.resolve()):
        raise FileError(f"{destination} is the current folder or a parent of it; choose another folder")
    if os.path.lexists(destination / ".git"):
        raise FileError(f"{destination} is a git repository; choose another folder")
    if not holds_something(destination):
        return
    marker = read_marker(destination)
    if marker and marker.kind == kind:
        if not overwrite:
            raise FileError(f"{destination} is not empty; choose another --output-dir or pass --overwrite")
        return
    strange = sorted(entry.name for entry in destination.iterdir() if counts(entry.name))
    what = f"it holds {marker.kind}" if marker else f"craft did not write {listed(strange, 3)}"
    raise FileError(f"{destination} is not empty and cannot be replaced: {what}; choose another folder")


def check_inputs(flag: str, output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output path that is, or contains, an input path. Links and other spellings are resolved.

    Raises:
        ConfigError: an output would overwrite an input.
    """
    for path in inputs:
        with contextlib.suppress(OSError):
            alike = output.exists() and path.exists() and output.samefile(path)
            if alike or (output.is_dir() and path.resolve().is_relative_to(output.resolve())):
                raise ConfigError(
                    f"{flag}: {output} {'is' if alike else 'contains'} the input {path}; choose another path"
                )


def steadily(folder: Path, read: Callable[[], T]) -> T:
    """Read a consistent set of files from a folder that another process may be replacing.

    Raises:
        FileError: `read` raised it for an unchanged folder; or the folder keeps being replaced.
    """

    def attempt() -> T:
        if not wait_until(lambda: not _gives_way(folder), _MOMENT):
            with tidied(folder.parent):  # restores the folder if the process that replaced it was killed
                pass
        return read()

    return read_unchanged(folder, lambda: (_identity(folder), _gives_way(folder)), attempt)


def _identity(folder: Path) -> tuple[int, ...] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    identity: tuple[int, ...] = (status.st_dev, status.st_ino)
    with contextlib.suppress(OSError):  # inode numbers are reused
        marker = (folder / MARKER).stat()
        identity = (*identity, marker.st_ino, marker.st_mtime_ns)
    return identity


def _gives_way(folder: Path) -> bool:
    """Whether the folder is missing at the moment because it is being replaced."""
    if folder.exists():
        return False
    with contextlib.suppress(OSError), os.scandir(os.path.dirname(os.path.realpath(folder))) as entries:
        for entry in entries:
            match = HIDDEN.fullmatch(entry.name)
            if match and match["end"] == "old" and match["name"] == os.path.basename(os.path.realpath(folder)):
                return True
    return False
