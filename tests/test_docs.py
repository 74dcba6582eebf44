"""The docs are true: pictures, files, functions, code and links are those of the project; what commands print is printed today."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from followed import World, blocks, craft_calls, parse
from outputs import alike, difference, refreshed

from craft_cli.files import FORMAT_VERSION

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
        path, _, anchor = target.partition("#")
        if re.match(r"https?://|mailto:", target) or path == "commands.md":  # which is made when the site is built
            continue
        there = (ROOT / page).parent.joinpath(path) if path else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(str(page.resolve().relative_to(ROOT))), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


# -- what the pages print -----------------------------------------------------------------------------------------------

START = ROOT / "docs" / "index.md"
"""Whose run the other pages continue with."""
FOLLOWED = [ROOT / page for page in PAGES if page not in (*GUIDES, PROMISES)]
printed = pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.name)


@printed
def test_commands_and_flags_that_a_page_names_are_those_of_craft(page: Path) -> None:
    """Also of commands that need what is not here, and in running text."""
    commands = [command.words for block in blocks(page) if block.kind == "console" for command in block.commands]
    words = text(str(page.relative_to(ROOT)))
    quoted = QUOTED.findall(prose(str(page.relative_to(ROOT))))
    for line in commands:
        for arguments in craft_calls(line):
            parse(arguments)
    for line in (word for word in quoted if word.startswith("craft ") and "--" in word):
        for arguments in craft_calls(line):
            arguments = [a for a in arguments if a != "--help"]
            parse([*arguments, "value"] if arguments[-1] in OPEN else arguments, whole=False)
    known = set(re.findall(r"`(--[\w-]+)`", hooks().command_reference())) | OF_OTHERS
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", words):
        assert flag in known, flag


OPEN = ("--budget", "--recipe", "--energy")
"""Flags that running text names without their values."""
OF_OTHERS = {"--lora", "--no-deps",
    # flags of pip, accelerate, torchrun, vllm, llama.cpp, tests/training/torture.py, and --help
    "--config_file", "--nnodes", "--nproc-per-node", "--master-addr", "--master-port", "--node-rank", "--runner", "--outfile",
    "--max-lora-rank", "--kills", "--help",
}  # fmt: skip


@printed
def test_a_page_prints_commands_in_fences_that_are_followed(page: Path) -> None:
    for block in blocks(page):
        assert block.kind in {"console", "python", "yaml", "csv", "json"}, (page, block.kind)
        assert block.kind != "console" or block.commands
    assert not re.search(r"^\s+\$ |^    (?:craft|pip|python) ", words_outside(page), re.MULTILINE)


def words_outside(page: Path) -> str:
    return prose(str(page.relative_to(ROOT)))


@printed
def test_a_page_is_followed(page: Path, tmp_path: Path) -> None:
    """Its quick commands, alone."""
    assert World(tmp_path).follow(page, slow=False) == []


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, list[str]]]:
    """A folder in which the page of the start was followed, and what differed."""
    world = World(tmp_path_factory.mktemp("docs"))
    with pytest.MonkeyPatch.context() as patch:  # a cache of their own says nothing of earlier versions
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield world, world.follow(START)


@pytest.mark.slow
@printed
def test_a_page_is_followed_from_top_to_bottom(page: Path, started: tuple[World, list[str]], tmp_path: Path) -> None:
    """Trainings too, after the page of the start."""
    world, wrong = started
    assert (wrong if page == START else world.copy(tmp_path / "page").follow(page)) == []


def test_the_format_version_is_the_one_described() -> None:
    assert f"The version is {FORMAT_VERSION};" in text("docs/files.md")


def test_what_matters_of_an_output_is_compared() -> None:
    assert alike("│ data  800 to train on │", "data 800 to train on")
    assert not alike("data  800 to train on", "data  801 to train on")
    assert alike("accuracy 0.7591  loss 0.5049  best so far", "accuracy 0.7500  loss 0.5120")
    assert not alike("accuracy 0.7591", "accuracy 0.5091")
    assert not alike("accuracy 0.7591", "precision 0.7591")
    assert not alike("learning_rate 0.01", "learning_rate 0.001")
    assert alike("differ by 2.4e-07 of the largest (allowed 1e-05)", "differ by 9e-07 of the largest (allowed 1e-05)")
    assert not alike(
        "differ by 2.4e-07 of the largest (allowed 1e-05)", "differ by 9e-03 of the largest (allowed 1e-02)"
    )
    assert alike("time  300 updates in 44 s", "time  300 updates in 1,044 s")
    assert alike("run runs/a-20261127-220531/adapter", "run runs/a-20261128-000000/adapter")
    assert alike("finished  6  opinions  2026-11-28 08:43", "finished  6  opinions  2026-11-29 10:07")
    assert difference(["a", "...", "c"], ["a", "b", "c"]) is None
    assert difference(["a", "c"], ["a", "b", "c"])
    assert difference(["a"], ["a", "b"])
    assert difference(["...", "b"], ["a", "b", "c"])
    assert difference(["x  seconds", "1  20"], ["x  seconds", "1  35"]) is None


def test_a_page_can_be_refreshed() -> None:
    shown = ["first 1", "...", "said 3", "last 4"]
    assert refreshed(shown, ["first 1", "between", "told 3", "last 4"]) == ["first 1", "...", "told 3", "last 4"]
    now = ["╭─ a ────╮", "│ x 1    │", "│ y long │", "╰────────╯"]
    assert refreshed(["╭─ a ─╮", "│ x 1 │", "│ y   │", "╰─────╯"], now) == now


def test_marks_of_a_fence_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- slow; needs: vllm -->\n```console\n$ craft merge \\\n    --trim\nmerged\n```\n")
    (block,) = blocks(page)
    assert block.marks == {"slow": "", "needs": "vllm"}
    assert [(c.words, c.shown) for c in block.commands] == [("craft merge --trim", ["merged"])]
    page.write_text("<!-- quick -->\n```console\n$ craft\n```\n")
    with pytest.raises(ValueError, match="unknown mark"):
        blocks(page)


# -- the site -----------------------------------------------------------------------------------------------------------


@cache
def hooks() -> Any:
    specification = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_command_reference_has_every_setting() -> None:
    from craft_cli.config import RunConfig, flag

    reference = hooks().command_reference()
    for field in RunConfig.settings():
        assert f"`{flag(field.name)}`" in reference, field.name
    assert reference.count("\n## craft ") == 11


def test_links_out_of_docs_become_pages_or_words() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="resume.md"))
    moved = hooks().on_page_markdown
    assert moved("[b](../benchmarks/README.md#data) [r](ranks.md) [x](../tests/followed.py)", page) == (
        "[b](benchmarks/index.md#data) [r](ranks.md) x"
    )
