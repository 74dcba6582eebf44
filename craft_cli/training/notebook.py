"""Training progress in a notebook: one bar, and a line per evaluation and note."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from craft_cli.errors import figure, in_words
from craft_cli.training.progress import Listener, Plan


def in_notebook() -> bool:
    """Whether this interpreter runs the cells of a notebook (Jupyter, Colab, VS Code)."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython() if ipython else None, "kernel", None) is not None


class NotebookListener(Listener):
    """Displays progress with tqdm, as a widget if available, or else as text."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""
        self._metric: dict[str, str] = {}

    def close(self) -> None:
        """Close the bar without clearing it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def preparing(self, what: str, done: int, total: int) -> None:
        """See `Listener`."""
        self._show(what, done, total)

    def started(self, plan: Plan) -> None:
        """See `Listener`."""
        self.close()
        for line in (
            f"{plan.model} on {plan.task}: {plan.train_examples:,} training rows, {plan.eval_examples:,} validation rows",
            f"{plan.method} on {in_words(plan.targets)}, {plan.sizes}: {plan.adapter_parameters:,} parameters in the adapter, "
            f"{plan.head_parameters:,} in the head",
            *(f"note: {line}" for line in plan.notes),
        ):
            self._say(line)
        self._updates = plan.updates
        self._show("training", plan.done, plan.updates)

    def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
        """See `Listener`."""
        self._show("training", step, self._updates)
        self._bar.set_postfix({"loss": figure(loss)} | self._metric, refresh=False)

    def evaluated(self, step: int, epoch: float, metrics: Mapping[str, float], *, best: bool) -> None:
        """See `Listener`."""
        shown = {name: figure(value) for name, value in metrics.items()}
        self._metric = dict(list(shown.items())[:1])
        when = f"epoch {epoch:.3g}" if step else "start"
        values = "  ".join(f"{name} {value}" for name, value in shown.items())
        self._say(f"{when:<10} {values}{'  best so far' if best else ''}")

    def noticed(self, what: str) -> None:
        """See `Listener`."""
        self._say(f"note: {what}")

    def interrupted(self, step: int, run: Path | None, *, resumable: bool) -> None:
        """See `Listener`."""
        self.close()
        how = f"; resume it with resume=True, output_dir={str(run)!r}" if run and resumable else ""
        self._say(f"interrupted after update {step:,}{how}")

    def _show(self, what: str, done: int, total: int) -> None:
        from tqdm.auto import tqdm

        if self._bar is None or what != self._what:
            self.close()
            self._bar, self._what = tqdm(total=total, initial=done, desc=what), what
        self._bar.update(done - self._bar.n)

    def _say(self, line: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(line)
