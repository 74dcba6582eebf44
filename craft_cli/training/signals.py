"""Ctrl-C, the scheduler's SIGTERM and a closed terminal's SIGHUP: asked for at any moment, obeyed where nothing is lost."""

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
"""In the environment of processes that `craft train` started: who did, so that they end with it."""

ONE_PRESS = 1.0
"""Seconds in which several signals are one wish: a terminal sends Ctrl-C to the launcher and to its processes, and the
launcher sends it on."""


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
    """Handle these signals, except those that are ignored (as by nohup), or whose handler is another than `only`."""
    former: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # signals reach no other
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
    """Remembers `SIGNALS` inside its `with` block instead of being interrupted by them.

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
        """`handler` receives them; a signal that is ignored (as by nohup) stays so."""
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
        """Number of the first signal, or 0. A process whose launcher has died was told to end, too."""
        if not self._received and launcher_died(os.environ.get(LAUNCHER)):
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


def launcher_died(launcher: str | None) -> bool:
    """Whether the process that began this one, by its id in `LAUNCHER`, is gone; where nobody did, no."""
    return os.getppid() != int(launcher) if launcher else False


def end_by(number: int) -> BaseException:
    """What to raise after a stop by this signal: `KeyboardInterrupt`, or an exit with 128 + its number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
