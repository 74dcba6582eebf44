"""All printing. Results go to stdout, progress and messages to stderr, and bars only to a terminal."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import Progress, Task, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from craft_cli.errors import CraftError, as_json, below_home, figure, is_utf8, plain

for _stream in (
    sys.stdout,
    sys.stderr,
):  # a code page or an ASCII pipe must not crash a run, or make two names look the same
    if hasattr(_stream, "reconfigure"):
        _stream.reconfigure(errors="backslashreplace")

_TEXT_WIDTH = 30
"""Minimum width of a text column."""
_FILE_TEXT = 120
"""Maximum length of texts without a terminal."""
_BAR = 8
"""Minimum length of a bar."""
_NUMBER = re.compile(r"[+-]?\.?\d")
"""Start of a number, or of a list of numbers."""


class _Console(Console):
    """A console that removes control characters and survives a closed stream."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text, "\n"), segment.style)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            del self._buffer[:]  # rich would print the buffer again before the next line
            if not self.stderr:
                raise
            discard(sys.stderr)  # the terminal is closed, or `craft train 2>&1 | head`: continue silently

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def discard(stream: Any) -> None:
    """Discard all further output of a stream whose reader has closed it."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


out = _Console(highlight=False)
if not out.is_terminal:
    out.width = 10_000  # a file has no width, so tables are not shortened
err = _Console(stderr=True, highlight=False)


def fail(message: str) -> None:
    """Print an error, one line per problem."""
    for line in message.splitlines():
        err.print(Text.assemble(("error:", "bold red"), " ", plain(line)), soft_wrap=True)


def note(message: str) -> None:
    """Print a note for the user to stderr."""
    err.print(
        Text.assemble(("note:", "yellow"), " ", plain(message)), soft_wrap=True
    )  # in one call, because a bar may be drawn


def say(message: str) -> None:
    """Print a plain message to stderr."""
    err.print(message, markup=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """Print one JSON object to stdout, in UTF-8 or escaped.

    Raises:
        CraftError: standard output is closed.
    """
    if sys.stdout is None:
        raise CraftError("standard output is closed, so --json cannot be printed")
    print(as_json(content, indent=2, ascii=not is_utf8(sys.stdout)))


class Verbatim(str):
    """A command or path that is never wrapped, so that it can be copied."""

    __slots__ = ()


def facts(pairs: Mapping[str, Any], *, rename: bool = True) -> None:
    """Print names and values to stdout, wrapped at words on a terminal, one line per value in a file."""
    shown = {name.replace("_", " ") if rename else name: value for name, value in pairs.items() if value is not None}
    for line in hanging(shown, out.width if out.is_terminal else None):
        out.print(line, soft_wrap=True)


def header(title: str, pairs: Mapping[str, Any]) -> None:
    """Print names and values to stderr, in a frame if all of them fit."""
    lines = hanging(pairs, err.width - 4)
    if all(line.cell_len <= err.width - 4 for line in lines):
        err.print(Panel(Text("\n").join(lines), title=title, title_align="left", expand=False))
        return
    for line in (Text(title, "bold"), *lines):
        err.print(line, soft_wrap=True)


def hanging(pairs: Mapping[str, Any], width: int | None) -> list[Text]:
    """Lines of names and values with this width; a value that does not fit next to its name goes below it."""
    indent = max(cell_len(plain(name)) for name in pairs) + 2
    lines: list[Text] = []
    for name, value in pairs.items():
        text, head = show(value), Text(plain(name), "bold")
        whole = width is None or isinstance(value, (Path, Verbatim))
        words = [text] if whole else text.split(" ")
        room = (width or 0) - indent
        beside = width is None or max(map(cell_len, words)) <= room >= min(_TEXT_WIDTH // 2, cell_len(text))
        if not beside and whole and cell_len(text) > (width or 0) - 2:
            beside = True  # it fits nowhere, so the terminal wraps it
        parts = wrapped(words, room if beside else (width or 0) - 2)
        if beside:
            lines.append(head + Text(" " * (indent - head.cell_len) + parts.pop(0)))
        else:
            lines.append(head)
        lines += [Text(" " * (indent if beside else 2) + part) for part in parts]
    return lines


def wrapped(words: Sequence[str], width: int) -> list[str]:
    """Wrap words to lines of this width; a longer word gets its own line."""
    lines = [words[0]]
    for word in words[1:]:
        if cell_len(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def line(to: Console, head: str, parts: Sequence[str]) -> None:
    """Print a name and its values; on a narrow terminal on several lines, each value next to its own name."""
    lines = wrapped(head.split(" "), to.width) if to.is_terminal else [head]
    for part in parts:
        if not to.is_terminal or cell_len(f"{lines[-1]}  {part}") <= to.width:
            lines[-1] += f"  {part}"
        else:
            lines += [f"    {it}" for it in wrapped(part.split(" "), to.width - 4)]
    text = Text("\n".join(lines))
    text.highlight_words(["best so far"], "green")
    to.print(text, soft_wrap=True)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    below: Sequence[Sequence[Any]] = (),
    *,
    drop: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> None:
    """Print a table to stdout, without breaking words or numbers.

    A table that is too wide for the terminal is narrowed in this order: `texts` are shortened, headings are wrapped, the
    columns of `drop` are removed, and finally each row is printed as lines of names and values.

    Args:
        columns: headings.
        rows: cells.
        below: summary rows.
        drop: headings of columns that can be removed, the least important first.
        texts: headings of columns that can be shortened.
    """
    columns = [plain(column) for column in columns]
    cells = [[show(value) for value in row] for row in (*rows, *below)]
    for broken, dropped in ((False, 0), *((True, number) for number in range(len(drop) + 1))):
        kept = [number for number, name in enumerate(columns) if name not in drop[:dropped]]
        widths = {}
        for number in kept:
            heading = max(map(cell_len, columns[number].split(" "))) if broken else cell_len(columns[number])
            widest = max((cell_len(row[number]) for row in cells), default=0)
            widths[number] = max(heading, min(widest, _TEXT_WIDTH) if columns[number] in texts else widest)
        spare = out.width - sum(widths.values()) - 3 * (len(kept) - 1)
        if spare >= 0:
            for number in kept:
                if columns[number] in texts:
                    widths[number] += spare // len(texts)
            _grid(columns, cells, len(rows), widths, texts)
            if dropped:
                out.print(f"too narrow for: {', '.join(drop[:dropped])}", style="dim", soft_wrap=True)
            return
    for row in cells:
        named = [(name, cell) for name, cell in zip(columns, row, strict=True) if cell]
        head = f"{columns[0]} {row[0]}".lstrip() if _NUMBER.match(row[0]) else row[0]
        line(out, head, [f"{name} {cell}" for name, cell in named[bool(row[0]) :] if name not in texts])
        for text in [cell for name, cell in named if name in texts]:
            out.print(Padding(_short(text), (0, 0, 0, 2)))


def _grid(
    columns: Sequence[str], cells: Sequence[Sequence[str]], rows: int, widths: Mapping[int, int], texts: Sequence[str]
) -> None:
    """A table of the columns with a width, with a rule after this many rows; numbers are right-aligned."""
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, width in widths.items():
        numbers = number > 0 and any(_NUMBER.match(row[number]) for row in cells)
        flexible = {"max_width": width} if columns[number] in texts else {"width": width}
        grid.add_column(escape(columns[number]), justify="right" if numbers else "left", **flexible)  # type: ignore[arg-type]
    for count, row in enumerate(cells):
        if count == rows:
            grid.add_section()
        grid.add_row(*[_short(row[n]) if columns[n] in texts else escape(row[n]) for n in widths])
    out.print(grid)


def _short(text: str) -> Text:
    return Text(text[: min(out.width, _FILE_TEXT)], no_wrap=True, overflow="ellipsis")


def label_table(by_label: Mapping[str, Mapping[str, float]], confusion: Sequence[Sequence[int]] | None = None) -> None:
    """Print precision, recall, F1 and support of each label, their averages, and the accuracy if there is a matrix."""
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
    """Print wrong answers with their texts; the file is omitted if all are from the same one."""
    if not rows:
        out.print("no wrong answers")
        return
    one_file = len({row["place"].rpartition(", ")[0] for row in rows}) == 1
    names = [name for name in rows[0] if name != "texts"]
    titles = [{"place": "row", "label": "gold", "prediction": "predicted"}.get(name, name) for name in names]
    texts = ["text" if number == 0 else f"text {number + 1}" for number in range(len(rows[0]["texts"]))]
    cells = [
        [show(row[name]) or "-" for name in names] + [" ".join(text.split()) for text in row["texts"]] for row in rows
    ]
    for row in cells:
        row[0] = row[0].rpartition(", " if one_file else "/")[2]
    table([*titles, *texts], cells, texts=texts)


def show(value: Any) -> str:
    """Format a value for reading."""
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


def duration(seconds: float) -> str:
    """Format a duration: `2 h 5 min`, `12 min` or `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def percent(value: float) -> str:
    """Format a fraction as a percentage."""
    return f"{100 * value:.1f}%"


class Bars(Progress):
    """Progress bars on stderr that disappear when done. At any width they show the count, the total and the time left."""

    def __init__(self) -> None:
        super().__init__(console=err, transient=True, disable=not err.is_terminal, expand=True)

    def get_renderables(self) -> Iterator[RenderableType]:
        """One line per task: name, bar, count, time left, and as many details as fit."""
        for task in self.tasks:
            if task.visible:
                yield self._line(task)

    def show(self, what: str, done: int, total: int | None, details: Sequence[str] = (), left: str = "") -> None:
        """Update a bar.

        Args:
            what: name of the bar; if `done` decreases, the bar restarts.
            done: steps done.
            total: total steps. Default: unknown.
            details: details to show next to it, the most important first.
            left: time left. Default: estimated from the speed so far.
        """
        task = next((it for it in reversed(self.tasks) if it.description == what), None)
        number = self.add_task(what, total=total) if task is None or task.completed > done else task.id
        self.update(
            number, completed=done, total=total, visible=total is None or done < total, details=details, left=left
        )

    def _line(self, task: Task) -> RenderableType:
        total = "?" if task.total is None else f"{task.total:,.0f}"
        left = task.fields.get("left") or str(TimeRemainingColumn(elapsed_when_finished=True).render(task))
        kept = f"{task.completed:,.0f}/{total} {left}"
        room = err.width - cell_len(task.description) - cell_len(kept) - 2
        for detail in task.fields.get("details", ()):
            if room - cell_len(detail) - 2 < _BAR:
                break
            room, kept = room - cell_len(detail) - 2, f"{kept}  {detail}"
        parts: list[RenderableType] = [plain(task.description), plain(kept)]
        if room >= _BAR:
            parts.insert(1, ProgressBar(task.total, task.completed, min(room, 40), pulse=task.total is None))
        grid = Table.grid(padding=(0, 1, 0, 0))
        for _ in parts:
            grid.add_column(no_wrap=True, overflow="crop")
        grid.add_row(*[Text(part) if isinstance(part, str) else part for part in parts])
        return grid


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars that disappear when done; yields a function of (what, done, total)."""
    with Bars() as progress:
        yield progress.show


@contextmanager
def status(first: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a changing line; nothing without a terminal."""
    with err.status(first) as spinner:
        yield spinner.update
