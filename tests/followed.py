"""Follow README and docs: run the commands and snippets that a page prints, and compare what they print.

    python tests/followed.py README.md            # in an empty folder, with the installed `craft`; exit 1 if anything differs
    python tests/followed.py --write docs/*.md    # put what is printed today into the pages

A fence ```console holds commands (`$ craft ...`) and what they print; a line `...` stands for lines that are left out. Fences of
```python run too. A fence with title="FILE" is a file that the commands after it find. A comment above a fence says how it is treated:

    <!-- slow -->               runs in `pytest -m slow` only
    <!-- needs: vllm -->        runs where a Python package of this name is installed; elsewhere only the flags of craft are parsed
    <!-- interrupt: epoch 2 --> gets Ctrl-C once it has printed this
    <!-- varies -->             most lines must be as printed, not all: which rows they show depends on the machine

Marks of one fence stand in one comment, as <!-- slow; needs: peft -->.

`outputs.py` says what must be the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from outputs import BAR, difference, mostly, refreshed

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(
    r"(?P<marks>(?:^<!-- [^\n]* -->\n)*)^```(?P<kind>\w+)(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
_TITLE = re.compile(r'title="([^"]+)"')
_MARKS = ("slow", "needs", "interrupt", "varies")


@dataclass
class Command:
    """A command, its first line in the page, and what is shown below it."""

    words: str
    first: str
    shown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """A fence of a page.

    Attributes:
        marks: from the comments above it, such as {"needs": "vllm"}.
        title: the file that it is.
    """

    page: str
    kind: str
    body: str
    marks: dict[str, str]
    title: str | None

    @property
    def needs_more(self) -> bool:
        """Whether it cannot run here."""
        needed = self.marks.get("needs")
        return bool(needed) and not (str(needed).isidentifier() and importlib.util.find_spec(str(needed)))

    @property
    def commands(self) -> list[Command]:
        """Of a console fence; a line that ends in a backslash goes on."""
        found: list[Command] = []
        for line in self.body.splitlines():
            if line.startswith("$ "):
                found.append(Command(line[2:], line))
            elif found and found[-1].words.endswith("\\"):
                found[-1].words = found[-1].words[:-1].rstrip() + " " + line.strip()
            elif found:
                found[-1].shown.append(line)
            else:
                raise ValueError(f"{self.page}: a console fence begins with '$ ', not with {line!r}")
        return found


def blocks(page: Path) -> list[Block]:
    """All fences of a page, in order."""
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else str(page)
    found = []
    for fence in _FENCE.finditer(page.read_text(encoding="utf-8")):
        comments = "; ".join(re.findall(r"<!-- (.*) -->", fence["marks"]))
        marks = {name: value for name, _, value in (mark.partition(": ") for mark in comments.split("; ") if mark)}
        if unknown := set(marks) - set(_MARKS):
            raise ValueError(f"{name}: unknown mark {unknown}")
        title = _TITLE.search(fence["info"])
        found.append(Block(name, fence["kind"], fence["body"], marks, title[1] if title else None))
    return found


# Parsing


_CRAFT = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:craft|(?:accelerate launch|torchrun) .*?-m craft_cli)\b")


def craft_calls(words: str) -> Iterator[list[str]]:
    """The arguments of every call of craft in a line of the shell, started by a launcher or not."""
    for part in re.split(r"&&|\|\||[|;]", words):
        if call := _CRAFT.match(part.strip()):
            yield shlex.split(re.sub(r"[<>] *\S+", "", part.strip()[call.end() :]), comments=True)


def parse(arguments: list[str], *, whole: bool = True) -> None:
    """Parse a call of craft as the command line does, without running it.

    Args:
        arguments: of the call.
        whole: check the settings of a training too; in running text they are often only those that matter there.

    Raises:
        Exception: an unknown command or flag, or settings that contradict each other.
    """
    import typer

    from craft_cli.cli import app
    from craft_cli.config import RunConfig, load_recipe
    from craft_cli.errors import ConfigError

    command: Any = typer.main.get_command(app)
    context = command.make_context("craft", list(arguments), resilient_parsing=True)
    while hasattr(command, "resolve_command") and (rest := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, rest)
        if not command:
            raise ValueError(f"no command {arguments[0]}")
        context = command.make_context(name, rest, parent=context)
    if whole and arguments[:1] == ["train"]:
        given = {name: context.params[name] for name in (f.name for f in RunConfig.settings())}
        recipe = context.params.get("recipe")
        try:
            recipe = load_recipe(recipe) if recipe else {}
        except ConfigError:  # of the reader's own
            recipe = {"task": "opinions"}
        if not given.get("resume"):
            RunConfig.build(given, recipe)


# Running


@dataclass
class World:
    """A folder in which pages are followed.

    Attributes:
        inside: run craft in this process where possible, which saves its start.
        known: what commands that train or merge have printed, so that a second page that shows one does not do it again.
    """

    folder: Path
    inside: bool = True
    known: dict[str, tuple[int, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """As in a checkout: its scripts are there."""
        self.folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (self.folder / "benchmarks").symlink_to(ROOT / "benchmarks")

    def copy(self, folder: Path) -> World:
        """Another folder with all that is in this one."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return World(folder, self.inside, self.known)

    def follow(self, page: Path, *, slow: bool = True, names: dict[str, Any] | None = None) -> list[str]:
        """Run what a page prints; gives a line for everything that differs."""
        return [line for _, _, line in self.differences(page, slow=slow, names=names)]

    def differences(
        self, page: Path, *, slow: bool = True, names: dict[str, Any] | None = None
    ) -> Iterator[tuple[Command | None, str, str]]:
        """As `follow`: what differs, with the command and all that it printed."""
        names, script = {"__name__": "__main__"} if names is None else names, ""
        for block in blocks(page):
            if block.needs_more or ("slow" in block.marks and not slow):
                continue
            if block.title:
                (self.folder / block.title).write_text(block.body, encoding="utf-8")
            elif block.kind == "python" and self.inside:
                self._execute(block, names)
            elif block.kind == "python":
                script += block.body
                code, printed = self._run(f"python -c {shlex.quote(script)}")
                if code:
                    yield None, printed, f"{block.page}: {block.body}: {printed[-2000:]}"
            elif block.kind == "console":
                for command in block.commands:
                    code, printed = self.run(command.words, block.marks)
                    expected = (
                        130
                        if "interrupt" in block.marks
                        else int(command.shown[:1] != [] and "error: " in command.shown[0])
                    )
                    told = mostly if "varies" in block.marks else difference
                    lines = [line for line in printed.splitlines() if not BAR.match(line)]
                    if code != expected:
                        yield None, printed, f"{block.page}: $ {command.words}: exit code {code}: {printed[-2000:]}"
                    elif command.shown and (wrong := told(command.shown, lines)):
                        yield command, printed, f"{block.page}: $ {command.words}: {wrong}"

    def _execute(self, block: Block, names: dict[str, Any]) -> None:
        """A snippet, whose libraries may warn and log as they like."""
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.chdir(self.folder),
            warnings.catch_warnings(),
            mock.patch("logging.raiseExceptions", False),
        ):
            warnings.simplefilter("ignore")
            exec(compile(block.body, block.page, "exec"), names)
        if state := sys.modules.get("accelerate.state"):
            state.AcceleratorState._reset_state()  # the Hugging Face Trainer leaves its own behind

    def run(self, words: str, marks: dict[str, str]) -> tuple[int, str]:
        """Exit code and output of a line of the shell."""
        if words not in self.known:
            done = self._interrupted(words, marks["interrupt"]) if "interrupt" in marks else self._run(words)
            if not re.match("craft (train|merge)", words) or "--resume" in words:
                return done
            self.known[words] = done
        return self.known[words]

    def _run(self, words: str) -> tuple[int, str]:
        inside = re.fullmatch(r"(?:echo (?P<text>\"[^\"]*\"|\w+) \| )?craft (?P<arguments>[^|&;<>]*)", words)
        if not (self.inside and inside):
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", words], cwd=self.folder, env=self._environment(), check=False, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            return done.returncode, done.stdout
        from typer.testing import CliRunner

        from craft_cli.cli import app, console

        text = shlex.split(inside["text"])[0] + "\n" if inside["text"] else None
        with contextlib.chdir(self.folder), mock.patch.object(console.err, "_width", 120):
            result = CliRunner().invoke(app, shlex.split(inside["arguments"]), input=text)
        return result.exit_code, result.output

    def _interrupted(self, words: str, after: str) -> tuple[int, str]:
        """Ctrl-C once a line with these words is printed."""
        with subprocess.Popen(
            shlex.split(words), cwd=self.folder, env=self._environment(), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, executable=shutil.which("craft", path=self._environment()["PATH"]),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it is ignored below nohup
        ) as process:  # fmt: skip
            assert process.stdout
            printed, sent = "", False
            for line in process.stdout:
                printed += line
                if after in line and not sent:
                    process.send_signal(signal.SIGINT)
                    sent = True
        return process.returncode, printed

    def _environment(self) -> dict[str, str]:
        """With the `craft` and `python` of this interpreter first."""
        paths = [str(ROOT)] if self.inside else []
        return os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "COLUMNS": "120",
        }


def write(page: Path, world: World) -> None:
    """Put what commands print now into a page."""
    text = page.read_text(encoding="utf-8")
    for command, printed, line in world.differences(page):
        print(line[:400])
        if command:
            lines = [line for line in printed.splitlines() if not BAR.match(line)]
            above = text.index("\n".join(command.shown), text.index(command.first))
            text = text[:above] + text[above:].replace(
                "\n".join(command.shown), "\n".join(refreshed(command.shown, lines)), 1
            )
    page.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="refresh the output in the pages")
    asked = parser.parse_args()
    pages = [page.resolve() for page in asked.pages]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), inside=False)
        for page in pages:
            if asked.write:
                write(page, world)
            else:
                wrong += world.follow(page)
    print("\n".join(wrong) or f"followed {', '.join(page.name for page in pages)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
