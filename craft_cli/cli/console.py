"""The only place that prints. Results go to stdout, progress and messages to stderr; bars only on a terminal."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from craft_cli.errors import CraftError, as_json, below_home, figure, in_words, is_utf8, listed, plain

if TYPE_CHECKING:
    from craft_cli.training.progress import Plan

for _stream in (sys.stdout, sys.stderr):  # a code page or an ASCII pipe must not end a run, nor make two names alike
    if hasattr(_stream, "reconfigure"):
        _stream.reconfigure(errors="backslashreplace")

_TEXT_WIDTH = 30
"""A column of texts is not narrower."""


class _Console(Console):
    """Lets no control character of a name or a message through, and outlives whoever reads its messages."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text, "\n"), segment.style)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            del self._buffer[:]  # rich would print it again before the next line
            if not self.stderr:
                raise
            discard(sys.stderr)  # the terminal is closed, or `craft train 2>&1 | head`: it goes on in silence

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def discard(stream: Any) -> None:
    """What is written to a stream from now on goes nowhere: its reader is gone."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


out = _Console(highlight=False)
if not out.is_terminal:
    out.width = max(out.width, 120)  # a file has no width; let no table break there
err = _Console(stderr=True, highlight=False)


def fail(message: str) -> None:
    """An error: one line for each thing that is wrong."""
    for line in message.splitlines():
        err.print(Text.assemble(("error:", "bold red"), " ", plain(line)), soft_wrap=True)


def note(message: str) -> None:
    """Something the user should know, on stderr."""
    err.print(Text.assemble(("note:", "yellow"), " ", plain(message)), soft_wrap=True)  # one print: a bar may be drawn


def say(message: str) -> None:
    """A plain message on stderr."""
    err.print(message, markup=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """One object on stdout, in UTF-8 or escaped.

    Raises:
        CraftError: it is closed.
    """
    if sys.stdout is None:
        raise CraftError("standard output is closed, so --json has nowhere to go")
    print(as_json(content, indent=2, ascii=not is_utf8(sys.stdout)))


def facts(pairs: Mapping[str, Any], *, rename: bool = True) -> None:
    """Names and values, a line each; values are never broken, so that paths can be copied."""
    pairs = {
        name.replace("_", " ") if rename else name: show(value) for name, value in pairs.items() if value is not None
    }
    width = max(map(len, pairs))
    for name, value in pairs.items():
        out.print(f"[bold]{name:<{width}}[/]  ", end="")
        out.print(value, markup=False, soft_wrap=True)


def sentences(pairs: Mapping[str, str]) -> None:
    """Names and what is said of them; on a terminal broken between words, in a file a line each."""
    if not out.is_terminal:
        facts(pairs, rename=False)
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, text in pairs.items():
        grid.add_row(escape(show(name)), escape(show(text)))
    out.print(grid)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], below: Sequence[Sequence[Any]] = ()) -> None:
    """A table on stdout, and sums below it; all columns but the first are numbers, to the right."""
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, column in enumerate(columns):
        grid.add_column(
            escape(plain(column)), justify="left" if number == 0 else "right", overflow="fold", no_wrap=number < 3
        )
    for row in rows:
        grid.add_row(*[escape(show(value)) for value in row])
    if below:
        grid.add_section()
    for row in below:
        grid.add_row(*[escape(show(value)) for value in row])
    out.print(grid)


def label_table(by_label: Mapping[str, Mapping[str, float]], confusion: Sequence[Sequence[int]] | None = None) -> None:
    """Precision, recall, F1 and support of each label, their averages, and the accuracy where there is a matrix."""
    from craft_cli.tasks.metrics import averages

    columns = ("precision", "recall", "f1")
    rows, below = (
        [
            [name, *(f"{row[it]:.4f}" if it in row else "" for it in columns), row["support"]]
            for name, row in part.items()
        ]
        for part in (by_label, averages(by_label, confusion))
    )
    table(["label", *columns, "support"], rows, below)


def mistakes_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Wrong answers, their texts cut to the width or on lines of their own; a file that all are of is not named."""
    if not rows:
        out.print("no wrong answers")
        return
    one_file = len({row["place"].rpartition(", ")[0] for row in rows}) == 1
    names = [name for name in rows[0] if name != "texts"]
    titles = [{"place": "row", "label": "gold", "prediction": "predicted"}.get(name, name) for name in names]
    cells = [[show(row[name]) or "-" for name in names] for row in rows]
    for line in cells:
        line[0] = line[0].rpartition(", " if one_file else "/")[2]
    texts = [
        [Text(plain(" ".join(it.split()))[: out.width], no_wrap=True, overflow="ellipsis") for it in row["texts"]]
        for row in rows
    ]
    taken = sum(max(map(cell_len, column)) + 3 for column in zip(titles, *cells, strict=True))
    if taken + _TEXT_WIDTH * len(texts[0]) > out.width:
        for line, parts in zip(cells, texts, strict=True):
            told = [f"{title} {cell}" for title, cell in zip(titles[1:], line[1:], strict=True)]
            out.print(f"{line[0]}: {', '.join(told)}", markup=False)
            for part in parts:
                out.print(Padding(part, (0, 0, 0, 2)))
        return
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title, name in zip(titles, names, strict=True):
        grid.add_column(title, justify="right" if isinstance(rows[0][name], float) else "left", no_wrap=True)
    for number in range(len(texts[0])):
        grid.add_column("text" if number == 0 else f"text {number + 1}")
    for line, parts in zip(cells, texts, strict=True):
        grid.add_row(*map(escape, line), *parts)
    out.print(grid)


def show(value: Any) -> str:
    """A value as it is read best."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return figure(value)
    if isinstance(value, Path):
        return plain(below_home(value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return plain(",".join(map(str, value)))
    return plain(str(value))


def percent(value: float) -> str:
    """A part of one as a percentage."""
    return f"{100 * value:.1f}%"


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars that vanish when done; yields a function of (what, done, total)."""
    tasks: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=err, transient=True, disable=not err.is_terminal,
    ) as progress:  # fmt: skip

        def show_progress(what: str, done: int, total: int) -> None:
            if what not in tasks or progress.tasks[tasks[what]].completed > done:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total, visible=done < total)

        yield show_progress


@contextmanager
def status(first: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a line that changes; without a terminal nothing."""
    with err.status(first) as spinner:
        yield spinner.update


def _example(parts: Sequence[tuple[str, bool]]) -> Text:
    """A row of which a part is learned."""
    text = Text()
    for part, learned in parts:
        shown = plain(part, "\n")
        text.append(shown if err.is_terminal or not learned else f">{shown}<", "green" if learned else "")
    return text


class TrainingConsole:
    """Shows a training run: header, bar with loss, rate and time left, a line for each evaluation."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"), TimeRemainingColumn(),
            console=err, transient=True, disable=not err.is_terminal, expand=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._seen = 0
        self._began = 0.0
        self._metric = ""

    def __enter__(self) -> TrainingConsole:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _bar(self, what: str, done: int, total: int, detail: str = "") -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, detail=detail)
        self._progress.update(self._tasks[what], completed=done, total=total, detail=detail, visible=done < total)

    def preparing(self, what: str, done: int, total: int) -> None:
        self._bar(what, done, total)

    def started(self, plan: Plan) -> None:
        for line in plan.notes:
            note(line)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold")
        grid.add_column(overflow="fold")
        rows = {
            "model": plan.model,
            "task": f"{plan.task} ({listed(plan.labels)})" if plan.labels else "answers of a language model",
            "data": f"{plan.train_examples:,} to train on, {plan.eval_examples:,} to evaluate on",
            "tokens": plan.tokens,
            "adapter": f"{plan.method} on {in_words(plan.targets)}, {plan.sizes}",
            "trained": f"{plan.adapter_parameters:,} numbers in the adapter"
            + (f", {plan.head_parameters:,} in the head{plan.head_start}" if plan.head_parameters else ""),
            "devices": plan.devices,
            "batch": plan.effective_batch,
            "updates": plan.length,
            "run": plan.output or "nothing is written (--dry-run)",
        }
        for name, value in rows.items():
            grid.add_row(name, escape(value))
        err.print(Panel(grid, title="craft train", title_align="left", expand=False))
        if plan.example:
            say("one row as the model sees it; what it learns is green, or stands between > and < in a file:")
            err.print(_example(plan.example))
        self._updates = plan.updates
        self._began = time.perf_counter()
        if plan.done == plan.updates:
            say(f"all {plan.updates:,} updates were made before: nothing is left to train")
        elif plan.done:
            say(f"going on after update {plan.done:,} of {plan.updates:,}")

    def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
        self._seen += examples
        self._bar("training", step, self._updates, f"loss {figure(loss)}  {self._speed()}{self._metric}")

    def logged(self, step: int, epoch: float, loss: float, rate: float) -> None:
        if not err.is_terminal:  # a file gets lines where a terminal has its bar
            width = len(f"{self._updates:,}")
            say(f"update {step:>{width},}/{self._updates:,}  loss {figure(loss)}  lr {rate:.1e}  {self._speed()}")

    def _speed(self) -> str:
        return f"{self._seen / max(time.perf_counter() - self._began, 1e-9):,.0f} examples/s"

    def evaluating(self, done: int, total: int) -> None:
        self._bar("evaluating", done, total)

    def evaluated(self, step: int, epoch: float, metrics: Mapping[str, float], *, best: bool) -> None:
        parts = [f"{name} {figure(value)}" for name, value in metrics.items()]
        self._metric = "".join(f"  {part}" for part in parts[:1])
        lines = [f"epoch {epoch:<5.3g}" if step else f"{'start':<11}"]
        for part in [*parts, *(["best so far"] if best else [])]:
            if err.is_terminal and len(f"{lines[-1]}  {part}") > err.width:  # no value apart from its name
                lines.append(" " * 10)
            lines[-1] += f"{' ' if len(lines[-1]) == 11 else '  '}{part}"
        err.print("\n".join(lines).replace("best so far", "[green]best so far[/]"), soft_wrap=True)

    def noticed(self, what: str) -> None:
        note(what)

    def stopping(self) -> None:
        say("stopping: the checkpoint is being written")

    def interrupted(self, step: int, run: Path | None, *, resumable: bool) -> None:
        self._progress.stop()
        say(f"interrupted after update {step:,} of {self._updates:,}")
        if run and resumable:
            if (run / "adapter").is_dir():
                say(f"the best adapter so far is in {run}/adapter")
            say(f"resume with  craft train --resume --output-dir {shlex.quote(str(run))}")
