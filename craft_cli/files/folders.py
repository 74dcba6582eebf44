"""Folders that are never half there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from craft_cli.errors import FileError
from craft_cli.files.writing import LOCK_FILE, cannot_write, sync_folder


@contextmanager
def whole_folder(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `destination`, moved there when the block ends well and removed when it does not.

    Raises:
        FileError: the destination is not empty and may not be overwritten, is a mount point or the working folder, or
            something cannot be written.
    """
    check_free(destination, overwrite=overwrite)
    if destination.exists() and (os.path.ismount(destination) or destination.samefile(Path.cwd())):
        raise FileError(f"{destination} cannot give way to another folder; choose one inside it")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".part", dir=destination.parent))
    except OSError as error:
        raise cannot_write(destination, error) from error
    former = None
    try:
        temporary.chmod(0o755)
        yield temporary
        sync_folder(temporary)
        if destination.exists():
            former = temporary.with_suffix(".old")
            destination.rename(former)
        temporary.rename(destination)
        sync_folder(destination.parent)
        if former:
            shutil.rmtree(former)
    except OSError as error:
        if former and not destination.exists():
            former.rename(destination)
        raise cannot_write(destination, error) from error
    except FileError as error:  # speak of the place the user knows
        raise FileError(str(error).replace(str(temporary), str(destination))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a folder so that it is never there by halves: first it loses its name."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def tidy(folder: Path, names: Iterable[str]) -> None:
    """Clear away what a killed process left of writing these entries; a folder cut while it was replaced comes back.

    Args:
        folder: where they lie. Nobody else may be writing them.
        names: of files and folders, as `fnmatch` patterns.
    """
    patterns = list(names)
    for entry in list(folder.iterdir()):
        if not (entry.name.startswith(".") and entry.suffix in (".part", ".old")):
            continue
        name = entry.name[1:].rsplit(".", 2)[0]  # .NAME.RANDOM.part
        if not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        if entry.suffix == ".old" and entry.is_dir() and not (folder / name).exists():
            entry.rename(folder / name)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def check_free(destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination that holds something (what `holds_something` overlooks may be there).

    Raises:
        FileError: it is a file, or a folder that is not empty and may not be overwritten.
    """
    if destination.exists() and not destination.is_dir():
        raise FileError(f"{destination} is a file; choose a folder")
    if destination.is_dir() and holds_something(destination) and not overwrite:
        raise FileError(f"{destination} is not empty; choose another --output-dir or give --overwrite")


def holds_something(folder: Path) -> bool:
    """Whether a folder is not empty; a lock and what a killed process left of ours do not count."""
    return any(
        entry.name != LOCK_FILE and not (entry.name.startswith(".") and entry.suffix in (".part", ".old"))
        for entry in folder.iterdir()
    )
