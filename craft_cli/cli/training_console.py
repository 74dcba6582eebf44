"""Output of a training: header, progress bar, and a line per evaluation."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from craft_cli.cli import console
from craft_cli.cli.console import duration
from craft_cli.errors import figure, in_bytes, in_words, listed, plain

if TYPE_CHECKING:
    from craft_cli.training.progress import Memory, Plan

_TIMED = 10
"""Updates after which the remaining time is estimated."""


class TrainingConsole:
    """Displays a training run: header, bar with loss, rate and time left, and a line per evaluation."""

    def __init__(self) -> None:
        self._bars = console.Bars()
        self._seen = 0
        self._began = 0.0
        self._metric: list[str] = []
        self._first = 0.0

    def __enter__(self) -> TrainingConsole:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def preparing(self, what: str, done: int, total: int) -> None:
        self._bars.show(what, done, total)

    def started(self, plan: Plan) -> None:
        for note in plan.notes:
            console.note(note)
        rows = {
            "model": plan.model,
            "task": f"{plan.task} ({listed(plan.labels)})" if plan.labels else "language modeling",
            "data": f"{plan.train_examples:,} training rows, {plan.eval_examples:,} validation rows",
            "tokens": plan.tokens,
            "adapter": f"{plan.method} on {in_words(plan.targets)}, {plan.sizes}",
            "trained": f"{plan.adapter_parameters:,} parameters in the adapter"
            + (f", {plan.head_parameters:,} in the head{plan.head_start}" if plan.head_parameters else ""),
            "devices": plan.devices,
            "batch": plan.effective_batch,
            "updates": plan.length,
            "memory": plan.memory and _memory(plan.memory),
            "run": plan.output or "nothing is written (--dry-run)",
        }
        console.header("craft train", {name: value for name, value in rows.items() if value is not None})
        if plan.example:
            console.say("one row as the model sees it; trained tokens are green, or between > and < in a file:")
            console.err.print(_example(plan.example), soft_wrap=True)
        self._updates, self._evaluations, self._done = plan.updates, plan.evaluations, plan.done
        self._began = time.perf_counter()
        if plan.done == plan.updates:
            console.say(f"already finished: all {plan.updates:,} updates done")
        elif plan.done:
            console.say(f"resuming after update {plan.done:,} of {plan.updates:,}")

    def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
        self._seen += examples
        self._estimate(step)
        self._bars.show("training", step, self._updates, [f"loss {figure(loss)}", *self._metric, self._speed()])

    def logged(self, step: int, epoch: float, loss: float, rate: float) -> None:
        if not console.err.is_terminal:  # a file gets lines instead of the bar
            width = len(f"{self._updates:,}")
            console.say(
                f"update {step:>{width},}/{self._updates:,}  loss {figure(loss)}  lr {rate:.1e}  {self._speed()}"
            )

    def _estimate(self, step: int) -> None:
        """Estimate the remaining time after a few updates; the time before the first one was an evaluation."""
        now = time.perf_counter()
        if step == self._done + 1:
            self._first = now
        if step != self._done + _TIMED or step == self._updates:
            return
        from craft_cli.training.memory import peak_of_process

        each = (now - self._first) / (_TIMED - 1)
        evaluation = max(self._first - self._began - each, 0.0)
        left = each * (self._updates - step) + evaluation * self._evaluations
        console.say(
            f"about {duration(left)} for the remaining {self._updates - step:,} updates, {each:.2g} s each; "
            f"memory used so far: {in_bytes(peak_of_process())}"
        )

    def _speed(self) -> str:
        return f"{self._seen / max(time.perf_counter() - self._began, 1e-9):,.0f} examples/s"

    def evaluating(self, done: int, total: int) -> None:
        self._bars.show("evaluating", done, total)

    def evaluated(self, step: int, epoch: float, metrics: Mapping[str, float], *, best: bool) -> None:
        parts = [f"{name} {figure(value)}" for name, value in metrics.items()]
        self._metric = parts[:1]
        console.line(
            console.err,
            f"{f'epoch {epoch:.3g}' if step else 'start':<10}",
            [*parts, *(["best so far"] if best else [])],
        )

    def noticed(self, what: str) -> None:
        console.note(what)

    def stopping(self) -> None:
        console.say("stopping: saving a checkpoint")

    def interrupted(self, step: int, run: Path | None, *, resumable: bool) -> None:
        self._bars.stop()
        console.say(f"interrupted after update {step:,} of {self._updates:,}")
        if run and resumable:
            if (run / "adapter").is_dir():
                console.say(f"the best adapter so far is in {run}/adapter")
            console.say(f"resume with  craft train --resume --output-dir {shlex.quote(str(run))}")


def _memory(memory: Memory) -> str:
    parts = {
        "weights": memory.weights,
        "training": memory.trained,
        f"activations of {memory.rows:,} x {memory.length:,} tokens": memory.activations,
        "the rest": memory.other,
    }
    return f"about {in_bytes(memory.peak)}: {', '.join(f'{name} {in_bytes(size)}' for name, size in parts.items())}"


def _example(parts: Sequence[tuple[str, bool]]) -> Text:
    """Print a row with its trained tokens marked."""
    text = Text()
    for part, learned in parts:
        shown = plain(part, "\n")
        text.append(shown if console.err.is_terminal or not learned else f">{shown}<", "green" if learned else "")
    return text
