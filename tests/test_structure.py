"""The house: imports point one way, help is light, files are short, the README names every command."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import craft_cli as craft

PACKAGE = Path(__file__).parent.parent / "craft_cli"

# What a module may import of ours: anything in a lower layer, and its own layer's neighbours.
LAYERS = [
    {"errors"},
    {"ranks", "config"},
    {"views", "tucker"},
    {"adapter"},
    {"files", "metrics", "rows"},
    {"checkpoints", "factors", "shards", "uploads"},
    {"projections", "tasks", "batches", "plots", "cards", "signals", "progress", "sharding", "quantization"},
    {"labels", "tables", "objectives", "bases"},
    {"saved", "attached", "data", "decomposition", "records"},
    {"models", "runs", "tokens", "streamed", "export", "compilation"},
    {"inference", "trackers", "training_state"},
    {"evaluation", "prediction", "submission", "preparation"},
    {"advice", "journal", "starting"},
    {"merging", "inspection", "comparison", "page", "training", "launch", "listing"},
    {"doctor"},
    {"console"},
    {"cli"},
]


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
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("__init__", "__main__"):
            found.setdefault(parts[0], []).append(path)
    return found


def test_imports_point_one_way() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    assert set(modules()) == set(level)
    for name, paths in modules().items():
        for path in paths:
            for other in {full.split(".")[1] for full in imported(path) if full.startswith("craft_cli.")} & set(level):
                assert level[other] <= level[name], f"{path.name} imports {other}"
                assert other != "console" or name in ("cli", "console"), f"{path.name} prints"


@pytest.mark.parametrize("name", ["tucker", "adapter", "views"])
def test_the_core_knows_torch_alone(name: str) -> None:
    allowed = {"torch", "craft_cli"} | set(sys.stdlib_module_names)
    for path in modules()[name]:
        assert {full.split(".")[0] for full in imported(path)} <= allowed, path
        ours = {full.split(".")[1] for full in imported(path) if full.startswith("craft_cli.")}
        assert ours <= {"tucker", "views"}, path


def test_no_file_is_long() -> None:
    for path in [*PACKAGE.rglob("*.py"), *Path(__file__).parent.glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 420, path


COMMANDS = ("decompose", "train", "eval", "predict", "merge", "inspect", "doctor", "recipes")


def test_help_imports_nothing_heavy_and_both_spellings_work() -> None:
    code = """
import json, sys
from craft_cli.cli import app
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments, prog_name="craft")
    except SystemExit as end:
        assert end.code == 0, arguments
heavy = {"torch", "transformers", "datasets", "accelerate", "sklearn", "matplotlib", "safetensors", "pydantic"}
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


def test_every_command_and_family_is_in_the_readme() -> None:
    from craft_cli.config import shipped_recipes
    from craft_cli.models.families import FAMILIES
    from craft_cli.tasks.glue import TASKS

    readme = (PACKAGE.parent / "README.md").read_text()
    shipped = [name for name in shipped_recipes() if not name.startswith("roberta-")]  # `craft recipes` lists those
    for name in (*(f"craft {command}" for command in COMMANDS), *FAMILIES, *TASKS, *shipped):
        assert name in readme, name


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
