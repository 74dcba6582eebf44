"""What bash, zsh and fish are offered, by the protocol of the scripts that typer installs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from craft_cli.cli.completion import TASKS
from craft_cli.config import METHOD_OPTIONS, shipped_recipes
from craft_cli.tasks import glue

CODE = """
import json, sys
from craft_cli.cli import app
try:
    app([], prog_name="craft")
except SystemExit:
    pass
print(json.dumps(sorted({"torch", "transformers", "datasets"} & set(sys.modules))), file=sys.stderr)
"""


def offered(shell: str, *words: str) -> str:
    line = " ".join(["craft", *words])
    asked = {"_CRAFT_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        asked |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    else:
        asked |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | asked, capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stderr.splitlines()[-1]) == []
    return done.stdout


@pytest.mark.parametrize(
    ("shell", "words", "names"),
    [
        ("bash", ("train", "--recipe", "roberta-base-s"), ["roberta-base-sst2", "roberta-base-stsb"]),
        ("zsh", ("train", "--method", "lo"), ['"lora"', '"lora-xs"', '"lotr"']),
        ("fish", ("eval", "runs/o"), ["runs/one"]),
    ],
)
def test_names_are_offered_without_torch(shell: str, words: tuple[str, ...], names: list[str]) -> None:
    for run in ("runs/one", "runs/two"):
        Path(run).mkdir(parents=True)
        Path(run, "recipe.yaml").write_text("task: sst2")
    text = offered(shell, *words)
    assert text.split() == (names if shell != "zsh" else f"_arguments '*: :(({' '.join(names)}))'".split())


def test_what_is_offered_is_what_there_is() -> None:
    from craft_cli.cli import completion

    assert set(TASKS) == {*glue.TASKS, *glue.SAMPLES}
    assert set(METHOD_OPTIONS) <= set(completion._NAMES["method"])
    Path("mine").mkdir()
    Path("mine/recipe.yaml").write_text("task: sst2")
    assert completion.runs("") == ["mine"]
    assert completion.recipes("") == list(shipped_recipes())
    for name in ("save_strategy", "task_type", "problem_type", "head_start", "class_weights", "adapter_factors"):
        offer = completion.of_setting(name)
        assert offer is not None
        assert offer("")
    assert completion.of_setting("seed") is None
