"""The house: imports point one way, help is light, files are short, the docs name every command."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import craft_cli as craft
from craft_cli.methods import METHODS

PACKAGE = Path(__file__).parent.parent / "craft_cli"

# What the modules of a room may import of ours, besides their own room.
BELOW = {"files", "config", "errors", "tucker"}
MAY_IMPORT = {
    "errors": set(),
    "installation": set(),
    "tucker": set(),
    "config": {"errors"},
    "files": {"errors"},
    "plots": {"files", "errors"},
    "data": BELOW,
    "models": BELOW,
    "methods": BELOW | {"models"},
    "tasks": BELOW | {"data"},
    "training": BELOW | {"methods", "models", "tasks", "data", "plots"},
    "sweeps": BELOW | {"training", "tasks", "data", "plots"},
    "api": BELOW | {"sweeps", "training", "methods", "models", "tasks", "data", "plots", "installation"},
    "cli": BELOW | {"api", "sweeps", "training", "methods", "models", "tasks", "data"},
}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, list[Path]]:
    """The files of every room: a folder, or a file by itself."""
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("__init__", "__main__"):
            found.setdefault(parts[0], []).append(path)
    return found


def rooms_imported(path: Path) -> set[str]:
    return {full.split(".")[1] for full in imported(path) if full.startswith("craft_cli.")} - {"__version__"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room: str) -> None:
    for path in modules()[room]:
        assert rooms_imported(path) - {room} <= MAY_IMPORT[room], path


def test_the_rooms_are_these_and_few() -> None:
    assert set(modules()) == set(MAY_IMPORT)
    folders = [path for path in PACKAGE.rglob("*/") if path.is_dir() and any(path.glob("*.py"))]
    files = [path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(folders) - 1 + len(files) <= 16


@pytest.mark.parametrize("name", ["tucker", "methods/craft/change", "methods/adapter", "models/views"])
def test_the_core_knows_torch_alone(name: str) -> None:
    allowed = {"torch", "craft_cli"} | set(sys.stdlib_module_names)
    path = PACKAGE / name
    for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        assert {full.split(".")[0] for full in imported(file)} <= allowed, file
        assert rooms_imported(file) <= {"tucker", "models", "methods", "errors"}, file


def test_files_and_functions_are_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name}"
    for path in Path(__file__).parent.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 420, path


def test_imports_make_no_circle() -> None:
    """Between files too, imports inside functions and for types left out."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    arrows = {name: at_import(path) & set(files) - {name} for name, path in files.items()}
    while leaves := [name for name, others in arrows.items() if not others & set(arrows)]:
        for name in leaves:
            del arrows[name]
    assert not arrows


def at_import(path: Path) -> set[str]:
    """What is imported as soon as a file is."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


WORDS = {
    # what is said in these places only
    "classif": ("tasks/", "config/", "cli/", "api/doctor.py", "models/cards.py"),
    "hosvd": ("methods/craft/", "methods/lotr.py", "tucker/", "cli/", "config/", "api/decompose.py", "api/advise.py", "api/inspect.py",
              "api/doctor.py", "__init__.py"),
    "u_layer": ("methods/craft/", "tucker/"),
    "k_out": ("methods/craft/", "tucker/"),
    "transform.{": ("methods/craft/",),
    "base_model.model.": ("methods/as_lora.py",),
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_method_and_a_kind_of_work_are_spoken_of_where_they_live(word: str) -> None:
    for path in PACKAGE.rglob("*.py"):
        if word in path.read_text().lower():
            assert path.relative_to(PACKAGE).as_posix().startswith(WORDS[word]), path


OTHERS = [path.removeprefix("craft_cli.") for name, path in METHODS.items() if name != "craft"]


@pytest.mark.parametrize("owner", [*OTHERS, "tasks.token_classification"])
def test_the_second_tenant_of_a_seam_is_imported_by_its_registry_only(owner: str) -> None:
    """By its name, when it is asked for: nothing else knows that it is there."""
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.startswith(f"craft_cli.{owner}") for name in imported(path)), path


def test_craft_is_known_by_the_commands_about_factors_only() -> None:
    allowed = ("__init__.py", "methods/craft/", "api/decompose.py", "api/advise.py", "api/inspect.py", "api/doctor.py",
               "cli/decompose.py")  # fmt: skip
    for path in PACKAGE.rglob("*.py"):
        if any(name.startswith("craft_cli.methods.craft") for name in imported(path)):
            assert path.relative_to(PACKAGE).as_posix().startswith(allowed), path


COMMANDS = (
    "decompose",
    "train",
    "sweep",
    "eval",
    "predict",
    "chat",
    "merge",
    "inspect",
    "methods",
    "doctor",
    "recipes",
)


def test_help_imports_nothing_heavy_and_both_spellings_work() -> None:
    code = """
import json, sys
from craft_cli.cli import app
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments, prog_name="craft")
    except SystemExit as end:
        assert end.code == 0, arguments
heavy = {"torch", "transformers", "datasets", "accelerate", "sklearn", "matplotlib", "safetensors", "pydantic", "optuna"}
sys.exit(f"imported: {heavy & set(sys.modules)}" if heavy & set(sys.modules) else 0)
"""
    calls = [
        ["--help"],
        *[[command, "--help"] for command in COMMANDS],
        ["train", "--data_dir", "x", "--data-dir", "y", "-h"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--head-learning-rate" in done.stdout


@pytest.mark.usefixtures("run")
def test_inspecting_anything_but_a_model_imports_no_transformers() -> None:
    code = """
import sys
from craft_cli.cli import app
for path in sys.argv[1:]:
    try:
        app(["inspect", path], prog_name="craft")
    except SystemExit as end:
        assert not end.code, path
heavy = {"transformers", "datasets", "accelerate", "sklearn", "scipy", "matplotlib", "pyarrow"}
sys.exit(f"imported: {heavy & set(sys.modules)}" if heavy & set(sys.modules) else 0)
"""
    craft.decompose("base", ranks="6,5,2", cache_dir="factors")
    factors = next(Path("factors").glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", code, "run/adapter", "run", str(factors)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("query") >= 3


def test_every_command_family_task_and_recipe_is_in_the_docs() -> None:
    from craft_cli.config import shipped_recipes
    from craft_cli.models.families import FAMILIES
    from craft_cli.tasks.glue import SAMPLES, TASKS

    root = PACKAGE.parent
    readme = (root / "README.md").read_text()
    for command in COMMANDS:
        assert f"craft {command}" in readme, command
    assert len(readme.splitlines()) <= 200
    page = readme + (root / "docs" / "your-data.md").read_text()
    for name in (*FAMILIES, *TASKS, *SAMPLES, *shipped_recipes()):
        assert name in page, name


def test_sample_data_keeps_its_promises() -> None:
    rows = {
        split: [
            json.loads(line) for line in (PACKAGE / "samples" / "opinions" / f"{split}.jsonl").read_text().splitlines()
        ]
        for split in ("train", "validation")
    }
    assert len(rows["train"]) >= 600
    assert len(rows["validation"]) >= 200
    for split in rows.values():
        assert sum(row["label"] == "positive" for row in split) * 2 == len(split)
    words = [frozenset(row["text"].lower().split()) for split in rows.values() for row in split]
    assert len(set(words)) == len(words)
    for number, mine in enumerate(words):
        assert all(len(mine & other) <= 0.6 * len(mine | other) for other in words[:number]), mine


def test_sample_chats_keep_their_promises() -> None:
    """Their validation answers show whether the voice was learned, not which chats were seen."""
    chats = {
        split: [
            json.loads(line)["messages"]
            for line in (PACKAGE / "samples" / "lighthouse" / f"{split}.jsonl").read_text().splitlines()
        ]
        for split in ("train", "validation")
    }
    assert len(chats["train"]) >= 120
    assert len(chats["validation"]) >= 24
    assert sum(len(chat) > 2 for chat in chats["train"]) >= 12
    questions = [chat[0]["content"].lower() for split in chats.values() for chat in split]
    assert len(set(questions)) == len(questions)
    for chat in (chat for split in chats.values() for chat in split):
        assert [message["role"] for message in chat] == ["user", "assistant"] * (len(chat) // 2)
        for message in chat[1::2]:
            assert re.fullmatch(r"[^.!?]+\. By the lamp, [^.!?]+[.?]", message["content"]), message
