"""Ctrl-C, the scheduler's SIGTERM and a closed terminal's SIGHUP: received at any time, handled at safe points."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

LAUNCHER = "CRAFT_LAUNCHER_PID"
"""Environment variable with the process id of the launching `craft train`, so that its children exit with it."""

ONE_PRESS = 1.0
"""Seconds within which several signals count as one: a terminal sends Ctrl-C to the launcher and its processes, and the
launcher forwards it."""


_Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def terminates_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack, so that temporary folders are removed, and exit with 128 + their number."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handled(StopSignals.SIGNALS[1:], end, signal.SIG_DFL):
        yield


@contextlib.contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: _Handler, only: Any = None) -> Iterator[None]:
    """Handle these signals, except ignored ones (as under nohup) and those with a handler other than `only`."""
    former: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread receives signals
        for number in numbers:
            now = signal.getsignal(number)
            if now is not signal.SIG_IGN and (only is None or now is only):
                former[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


class StopSignals:
    """Record `SIGNALS` inside the `with` block instead of being interrupted by them.

    A second Ctrl-C, more than a second later, interrupts at once (but not inside `shielded`).
    """

    SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self._received = 0
        self._when = 0.0
        self._shielded = False
        self._held = contextlib.ExitStack()

    @classmethod
    def handled(cls, handler: _Handler) -> contextlib.AbstractContextManager[None]:
        """Install `handler`; a signal that is ignored (as under nohup) stays ignored."""
        return _handled(cls.SIGNALS, handler)

    def __enter__(self) -> StopSignals:
        self._held.enter_context(self.handled(self._remember))
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = self._received and time.monotonic() - self._when > ONE_PRESS
        if again and number == signal.SIGINT and not self._shielded:
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._when = number, time.monotonic()

    @property
    def received(self) -> int:
        """Number of the first signal, or 0; SIGTERM if the launcher died."""
        if not self._received and launcher_died(os.environ.get(LAUNCHER)):
            self._received = signal.SIGTERM
        return self._received

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Protect a block from a second Ctrl-C.

        An interrupt while a C extension is imported (the first plot imports matplotlib) becomes an unrelated error, or
        aborts the interpreter.
        """
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False


def launcher_died(launcher: str | None) -> bool:
    """Whether the launching process, by its id in `LAUNCHER`, has exited; false if there was none."""
    return os.getppid() != int(launcher) if launcher else False


def end_by(number: int) -> BaseException:
    """The exception to raise after this signal: `KeyboardInterrupt`, or an exit with 128 + its number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
