"""The docs are true: the picture is what the imports say; files, functions, code and links that they name are there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "craft_cli"
HOUSE = ROOT / "docs" / "house.py"
GUIDES = ("docs/architecture.md", "CONTRIBUTING.md")
"""Whose names and code are compared with the files."""
PROMISES = "docs/promises.md"
"""Whose names of tests are compared with the files."""
PAGES = sorted({"README.md", *GUIDES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))})

FENCED = re.compile(r"^```python\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block of code whose first line names its file."""
QUOTED = re.compile(r"`([^`\n]+)`")
PLACE = re.compile(r"([\w./]+\.(?:py|md|svg)|[\w./]+/)(?:::([\w.]+))?")
"""`methods/base.py`, `api/`, or `methods/base.py::Method.prepare`."""
NAME = re.compile(r"[A-Z]\w*[a-z]\w*(?:\.\w+)*|[a-z]+(?:_[a-z]+)+")
"""`Method.prepare` or `load_splits`, without a file."""


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)


def found(path: str) -> Path | None:
    """A file or folder of the project or, in short, of the package."""
    return next((there for there in (ROOT / path, PACKAGE / path) if there.exists()), None)


def defined_in(node: ast.AST, prefix: str = "") -> Iterator[str]:
    """Functions, classes, methods, attributes and constants: `name` or `Class.name`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from defined_in(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.Assign, ast.AnnAssign)):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


@cache
def definitions(path: Path) -> frozenset[str]:
    return frozenset(defined_in(ast.parse(path.read_text(encoding="utf-8"))))


def squeezed(code: str) -> str:
    return " ".join(code.split())


def has_code(source: str, shown: str) -> bool:
    """Whether the parts between the lines of `...` stand in a file in this order, whatever its white space."""
    rest = squeezed(source)
    for part in re.split(r"^\s*\.\.\.$", shown, flags=re.MULTILINE):
        _, there, rest = rest.partition(squeezed(part))
        if not there:
            return False
    return True


def draw(*arguments: str, script: Path = HOUSE) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)


def test_the_picture_is_what_the_imports_say() -> None:
    done = draw("--check")
    assert done.returncode == 0, done.stderr


def test_another_import_is_another_picture(tmp_path: Path) -> None:
    """A small house of its own: drawn twice it is the same, and it is out of date once a room imports another."""
    script, package = tmp_path / "docs" / "house.py", tmp_path / "craft_cli"
    script.parent.mkdir()
    script.write_bytes(HOUSE.read_bytes())
    for name, code in {
        "cli/__init__": '"""The command line. Not shown."""\nfrom craft_cli.errors import E',
        "data/__init__": '"""Rows & more."""',
        "data/a": "from craft_cli import errors, files",
        "files": '"""Writing."""\nimport craft_cli.errors',
        "errors": '"""Errors."""',
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(code)

    assert draw("--check", script=script).returncode == 1
    assert draw(script=script).returncode == 0
    picture = script.with_name("house.svg").read_bytes()
    assert draw("--check", script=script).returncode == 0
    assert draw(script=script).returncode == 0
    assert script.with_name("house.svg").read_bytes() == picture
    assert picture.count(b"marker-end") == 3  # data -> errors follows from data -> files -> errors
    assert all(
        words in picture for words in (b"data/", b"files.py", b"1 module<", b"Rows &amp; more", b"The command line")
    )
    assert b"Not shown" not in picture

    (package / "errors.py").write_text('"""Mistakes."""')
    told = draw("--check", script=script)
    assert (told.returncode, "python docs/house.py" in told.stderr) == (1, True)
    (package / "errors.py").write_text('"""Errors."""')
    (package / "cli" / "b.py").write_text("def f():\n    import craft_cli.data.a")
    assert draw("--check", script=script).returncode == 1


@pytest.mark.parametrize("page", [*GUIDES, PROMISES])
def test_files_and_functions_that_a_guide_names_are_there(page: str) -> None:
    quoted = QUOTED.findall(prose(page))
    places = [place for word in quoted if (place := PLACE.fullmatch(word))]
    assert len(places) > 14
    for place in places:
        path, name = place.groups()
        there = found(path)
        assert there, place[0]
        assert name is None or name in definitions(there), place[0]
    everywhere = frozenset().union(*map(definitions, PACKAGE.rglob("*.py"))) | {"craft_cli"}
    for word in quoted:
        if NAME.fullmatch(word):
            assert word in everywhere, word


@pytest.mark.parametrize("page", GUIDES)
def test_code_that_a_guide_shows_is_the_code(page: str) -> None:
    blocks = FENCED.findall(text(page))
    assert len(blocks) == text(page).count("```") / 2 > 1
    for path, shown in blocks:
        assert has_code(text(path), shown), (path, shown)


def test_code_is_compared_part_by_part_in_order() -> None:
    source = "a = 1\n\n\ndef f(\n    x,\n):\n    return x\n"
    assert has_code(source, "a = 1\n...\n    return x\n")
    assert has_code(source, "def f( x, ):\n")
    assert not has_code(source, "return x\n...\na = 1\n")
    assert not has_code(source, "a = 2\n")


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_project_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"https?://|mailto:|#", target):
            assert (ROOT / page).parent.joinpath(target.partition("#")[0]).exists(), target
