"""Adapters and files of factors come from strangers: whatever they hold, they load right or are refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_pico, classifier, invoke, shake

import craft_cli as craft
from craft_cli.checkpoints import resolve
from craft_cli.errors import ModelError

BOUND = 100 << 20
"""Bytes of memory above the files that are read."""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """What the fuzzer mutates."""
    folder = tmp_path / "good"
    base = build_pico("bert", folder / "base")
    factors = craft.decompose(str(base), ranks=(6, 5, 2))
    adapter = craft.attach(classifier(base), factors)
    shake(adapter)
    adapter.training_record = {
        "task": "sst2", "data": {"task": "sst2", "data_dir": "data"}, "problem_type": "single_label_classification",
        "labels": ["a", "b"], "threshold": 0.5, "max_seq_length": 32, "epoch": 1.0, "metrics": {"accuracy": 0.5},
        "recipe": {"task": "sst2", "ranks": "6,5,2"},
    }  # fmt: skip
    adapter.save(folder / "whole")
    adapter.save(folder / "small", factors="reference")
    assert factors.path is not None
    shutil.copy(factors.path, folder / "factors.safetensors")
    return folder


def fuzz(good: Path, seed: int, count: int) -> dict[str, object]:
    work = good.parent / "work"
    work.mkdir()
    before = sorted(path for path in good.parent.rglob("*") if work not in path.parents)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(work / "cache")}
    shutil.copytree(good.parent / "cache", work / "cache")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fuzz.py"), str(good), str(seed), str(count)],
        cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=60 + count / 10,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path for path in good.parent.rglob("*") if work not in path.parents) == before
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["loaded"] + found["refused"] == count
    assert found["loaded"] > 0.02 * count
    assert found["refused"] > 0.5 * count
    assert found["slowest"] < 10
    assert found["memory"] < BOUND + 3 * found["largest"], found
    print(found)
    return found


def test_a_few_hundred_mutated_files(good: Path) -> None:
    fuzz(good, 1, 300)


@pytest.mark.slow
def test_ten_thousand_mutated_files(good: Path) -> None:
    fuzz(good, 2, 10_000)


def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    base = build_pico("bert", tmp_path / "base", max_shard_size="8KB")
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    for elsewhere in ("../secret.safetensors", "/etc/passwd", 7):
        content["weight_map"][name] = elsewhere
        index.write_text(json.dumps(content))
        with pytest.raises(ModelError, match="does not tell which file beside it holds each tensor"):
            craft.decompose(str(base), ranks=(4, 4, 2))


def test_names_in_a_strangers_file_do_not_steer_the_terminal(good: Path) -> None:
    config = good / "whole/adapter_config.json"
    content = json.loads(config.read_text())
    content["model"]["id2label"]["0"] = "\x1b[2Jgone\nerror: no"
    config.write_text(json.dumps(content))
    done = invoke("inspect", str(good / "whole"))
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("labels")]
    assert "[2Jgone" in line
    assert "error: no" in line
    refused = invoke("inspect", "\x1b[2Jx.safetensors")
    assert "[2Jx.safetensors: no such file" in refused.stderr
    assert "\x1b" not in refused.stderr


def test_no_pickle_runs_code(tmp_path: Path) -> None:
    """An old base checkpoint is a pickle: only tensors are taken out of it."""
    base = build_pico("bert", tmp_path / "base")
    (base / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"x": Bomb()}, base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="is damaged or truncated"):
        resolve(str(base)).open()
    assert not (tmp_path / "exploded").exists()
