"""The marker `.craft.json` names the kind of a folder and lists the files that craft wrote.

It is written first. Only listed files are ever deleted or replaced; all other files belong to the user and are kept. A
marker may come from an untrusted source: names that lead out of its folder are ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from craft_cli.files.reading import cannot_read

MARKER = ".craft.json"
LOCK_FILE = ".lock"
"""Lock file of a folder that one process at a time may write."""
RUN, ADAPTER, CHECKPOINT, MERGED, SWEEP = "a run", "an adapter", "a checkpoint", "a merged model", "a sweep"
_LARGEST = 1 << 24
HIDDEN = re.compile(r"\.(?P<name>.+)\.craft-[0-9a-f]{16}\.(?P<end>part|old)", re.DOTALL)
"""Temporary names: `.NAME.craft-RANDOM.part` while written, `.NAME.craft-RANDOM.old` for a folder being replaced."""


@dataclass(frozen=True)
class Marker:
    """The contents of a marker.

    Attributes:
        kind: the kind of folder, such as `a run`.
        files: files that craft wrote or is about to write, relative to the folder.
    """

    kind: str
    files: frozenset[str]


def read_marker(folder: Path) -> Marker | None:
    """Read the marker of a folder; None if there is none.

    Raises:
        FileError: the marker cannot be read.
    """
    path = folder / MARKER
    try:
        if path.is_symlink() or path.stat().st_size > _LARGEST:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, files = content["craft"], content["files"]
    except PermissionError as error:
        raise cannot_read(path, error) from error
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    if not isinstance(kind, str) or not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        return None
    return Marker(kind, frozenset(name for name in files if _is_inside(name)))


def is_kind(folder: Path, kind: str) -> bool:
    """Whether craft created this folder, as this kind."""
    marker = read_marker(folder)
    return marker is not None and marker.kind == kind


def files_in(folder: Path) -> Iterator[str]:
    """All files and empty folders below a folder, relative to it, without marker, lock and temporary files."""
    for path, folders, files in os.walk(folder):
        here = Path(path)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in links and not HIDDEN.fullmatch(name)]
        empty = [name for name in folders if not any((here / name).iterdir())]
        for name in (*files, *links, *empty):
            if not HIDDEN.fullmatch(name) and not (here == folder and name in (MARKER, LOCK_FILE)):
                yield (here / name).relative_to(folder).as_posix()


def foreign(folder: Path) -> list[str]:
    """Files in a folder that craft did not write, relative to it."""
    marker = read_marker(folder)
    own = marker.files if marker else frozenset()
    strange = [MARKER] if marker is None and os.path.lexists(folder / MARKER) else []
    return sorted([*strange, *(name for name in files_in(folder) if name not in own)])


def holds_something(folder: Path) -> bool:
    """Whether a folder is not empty; locks, markers and leftovers of killed processes do not count."""
    return any(counts(entry.name) and not (entry.name == MARKER and read_marker(folder)) for entry in folder.iterdir())


def counts(name: str) -> bool:
    """Whether an entry of a folder is content, not a lock or the leftover of a killed process."""
    return name != LOCK_FILE and not HIDDEN.fullmatch(name)


def delete_listed(folder: Path) -> None:
    """Delete the files listed in the marker of a folder.

    Raises:
        OSError: a file cannot be deleted.
    """
    marker = read_marker(folder)
    for name in sorted(marker.files) if marker else ():
        _delete(folder, name)


def _delete(folder: Path, name: str) -> None:
    """Delete a file below a folder, then its parents that became empty. Symbolic links are not followed."""
    path = folder / name
    between = [parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder]
    if any(parent.is_symlink() for parent in between) or (path.is_dir() and not path.is_symlink()):
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()
    with contextlib.suppress(OSError):
        for parent in between:
            parent.rmdir()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
