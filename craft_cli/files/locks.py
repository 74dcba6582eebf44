"""One process at a time.

The system lets go of a lock when its process ends, however that comes. A file system without locks (NFS without lockd, some
FUSE) is no reason to stop: there nobody waits for anybody.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from craft_cli.files.marker import HIDDEN

_LOOK = 0.02
_SAID_AFTER = 1.0
_TURN = 1.0
"""Seconds between two looks, before a wait is reported, and to wait for a turn."""


class Busy(Exception):
    """Another process holds the lock."""


def take(descriptor: int) -> bool | None:
    """Try to lock an open file or folder: whether it is ours now, or None where this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def locked(path: Path, timeout: float | None = None) -> Iterator[None]:
    """Hold the lock in this file, which is made where it is missing. A wait of more than a second is reported.

    Args:
        path: of the file. A link is not followed.
        timeout: seconds to wait; without, as long as it takes.

    Raises:
        Busy: another process holds it for longer.
        OSError: the file cannot be made.
    """
    began, said = time.monotonic(), timeout is not None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if take(descriptor) is not False and _is_at(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)
        waited = time.monotonic() - began
        if timeout is not None and waited >= timeout:
            raise Busy(str(path))
        if waited > _SAID_AFTER and not said:
            logging.getLogger(__name__).warning("note: waiting for another process that holds %s", path)
            said = True
        time.sleep(_LOOK)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of this name: somebody may have deleted it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@contextmanager
def turn(folder: Path) -> Iterator[bool | None]:
    """Hold a folder itself for a moment, in which its entries change names.

    Yields:
        Whether it is ours: not after waiting for a second (a script may hold it), and None where there are no locks.
    """
    ours, end = None, time.monotonic() + _TURN
    if HIDDEN.fullmatch(folder.name):  # it is being written, and held by whoever writes it
        yield False
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that may be written, but not listed
        yield None
        return
    try:
        while (ours := take(descriptor)) is False and time.monotonic() < end:
            time.sleep(_LOOK)
        yield ours
    finally:
        os.close(descriptor)


def wait_until(happened: Callable[[], bool], seconds: float) -> bool:
    """Look again and again, for so long at most; whether it happened."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK)
    return True
