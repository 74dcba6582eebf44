"""Ctrl-C and the scheduler's SIGTERM: asked for at any moment, obeyed where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

LAUNCHER = "CRAFT_LAUNCHER_PID"
"""In the environment of processes that `craft train` started: who did, so that they end with it."""

_ONE_PRESS = 1.0
"""Seconds in which several signals are one wish: a terminal sends Ctrl-C to the launcher and to its processes, and the
launcher sends it on."""


@contextlib.contextmanager
def terminates_cleanly() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that temporary folders are removed, and exits with 143."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StopSignals:
    """Remembers SIGINT and SIGTERM inside its `with` block instead of being interrupted by them.

    A second Ctrl-C, more than a second later, interrupts at once (but not inside `shielded`).
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received = 0
        self._when = 0.0
        self._shielded = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            self._former = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = self._received and time.monotonic() - self._when > _ONE_PRESS
        if again and number == signal.SIGINT and not self._shielded:
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._when = number, time.monotonic()

    @property
    def received(self) -> int:
        """Number of the first signal, or 0. A process whose launcher has died was told to end, too."""
        launcher = os.environ.get(LAUNCHER)
        if not self._received and launcher and os.getppid() != int(launcher):
            self._received = signal.SIGTERM
        return self._received

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """For what even a second Ctrl-C must not cut.

        A C extension that is being imported (the first picture brings matplotlib) turns an interrupt into an error of
        its own, or aborts the interpreter.
        """
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False


def end_by(number: int) -> BaseException:
    """What to raise after a stop by this signal: `KeyboardInterrupt`, or an exit with 128 + its number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
