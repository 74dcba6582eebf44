"""The hub code path, for real, against a hub on loopback: what is fetched, and that a second use needs no hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import build_pico
from loopback_hub import LoopbackHub


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


def craft(hub: LoopbackHub, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this hub, and caches in the test's folder."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(Path("hf").resolve()), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "craft_cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_first_use_fetches_only_what_is_needed_and_the_second_is_offline(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = build_pico("bert", tmp_path / "model", max_shard_size="8KB")
    commit = hub.add("someone/pico", folder)
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if ".query.weight" in name or ".value.weight" in name}
    assert needed < shards

    done = craft(hub, "decompose", "someone/pico", "--ranks", "6,5,2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["revision"], found["cached"]) == (commit, False)
    fetched = {Path(name).name for name in hub.downloaded()}
    assert fetched == needed | {"config.json", "model.safetensors.index.json"}

    asked = len(hub.requests)
    again = craft(hub, "decompose", "someone/pico", "--ranks", "6,5,2", "--json")
    assert json.loads(again.stdout)["cached"] is True
    assert len(hub.requests) == asked
    hub.stop()
    assert craft(hub, "decompose", "someone/pico", "--ranks", "4,4,1").returncode == 0


def test_training_from_the_hub_then_offline(hub: LoopbackHub, tmp_path: Path, data_dir: Path) -> None:
    commit = hub.add("someone/pico", build_pico("bert", tmp_path / "model"))
    arguments = [
        "train",
        "--model",
        "someone/pico",
        "--task",
        "sst2",
        "--data-dir",
        str(data_dir),
        "--max-steps",
        "2",
        "--ranks",
        "4,4,2",
    ]
    done = craft(hub, *arguments, "--use-cpu", "--output-dir", "out")
    assert done.returncode == 0, done.stderr
    record = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert record["base_model"]["model"] == "someone/pico"
    assert record["base_model"]["revision"] == commit
    hub.stop()
    assert craft(hub, *arguments, "--use-cpu", "--output-dir", "again").returncode == 0
    assert craft(hub, "merge", "out").returncode == 0


def test_what_the_hub_does_not_have(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("someone/pico", build_pico("bert", tmp_path / "model"))
    for arguments, message in {
        ("someone/else",): "there is no folder and no hub model 'someone/else'",
        ("someone/pico", "--revision", "v9"): "hub model 'someone/pico' has no revision 'v9'",
    }.items():
        done = craft(hub, "decompose", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    hub.stop()
    done = craft(hub, "decompose", "someone/pico2")
    assert done.returncode == 1
    assert "connect once, or give the folder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
