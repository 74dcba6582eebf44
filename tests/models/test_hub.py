"""The hub code path, for real, against a hub on loopback: what is fetched, and that a second use needs no hub."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import build_pico, failure, invoke, opinions, write_rows
from datasets import ClassLabel, Dataset
from helpers import craft_command
from huggingface_hub import ModelCard, constants
from loopback_hub import LoopbackHub

from craft_cli.config.hub import patience


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


@pytest.mark.slow
def test_training_from_the_hub_then_offline(hub: LoopbackHub, tmp_path: Path, data_dir: Path) -> None:
    folder = build_pico("bert", tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    commit = hub.add("someone/pico", folder)
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
    card = ModelCard.load("out/adapter/README.md").data
    assert (card.base_model, card.license) == ("someone/pico", "apache-2.0")
    record = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert record["base_model"]["model"] == "someone/pico"
    assert record["base_model"]["revision"] == commit
    hub.stop()
    assert craft(hub, *arguments, "--use-cpu", "--output-dir", "again").returncode == 0
    assert craft(hub, "merge", "out").returncode == 0


@pytest.mark.slow
def test_a_branch_that_moved_on_is_another_revision(hub: LoopbackHub, tmp_path: Path) -> None:
    old = build_pico("bert", tmp_path / "old")
    first = hub.add("someone/pico", old, branch="v1")
    second = hub.add("someone/pico", build_pico("bert", tmp_path / "new", vocab_size=65))
    assert first != second
    for revision, commit in {"v1": first, "main": second, first[:40]: first}.items():
        done = craft(hub, "decompose", "someone/pico", "--revision", revision, "--ranks", "6,5,2", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["revision"] == commit


@pytest.mark.slow
def test_training_after_decomposing_fetches_the_rest(hub: LoopbackHub, tmp_path: Path, data_dir: Path) -> None:
    """Decomposing leaves a few shards and no tokenizer in the cache: that is not yet a model to train."""
    folder = build_pico("bert", tmp_path / "model", max_shard_size="8KB")
    hub.add("someone/pico", folder)
    assert craft(hub, "decompose", "someone/pico", "--ranks", "4,4,2").returncode == 0
    done = craft(
        hub, "train", "--model", "someone/pico", "--task", "sst2", "--data-dir", str(data_dir), "--ranks", "4,4,2",
        "--use-cpu", "--dry-run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fetched = hub.downloaded()
    assert len(set(fetched)) == len(fetched)  # nothing twice
    assert {name for name in fetched if name.endswith(".safetensors")} == {
        path.name for path in folder.glob("*.safetensors")
    }
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(fetched)


def glue(folder: Path) -> Path:
    """A data set laid out as nyu-mll/glue: a configuration a task, parquet files by split."""
    (folder / "sst2").mkdir(parents=True)
    for split, count in {"train": 24, "validation": 10}.items():
        table = Dataset.from_list(opinions(count, 1)).cast_column("label", ClassLabel(names=["negative", "positive"]))
        table.to_parquet(folder / f"sst2/{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: sst2\n  data_files:\n  - split: train\n    path: sst2/train-*\n"
        "  - split: validation\n    path: sst2/validation-*\n---\n"
    )
    return folder


@pytest.mark.slow
def test_a_task_by_its_name_alone_then_offline(hub: LoopbackHub, tmp_path: Path, pico: Callable[..., Path]) -> None:
    hub.add("nyu-mll/glue", glue(tmp_path / "glue"), kind="datasets")
    command = ["train", "--model", str(pico()), "--task", "sst2", "--ranks", "4,4,2", "--max-steps", "2", "--use-cpu"]
    done = craft(hub, *command, "--output-dir", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 10
    asked = len(hub.requests)
    evaluated = craft(hub, "eval", "out", "--json")
    assert json.loads(evaluated.stdout)["examples"] == 10, evaluated.stderr
    assert len(hub.requests) == asked  # what is in the cache is not asked for
    hub.stop()
    again = craft(hub, *command, "--output-dir", "again")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_data_set_of_ones_own_with_a_configuration_and_split_names(
    hub: LoopbackHub, tmp_path: Path, pico: Callable[..., Path]
) -> None:
    hub.add("someone/reviews", glue(tmp_path / "reviews"), kind="datasets")
    command = [
        "train", "--model", str(pico()), "--dataset-name", "someone/reviews", "--dataset-config-name", "sst2",
        "--train-split", "validation", "--validation-split", "train", "--ranks", "4,4,2", "--max-steps", "2", "--use-cpu",
    ]  # fmt: skip
    done = craft(hub, *command, "--output-dir", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 24
    record = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert list(record["model"]["id2label"].values()) == ["negative", "positive"]
    hub.stop()
    assert json.loads(craft(hub, "eval", "out", "--json").stdout)["examples"] == 24


@pytest.mark.slow
def test_a_task_by_its_name_alone_without_a_hub(hub: LoopbackHub, pico: Callable[..., Path]) -> None:
    hub.stop()
    done = craft(hub, "train", "--model", str(pico()), "--task", "sst2", "--use-cpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the dataset nyu-mll/glue (sst2, train) is not in the cache" in done.stderr
    assert "connect once, or pass --data-dir" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
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
    assert "connect once, or pass a local folder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def silent() -> Iterator[list[str]]:
    """A hub that takes connections and never answers: its address, and the first lines that it heard."""
    heard: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as held:
        heard.append(f"http://127.0.0.1:{server.getsockname()[1]}")

        def listen() -> None:
            with contextlib.suppress(OSError):  # closed at the end
                while True:
                    connection = held.enter_context(server.accept()[0])
                    heard.append(connection.recv(1000).decode().splitlines()[0])

        threading.Thread(target=listen, daemon=True).start()
        yield heard
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_asked_once(silent: list[str]) -> None:
    environment = os.environ | {"HF_ENDPOINT": silent[0], "HF_HOME": "hf", "HF_HUB_ETAG_TIMEOUT": "1"}
    write_rows(Path("in.jsonl"), opinions(3, 1))
    for command, request in {
        ("predict", "someone/x", "-i", "in.jsonl"): "GET /api/models/someone/x HTTP/1.1",
        ("train", "--dataset-name", "a/b", "--use-cpu"): "GET /api/datasets/a/b HTTP/1.1",
    }.items():
        del silent[1:]
        done = craft_command(*command, env=environment)
        assert done.returncode == 1
        assert "(no answer in 1 s); connect once" in done.stderr, done.stderr
        assert silent[1:] == [request]


def test_offline_asks_no_hub_and_says_so() -> None:
    for command in (["decompose", "someone/x"], ["merge", "someone/x"], ["inspect", "someone/x"]):
        message = failure(*command, "--offline")
        assert "'someone/x' is neither a folder nor in the hub cache, and offline mode is on (--offline" in message
    assert not constants.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.usefixtures("run")
def test_offline_uploads_nothing() -> None:
    assert "--push-to-hub: offline mode is on" in failure("merge", "run", "--push-to-hub", "a/b", "--offline")


def test_every_command_that_may_ask_the_hub_has_the_flag() -> None:
    for command in ("decompose", "train", "sweep", "eval", "predict", "merge", "inspect", "methods", "doctor"):
        assert "--offline" in invoke(command, "--help").stdout, command


@pytest.mark.parametrize(("told", "seconds"), [("", 5), ("2", 2), ("0", 5), ("soon", 5)])
def test_how_long_the_hub_may_take(told: str, seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", told)
    assert patience() == seconds
