"""What in a folder is craft's own: `.craft.json` says what kind of folder it is and lists the files that craft wrote.

It is the first thing written. Only listed files are ever deleted or replaced; everything else belongs to somebody else and
stays. A marker may come from a stranger: names that lead out of its folder are not believed.
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
"""In a folder that one process at a time may write."""
RUN, ADAPTER, CHECKPOINT, MERGED, SWEEP = "a run", "an adapter", "a checkpoint", "a merged model", "a sweep"
_LARGEST = 1 << 24
HIDDEN = re.compile(r"\.(?P<name>.+)\.craft-[0-9a-f]{16}\.(?P<end>part|old)", re.DOTALL)
"""What is being written is `.NAME.craft-RANDOM.part`, a folder that gives way `.NAME.craft-RANDOM.old`."""


@dataclass(frozen=True)
class Marker:
    """What a folder says of itself.

    Attributes:
        kind: of folder, `a run` or another of these.
        files: that craft wrote or is going to write, relative to the folder.
    """

    kind: str
    files: frozenset[str]


def read_marker(folder: Path) -> Marker | None:
    """What is craft's own in a folder; None where it has no marker of craft's.

    Raises:
        FileError: it may not be read.
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
    """Whether craft made this folder, as this kind."""
    marker = read_marker(folder)
    return marker is not None and marker.kind == kind


def files_in(folder: Path) -> Iterator[str]:
    """Everything in a folder that is not a folder with something in it, relative to it; no marker, lock or hidden part."""
    for path, folders, files in os.walk(folder):
        here = Path(path)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in links and not HIDDEN.fullmatch(name)]
        empty = [name for name in folders if not any((here / name).iterdir())]
        for name in (*files, *links, *empty):
            if not HIDDEN.fullmatch(name) and not (here == folder and name in (MARKER, LOCK_FILE)):
                yield (here / name).relative_to(folder).as_posix()


def foreign(folder: Path) -> list[str]:
    """What in a folder is not craft's, relative to it."""
    marker = read_marker(folder)
    own = marker.files if marker else frozenset()
    strange = [MARKER] if marker is None and os.path.lexists(folder / MARKER) else []
    return sorted([*strange, *(name for name in files_in(folder) if name not in own)])


def holds_something(folder: Path) -> bool:
    """Whether a folder is not empty; a lock, a marker and what a killed process left of ours do not count."""
    return any(counts(entry.name) and not (entry.name == MARKER and read_marker(folder)) for entry in folder.iterdir())


def counts(name: str) -> bool:
    """Whether an entry of a folder is something that it holds: no lock, and nothing that a killed process left of ours."""
    return name != LOCK_FILE and not HIDDEN.fullmatch(name)


def delete_listed(folder: Path) -> None:
    """Delete the files that the marker of a folder lists.

    Raises:
        OSError: one cannot be deleted.
    """
    marker = read_marker(folder)
    for name in sorted(marker.files) if marker else ():
        _delete(folder, name)


def _delete(folder: Path, name: str) -> None:
    """Delete a file below a folder, and the folders between that are empty then; nothing behind a link."""
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
