"""What merging must not take away, and what an upload replaces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import classifier, failure, invoke, shake
from helpers import endpoint, saved_adapter
from loopback_hub import LoopbackHub

import craft_cli as craft
from craft_cli.errors import ConfigError

Make = Callable[..., Path]


@pytest.mark.parametrize("output", ["run", "run/adapter", ".", "base", "elsewhere"])
def test_overwriting_never_takes_what_is_merged_nor_what_is_not_ours(output: str, run: Path) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/thesis.tex").write_text("do not touch")
    told = failure("merge", "run", "-o", output, "--overwrite")
    if output in ("base", "elsewhere"):
        assert "cannot be replaced" in told
    else:
        assert "; choose another path" in told


def test_an_earlier_merge_is_replaced_through_a_link_too(run: Path) -> None:
    assert invoke("merge", "run", "-o", "first").exit_code == 0
    Path("link").symlink_to("first")
    Path("first/stale").write_text("x")
    assert invoke("merge", "run", "-o", "link", "--overwrite").exit_code == 0
    assert Path("link").is_symlink()
    assert Path("first/stale").exists()  # no merge wrote it
    assert not list(Path().glob(".*.old"))
    assert "is not empty" in failure("merge", "run", "-o", "first")


def test_a_checkpoint_of_a_run_is_merged_beside_it(run: Path) -> None:
    Path("run/checkpoints").mkdir()
    (run / "adapter").rename("run/checkpoints/step-3")
    done = invoke("merge", "run/checkpoints/step-3", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["output"] == "run/merged-step-3"


def test_an_adapter_that_does_not_say_what_it_was_trained_on_merges_too(run: Path) -> None:
    config = run / "adapter/adapter_config.json"
    content = json.loads(config.read_text())
    content.pop("training", None)
    config.write_text(json.dumps(content))
    for more in ([], ["--format", "peft"]):
        done = invoke("merge", "run", *more)
        assert done.exit_code == 0, done.stderr
    assert "Task: not recorded." in Path("run/merged/README.md").read_text()


@pytest.mark.parametrize("size", ["0GB", "-5GB", "banana", ""])
def test_a_size_that_is_none(size: str, run: Path) -> None:
    assert "--max-shard-size: expected a size such as 500MB or 5GB" in failure(
        "merge", "run", f"--max-shard-size={size}"
    )


def test_sizes_in_bytes_and_options_without_effect(run: Path) -> None:
    assert invoke("merge", "run", "-o", "small", "--max-shard-size", "20000").exit_code == 0
    assert Path("small/model.safetensors.index.json").is_file()
    told = failure("merge", "run", "--format", "peft", "--max-shard-size", "5GB")
    assert "--max-shard-size is for checkpoints" in told
    assert "--private requires --push-to-hub" in failure("merge", "run", "--private")


def test_sigterm_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    """It comes while the folder is being written."""
    Path("slow/sitecustomize.py").parent.mkdir()
    Path("slow/sitecustomize.py").write_text(
        "import os, time\n"
        "former = os.fsync\n"
        "def slow(descriptor):\n"
        "    open('writing', 'w').close()\n"
        "    time.sleep(60)\n"
        "os.fsync = slow\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "craft_cli", "merge", "run"], env=os.environ | {"PYTHONPATH": str(tmp_path / "slow")}
    )
    deadline = time.monotonic() + 60
    while not Path("writing").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [path for path in run.iterdir() if path.name.endswith(".part")]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert sorted(path.name for path in run.iterdir()) == [".craft.json", "adapter", "recipe.yaml"]


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own
def test_a_second_upload_replaces_the_weights_of_the_first(pico: Make, hub: LoopbackHub, signed_in: None) -> None:
    """transformers would take a `model.safetensors` that stayed there before the index of the new shards."""
    saved_adapter(pico())
    with endpoint(hub):
        for more in (["-o", "one", "--private"], ["-o", "two", "--max-shard-size", "20KB"]):
            done = invoke("merge", "adapter", "--push-to-hub", "someone/twice", *more)
            assert done.exit_code == 0, done.stderr
    uploaded = hub.uploads["someone/twice"]
    assert {name for name in uploaded if "safetensors" in name} == {
        path.name for path in Path("two").iterdir() if "safetensors" in path.name
    }
    assert "model.safetensors" not in uploaded
    assert hub.private["someone/twice"] is True


def test_nothing_is_saved_or_switched_inside_disabled(pico: Make) -> None:
    adapter = craft.attach(classifier(pico()), craft.decompose(str(pico()), ranks=(6, 5, 2)))
    shake(adapter)
    for attempt in (lambda: adapter.save("x"), lambda: adapter.use("y"), adapter.merge, adapter.trained_state):
        with adapter.disabled(), pytest.raises(ConfigError, match="the adapter is disabled"):
            attempt()
    adapter.save("x")
