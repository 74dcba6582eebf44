"""Folders that are never half there, and never take away what is not craft's."""

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
from craft_cli.files.writing import bring_home, cannot_write, hidden, sync_folder, tidied, write_bytes

_TRIES = 50
_MOMENT = 1.0
"""Seconds that a folder may be missing while it is replaced."""
T = TypeVar("T")


@contextmanager
def whole_folder(destination: Path, kind: str, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `destination`, moved there when the block ends well and removed when it does not.

    What is not craft's in a former folder is in the new one too. A link stays and the folder it points to is replaced.

    Args:
        destination: the folder to write.
        kind: of folder; only one of the same kind is replaced.
        overwrite: whether one may be.

    Raises:
        FileError: the destination is not empty and may not be overwritten, or holds something that is not craft's where
            a file is to be written, is a mount point, the working folder or above it, or something cannot be written.
    """
    place = Path(os.path.realpath(destination))
    with tidied(place.parent):  # a former one may come back
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
    except FileError as error:  # speak of the place the user knows
        raise FileError(str(error).replace(str(temporary), str(destination))) from error
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def write_marker(folder: Path, kind: str, files: Iterable[str]) -> None:
    """Say that these files in a folder are craft's, or will be.

    Raises:
        FileError: it cannot be written.
    """
    content = json.dumps({"craft": kind, "files": sorted(files)}, indent=1)  # in ASCII, for names that are no text
    write_bytes(folder / MARKER, content.encode())


def _new_part(place: Path) -> tuple[Path, int]:
    with turn(place.parent):
        temporary = hidden(place, "part")
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY)
        take(descriptor)
    return temporary, descriptor


def _permit(temporary: Path, place: Path) -> None:
    """Give the new folder and its files the permissions of the former ones."""
    with contextlib.suppress(OSError):  # there is none, or a file system without permissions
        temporary.chmod(stat.S_IMODE(place.stat().st_mode))
    for name in files_in(temporary):
        with contextlib.suppress(OSError):
            (temporary / name).chmod(stat.S_IMODE((place / name).stat().st_mode))


def _swap(temporary: Path, place: Path, told: Path) -> None:
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
                f"{told / odd[0].relative_to(place)} is in the way and was not written by craft; move it elsewhere"
            )
    former = hidden(place, "old")
    place.rename(former)
    try:
        temporary.rename(place)
    except OSError:
        former.rename(place)
        raise
    with contextlib.suppress(OSError):  # what cannot be moved stays in the former one
        bring_home(former, place)


def delete_folder(folder: Path) -> None:
    """Delete what craft wrote into a folder; where that is all, so that it is never there by halves.

    Raises:
        OSError: something cannot be deleted.
    """
    folder = Path(os.path.realpath(folder))
    marker = read_marker(folder)
    if marker is None:
        return
    if foreign(folder):
        delete_listed(folder)
        write_marker(folder, marker.kind, ())  # it stays a place to write to
        return
    former = hidden(folder, "part")  # first it loses its name
    folder.rename(former)
    shutil.rmtree(former, ignore_errors=True)


def check_place(destination: Path, kind: str, *, overwrite: bool) -> None:
    """Refuse a folder to write to that holds something, unless that is of the same kind and may be overwritten.

    Raises:
        FileError: so; or it is a file, the working folder or one above it, or under version control.
    """
    if not destination.exists():
        return
    if not destination.is_dir():
        raise FileError(f"{destination} is a file; choose a folder")
    if Path.cwd().is_relative_to(destination.resolve()):
        raise FileError(f"{destination} is the working folder or above it; choose a folder of its own")
    if os.path.lexists(destination / ".git"):
        raise FileError(f"{destination} is under version control (.git); choose a folder of its own")
    if not holds_something(destination):
        return
    marker = read_marker(destination)
    if marker and marker.kind == kind:
        if not overwrite:
            raise FileError(f"{destination} is not empty; choose another --output-dir or give --overwrite")
        return
    strange = sorted(entry.name for entry in destination.iterdir() if counts(entry.name))
    what = f"it holds {marker.kind}" if marker else f"craft did not write {listed(strange, 3)}"
    raise FileError(f"{destination} is not empty and is not replaced: {what}; choose another folder")


def check_inputs(flag: str, output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is, or holds, something that is read, by whatever names and links.

    Raises:
        ConfigError: so.
    """
    for path in inputs:
        with contextlib.suppress(OSError):
            alike = output.exists() and path.exists() and output.samefile(path)
            if alike or (output.is_dir() and path.resolve().is_relative_to(output.resolve())):
                raise ConfigError(
                    f"{flag}: {output} {'is' if alike else 'holds'} {path}, which is read; choose another"
                )


def steadily(folder: Path, read: Callable[[], T]) -> T:
    """Read files of a folder that another process may replace meanwhile, so that all are of one state.

    Raises:
        FileError: what `read` raises of a folder that stays; or it is replaced all the time.
    """
    for _ in range(_TRIES):
        if not wait_until(lambda: not _gives_way(folder), _MOMENT):
            with tidied(folder.parent):  # whoever replaced it was killed
                pass
        before = _identity(folder)
        try:
            result = read()
        except FileError:
            if _identity(folder) == before and not _gives_way(folder):
                raise
        else:
            if _identity(folder) == before:
                return result
    raise FileError(f"{folder} is being replaced all the time; try again later")


def _identity(folder: Path) -> tuple[int, ...] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    identity: tuple[int, ...] = (found.st_dev, found.st_ino)
    with contextlib.suppress(OSError):  # numbers of folders are used again
        marker = (folder / MARKER).stat()
        identity = (*identity, marker.st_ino, marker.st_mtime_ns)
    return identity


def _gives_way(folder: Path) -> bool:
    """Whether it has no name at this moment, because another takes its place."""
    if folder.exists():
        return False
    with contextlib.suppress(OSError):
        for entry in os.scandir(os.path.dirname(os.path.realpath(folder))):
            found = HIDDEN.fullmatch(entry.name)
            if found and found["end"] == "old" and found["name"] == os.path.basename(os.path.realpath(folder)):
                return True
    return False
