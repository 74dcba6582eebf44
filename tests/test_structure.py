"""The house of DESIGN section 3: which module may import which, read from the source."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import craft_cli

PACKAGE = Path(craft_cli.__file__).parent
ROOT = PACKAGE.parent
MOST_LINES = 420

LAYERS = (
    {"cli", "__main__"},
    {"console"},
    {"decomposition", "training", "evaluation", "merging", "inspection", "launch"},
    {"tasks", "data", "batches", "runs", "models", "cards", "plots"},
    {"attached"},
    {"projections"},
    {"factors", "checkpoints", "files"},
    {"adapter"},
    {"views", "tucker"},
    {"config"},
    {"ranks"},
    {"errors"},
)
"""From the top down: a module may import its own layer and those below it."""

FREE_OF_OURS = {"adapter": {"tucker", "views"}, "tucker": set[str](), "views": set[str](), "errors": set[str]()}
"""These know torch at most; they must work without transformers, files and the rest of craft."""


def module_of(path: Path) -> str:
    """`tucker` for craft_cli/tucker/ops.py, `factors` for craft_cli/factors.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources(*modules: str) -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not modules or module_of(path) in modules]


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Every module imported anywhere in a file, function bodies included; not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(node) for test in tests for statement in test.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                yield (*(node.module or "").split("."), alias.name)


def ours(path: Path) -> set[str]:
    """The modules of craft that a file imports, itself apart."""
    found = {name[1] for name in imports(path) if name[0] == "craft_cli" and len(name) > 1}
    return (found & {module_of(other) for other in sources()}) - {module_of(path)}


def test_every_module_has_a_layer() -> None:
    assert sorted(name for layer in LAYERS for name in layer) == sorted(
        {module_of(path) for path in sources()} - {"__init__"}
    )


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer} | {"__init__": -1}
    up = [name for name in ours(path) if level[name] < level[module_of(path)]]
    assert up == [], f"{module_of(path)} imports what stands above it"


def test_modules_of_one_layer_do_not_go_round_in_circles() -> None:
    graph = {module_of(path): set[str]() for path in sources()}
    for path in sources():
        graph[module_of(path)] |= ours(path)
    while graph:  # take away those that import nothing which is left
        done = {name for name, imported in graph.items() if not imported & set(graph)}
        assert done, f"a circle among {sorted(graph)}"
        graph = {name: imported for name, imported in graph.items() if name not in done}


@pytest.mark.parametrize("name", FREE_OF_OURS)
def test_the_maths_knows_torch_and_nothing_above_it(name: str) -> None:
    for path in sources(name):
        assert ours(path) <= FREE_OF_OURS[name]
        others = {found[0] for found in imports(path)} - set(sys.stdlib_module_names) - {"craft_cli"}
        assert others <= {"torch"}


def test_the_maths_is_free_of_the_leaves_too() -> None:
    assert all(not ours(path) & {"errors", "config", "ranks"} for path in sources("tucker", "adapter", "views"))


def test_only_the_command_line_knows_the_console_and_only_they_print() -> None:
    for path in sources():
        if module_of(path) in ("cli", "console", "__main__"):
            continue
        assert "console" not in ours(path)
        assert not {name[0] for name in imports(path)} & {"rich", "typer"}
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert "print" not in {call.id for call in calls if isinstance(call, ast.Name)}, path


def test_nothing_imports_the_vendored_click() -> None:
    assert not [path for path in sources() if any(name[0] == "click" for name in imports(path))]


@pytest.mark.parametrize("folder", ["craft_cli", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    long = {
        path.name: count
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert long == {}


HELP = """
import json, sys
from craft_cli.cli import app

HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "matplotlib", "sklearn", "huggingface_hub", "pydantic")
loaded = {}
for command in ("", "decompose", "train", "eval", "merge", "inspect"):
    try:
        app([*command.split(), "--help"], prog_name="craft")
    except SystemExit as end:
        assert not end.code
    loaded[command] = [name for name in HEAVY if name in sys.modules]
print(json.dumps(loaded), file=sys.stderr)
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: craft") == 6
    loaded = json.loads(done.stderr)
    assert loaded.pop("") == []  # every module of the command line is imported by now
    assert {name for names in loaded.values() for name in names} <= {
        "pydantic"
    }  # typer from 0.29 on brings it, not craft
