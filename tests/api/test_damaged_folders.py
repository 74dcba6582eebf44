"""Base folders, run folders and recipes that are damaged in any way: one line, or they are used as they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build_pico, failure, invoke, opinions, write_rows
from helpers import config

import craft_cli as craft

COUNTS = {"base": 60, "run": 12, "recipe": 60}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_whatever_is_damaged_is_one_line(kind: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for family in ("bert", "gpt2", "llama") if kind == "base" else ("bert",):
        build_pico(family, made / family)
    build_pico("bert", made / "sharded", max_shard_size="20KB")
    write_rows(made / "data/train.jsonl", opinions(45, 1))
    write_rows(made / "data/validation.jsonl", opinions(23, 2))
    if kind != "base":
        craft.train(config(made / "bert", made / "data", max_steps=4, save_strategy="steps", save_steps=2))
        shutil.move("out", made / "run")
    Path("work").mkdir()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fuzz_folders.py"), str(made), "1", str(COUNTS[kind]), kind],
        cwd="work", env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == {}, found["examples"]
    assert found["refused"] > 0.1 * COUNTS[kind]


@pytest.mark.parametrize("line", ["[]", '{"step": "x"}', '{"step": 2, "loss": [1]}', "[" * 100_000, "{"])
def test_a_damaged_line_of_the_log_is_left_out(line: str, run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n' + line + "\n")
    assert json.loads(invoke("inspect", "run", "--json").stdout)["state"] == "interrupted at step 1"


@pytest.mark.parametrize("content", ['{"metrics": 5}', '{"examples": "x"}', '{"baselines": {"a": 1}}', "[]"])
def test_a_damaged_summary_is_named(content: str, run: Path) -> None:
    (run / "all_results.json").write_text(content)
    assert "all_results.json is damaged" in failure("inspect", "run")
