"""File locks, for one process at a time.

The system releases a lock when its process ends, for any reason. On a file system without locks (NFS without lockd, some
FUSE), processes do not wait for each other.
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
"""Seconds between two attempts, before a wait is reported, and to wait for a folder."""


class Busy(Exception):
    """Another process holds the lock."""


def take(descriptor: int) -> bool | None:
    """Try to lock an open file or folder. Returns whether it is locked, or None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def locked(path: Path, timeout: float | None = None) -> Iterator[None]:
    """Hold a lock file, which is created if missing. A wait of more than a second is reported.

    Args:
        path: the lock file. A symbolic link is not followed.
        timeout: seconds to wait. Default: no limit.

    Raises:
        Busy: another process held the lock until the timeout.
        OSError: the file cannot be created.
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
            logging.getLogger(__name__).warning("note: waiting for another process to release %s", path)
            said = True
        time.sleep(_LOOK)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name; another process may have deleted it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@contextmanager
def turn(folder: Path) -> Iterator[bool | None]:
    """Lock a folder briefly, while its entries are renamed.

    Yields:
        Whether the folder is locked: False after waiting for a second, None on a file system without locks.
    """
    ours, end = None, time.monotonic() + _TURN
    if HIDDEN.fullmatch(folder.name):  # a temporary folder, already locked by its writer
        yield False
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # the folder is writable but not readable
        yield None
        return
    try:
        while (ours := take(descriptor)) is False and time.monotonic() < end:
            time.sleep(_LOOK)
        yield ours
    finally:
        os.close(descriptor)


def wait_until(happened: Callable[[], bool], seconds: float) -> bool:
    """Poll a condition until it is true or the time is up. Returns whether it became true."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK)
    return True
