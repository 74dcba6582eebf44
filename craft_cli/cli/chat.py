"""`craft chat`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from craft_cli.cli import completion
from craft_cli.cli.options import Seed, Temperature, TopP, asks_hub, generation_of, reports_errors, with_settings
from craft_cli.errors import ConfigError, CraftError, nearest, plain

if TYPE_CHECKING:
    from craft_cli.api.chat import Chat

_BESIDE = 100
"""Minimum terminal width for two answers side by side."""
_LONGEST_WORD = 20
"""Longer text is shown before a space follows, because not all languages use spaces."""
_HELP = {
    "/reset": "clear the conversation; the system message is kept",
    "/system TEXT": "set the system message; without TEXT, use the template's own",
    "/base": "switch between the base model and the tuned one",
    "/save FILE": "append the conversation to a .jsonl file, as a training row",
    "/help": "show this",
    "/exit": "end the chat, as Ctrl-D does; Ctrl-C ends an answer",
}


@reports_errors
@asks_hub
@with_settings("max_new_tokens", "use_cpu", "trust_remote_code", "allow_other_base")
def command(
    path: Annotated[
        str | None,
        typer.Argument(
            help="Run, adapter, checkpoint or hub id.", show_default="the latest run", autocompletion=completion.runs
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answers too.")] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message.", show_default="the template's own")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    **settings: Any,
) -> None:
    """Chat with a fine-tuned language model; /help lists the commands. In a pipe, each line is answered."""
    from craft_cli.cli import console
    from craft_cli.config import parse_settings

    given = parse_settings({name: value for name, value in settings.items() if value is not None})
    given["generation"] = generation_of(given.pop("max_new_tokens", None), temperature, top_p, seed, None)
    if sys.stdout is None:
        raise CraftError("standard output is closed, so there is nowhere to answer")
    with console.status("starting"):
        from craft_cli.api.chat import Chat

        chat = Chat(path, system=system, noticed=console.note, **given)
        if compare:
            chat.check_adapter()
    if not chat.remembers:
        console.note(f"{chat.name} continues texts, so each line is separate")
    typed = bool(sys.stdin and sys.stdin.isatty() and sys.stdout.isatty())
    if typed:
        console.note(f"talking to {chat.name}; /help lists the commands, Ctrl-D ends the chat")
    for line in _typed(chat) if typed else _lines():
        try:
            if re.match(r"/[a-z]*(\s|$)", line):
                if not _obey(chat, line):
                    return
            else:
                _answer(chat, line.strip(), compare=compare and not chat.base)
        except CraftError as error:
            if not typed:
                raise
            console.fail(str(error))


def _typed(chat: Chat) -> Iterator[str]:
    """Read typed lines; Ctrl-C discards a line, Ctrl-D ends."""
    from craft_cli.cli import console

    with suppress(ImportError):
        import readline  # noqa: F401  # enables line editing
    while True:
        try:
            line = input("base> " if chat.base else "> ")
        except EOFError:
            console.out.print()
            return
        except KeyboardInterrupt:
            console.out.print()
            continue
        except UnicodeDecodeError:
            console.fail("this line is not UTF-8")
            continue
        if line.strip():
            yield line


def _lines() -> Iterator[str]:
    """Read the lines of standard input."""
    from craft_cli.data.readers import TEXT, read_stdin

    for row in read_stdin(TEXT):
        if row.cells["text"].strip():
            yield row.cells["text"]


def _obey(chat: Chat, line: str) -> bool:
    """Run a slash command; returns whether the chat continues.

    Raises:
        ConfigError: it says nothing that is known.
    """
    from craft_cli.cli import console

    word, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    known = [name.split()[0] for name in _HELP]
    if word not in known:
        raise ConfigError(f"unknown command {word}{nearest(word, known)}; start a line with a space to send it as text")
    if rest and word not in ("/system", "/save"):
        raise ConfigError(f"{word} takes no argument; remove '{plain(rest)}'")
    if word == "/help":
        console.facts(_HELP, rename=False)
    elif word == "/reset":
        chat.reset()
        console.note("the conversation is cleared")
    elif word == "/system":
        chat.system(rest)
        console.note("the system message is another one from now on" if rest else "the template's own system message")
    elif word == "/base":
        chat.check_adapter()
        chat.base = not chat.base
        console.note("the base model answers" if chat.base else "the tuned model answers")
    elif word == "/save":
        if not rest:
            raise ConfigError("/save needs the name of a file: /save chats.jsonl")
        rows = chat.save(rest)
        console.note(f"saved to {rest}, which has {rows:,} {'row' if rows == 1 else 'rows'} now")
    return word != "/exit"


def _answer(chat: Chat, text: str, *, compare: bool) -> None:
    """Show an answer as it is written, or two."""
    from craft_cli.cli import console

    on_screen = console.out.is_terminal
    if compare and on_screen and console.out.width >= _BESIDE:
        with _beside("tuned", "base") as show:
            chat.compare(text, show)
        return
    hear = _words() if on_screen else _exact
    if not compare:
        answers = [chat.ask(text, hear)]
    else:
        spoken: list[bool] = []

        def heard(base: bool, part: str) -> None:
            if base not in spoken:
                hear("\n" if spoken else "")
                hear("base: " if base else "tuned: ")
                spoken.append(base)
            hear(part)

        answers = list(chat.compare(text, heard))
    hear("\n")
    for answer in answers:
        if not answer.text.strip():
            console.note("the model ended its answer at once: this is left out of the conversation")
    if on_screen and any(answer.why == "length" for answer in answers):
        console.note("the answer was truncated at the token limit; --max-new-tokens allows more")


def _words() -> Callable[[str], None]:
    """Shows a text on the terminal as it is written, its words not broken at the edge."""
    from rich.cells import cell_len
    from rich.text import Text

    from craft_cli.cli.console import out

    column, held = 0, ""

    def put(text: str) -> None:
        nonlocal column
        size = cell_len(plain(text))
        if column + size > out.width and column:
            out.print()
            column, text = 0, text.lstrip(" ")
            size = cell_len(plain(text))
        out.print(Text(text), end="", soft_wrap=True)
        column = column + size if column + size <= out.width else (column + size) % out.width

    def show(part: str) -> None:
        nonlocal column, held
        for piece in re.findall(r"\n|[^\S\n]*[^\s]*", part):
            if piece == "\n" or piece[:1].isspace() or cell_len(held) >= _LONGEST_WORD:
                put(held)
                held = ""
            if piece == "\n":
                out.print()
                column = 0
            else:
                held += piece

    return show


@contextmanager
def _beside(*titles: str) -> Iterator[Callable[[int, str], None]]:
    """Show texts side by side while they are generated; yields a function of (index, new text)."""
    from rich.box import SIMPLE_HEAD
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from craft_cli.cli.console import out

    texts = [""] * len(titles)

    def columns() -> Table:
        grid = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=True)
        for title in titles:
            grid.add_column(title, ratio=1, overflow="fold")
        grid.add_row(*map(Text, texts))
        return grid

    with Live(columns(), console=out, auto_refresh=False) as live:

        def show(which: int, part: str) -> None:
            texts[which] += part
            live.update(columns(), refresh=True)

        yield show


def _exact(part: str) -> None:
    """For a program that reads the answers."""
    print(part, end="", flush=True)
