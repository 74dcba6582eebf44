"""Hooks of mkdocs: the command reference, generated from the command line, and pages outside of docs/."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "benchmarks/README.md": "benchmarks/index.md",
    "benchmarks/speed.png": "benchmarks/speed.png",
    "benchmarks/growth.png": "benchmarks/growth.png",
    "benchmarks/methods_demo_sst2.png": "benchmarks/methods_demo_sst2.png",
    "benchmarks/methods_demo_mrpc.png": "benchmarks/methods_demo_mrpc.png",
    "CONTRIBUTING.md": "contributing.md",
}
"""Files of the project that are pages and pictures of the site."""
WIDE = ("comparison.md",)
"""Pages without a table of contents, to make room for a wide table."""
_NAME = re.compile(r"(`[\w./]+::[\w.]+`)")
"""A name in a file, such as `training/loop.py::run`."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:#]+)((?:#[^)\s]*)?)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures outside of docs/."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "commands.md", content=command_reference()))
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the project into links between pages, and mark names in files for `extra.css`.

    A link to a file that is not a page becomes plain text.
    """
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    inside = {there: here for here, there in ELSEWHERE.items()}
    source = inside.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        picture, words, target, anchor = link.groups()
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = ELSEWHERE.get(there, there.removeprefix("docs/") if there.startswith("docs/") else "")
        if there == "" or (ROOT / "docs" / there).suffix not in (".md", ".png", ".svg"):
            return words
        return f"{picture}[{words}]({posixpath.relpath(there, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return _NAME.sub(r"\1{.name}", _LINK.sub(moved, markdown))


def command_reference() -> str:
    """All commands with their arguments and options, from the Typer app."""
    import typer

    from craft_cli.cli import app

    lines = [
        "# Commands",
        "",
        "This page lists the same commands and flags as `craft COMMAND --help`. You can write a flag as `--a-b` or `--a_b`. A flag",
        "without a default is off, or its value is detected from the data. The exit code is 0 on success, 1 after an error (one line",
        "on stderr), 2 for wrong usage, and 130 or 143 after an interruption.",
    ]
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        lines += ["", f"## craft {name}", "", *_about(command)]
        for below, inner in getattr(command, "commands", {}).items():
            lines += ["", f"### craft {name} {below}", "", *_about(inner)]
    return "\n".join(lines) + "\n"


def _about(command: Any) -> Iterator[str]:
    yield _escaped(command.help.strip().splitlines()[0])
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if not getattr(parameter, "hidden", False) and "--help" not in parameter.opts:
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(parameter)
    for panel, parameters in panels.items():
        yield from ("", f"**{panel}**")
        for parameter in parameters:
            yield from ("", *_parameter(parameter))


def _parameter(parameter: Any) -> Iterator[str]:
    from craft_cli.cli.usage import takes

    if parameter.param_type_name == "argument":
        names, value = f"`{(parameter.metavar or parameter.name).strip('[].').upper()}`", ""
    else:
        names = ", ".join(f"`{name}`" for name in parameter.opts + parameter.secondary_opts)
        value = "" if parameter.is_flag else f" *{takes(parameter)}*"
    default = parameter.default
    if isinstance(parameter.show_default, str):
        default = parameter.show_default
    elif callable(default) or default in (None, False, ...) or default == ():
        default = None
    yield names + value
    yield f":   {_escaped((parameter.help or '').strip())}" + (f" Default: `{default}`." if default else "")


def _escaped(text: str) -> str:
    return re.sub(r"([<>*_|])", r"\\\1", text)
