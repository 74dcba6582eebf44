"""What an upload touches, who can see it, and that it does not say where the user's files lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import failure, invoke, opinions, write_rows
from helpers import endpoint, saved_adapter
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub

Make = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own
FOREIGN = (
    "onnx/model.onnx", "teacher/model.safetensors", "teacher/config.json", "archive/2025/pytorch_model.bin",
    "other-lora/adapter_config.json", "other-lora/adapter_model.safetensors", "notes.md",
)  # fmt: skip
FORMER = ("README.md", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin")


def test_only_files_of_this_upload_are_touched(pico: Make, hub: LoopbackHub, signed_in: None) -> None:
    saved_adapter(pico())
    hub.uploads["me/models"] = dict.fromkeys([*FOREIGN, *FORMER], b"former")
    hub.private["me/models"] = False
    with endpoint(hub):
        done = invoke("merge", "adapter", "-o", "merged", "--push-to-hub", "me/models")
    assert done.exit_code == 0, done.stderr
    after = hub.uploads["me/models"]
    assert {name for name in FOREIGN if after.get(name) == b"former"} == set(FOREIGN)
    mine = {path.name: path.read_bytes() for path in Path("merged").iterdir() if path.name != ".craft.json"}
    assert {name: data for name, data in after.items() if name not in FOREIGN} == mine
    assert "note: me/models is public: everyone can read the upload" in done.stderr


def test_who_can_see_it_is_said_before_the_work(pico: Make, hub: LoopbackHub, signed_in: None) -> None:
    saved_adapter(pico())
    hub.uploads |= {"me/open": {}, "me/closed": {}}
    hub.private |= {"me/open": False, "me/closed": True}
    with endpoint(hub):
        told = failure("merge", "adapter", "--push-to-hub", "me/open", "--private")
        assert "--private: me/open already exists and is public" in told
        assert hub.uploads["me/open"] == {}
        for repository, flags, note in (
            ("me/closed", [], "note: me/closed is private and stays private"),
            ("me/closed", ["--private"], None),
            ("me/new", [], "note: me/new will be created as public: everyone can read the upload (--private creates"),
            ("me/own", ["--private"], None),
        ):
            done = invoke("merge", "adapter", "-o", "out", "--overwrite", "--push-to-hub", repository, *flags)
            assert done.exit_code == 0, done.stderr
            assert note in done.stderr if note else "note" not in done.stderr
    assert hub.private == {"me/open": False, "me/closed": True, "me/new": False, "me/own": True}


def test_nothing_that_is_uploaded_says_where_files_lie(
    pico: Make, hub: LoopbackHub, signed_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home-jane.doe"
    work = home / "clients" / "ACME-merger"
    work.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    shutil.copytree(pico(), "base")
    write_rows(Path("layoffs.jsonl"), opinions(24, 1))
    done = invoke(
        "train", "--model", "base", "--train-file", "layoffs.jsonl", "--text-columns", "sentence", "--ranks", "6,5,2",
        "--max-steps", "1", "--use-cpu", "--learning-rate", "0.03", "--output-dir", "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    with endpoint(hub):
        for name in ("checkpoint", "peft"):
            done = invoke("merge", "run/checkpoints/step-1", "--format", name, "--push-to-hub", f"me/{name}")
            assert done.exit_code == 0, done.stderr
    for files in hub.uploads.values():
        assert not [name for name, data in files.items() if b"jane" in data or b"ACME" in data]
    assert json.loads(hub.uploads["me/peft"]["adapter_config.json"])["base_model_name_or_path"] == "base"
    card = hub.uploads["me/checkpoint"]["README.md"].decode()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (recipe["train_file"], recipe["model"]) == ("layoffs.jsonl", "base")
    assert "jane" not in Path("run/adapter/README.md").read_text()


def test_labels_mean_nothing_in_a_card(pico: Make) -> None:
    saved_adapter(pico())
    path = Path("adapter/adapter_config.json")
    record = json.loads(path.read_text())
    evil = "\x1b[2J</pre><script>alert(1)</script>\n---\nlicense: mit\n```\n# Owned | [x](http://y) *b*"
    record["model"]["id2label"]["0"] = evil
    record["model"]["label2id"] = {label: int(number) for number, label in record["model"]["id2label"].items()}
    record["training"] = (record.get("training") or {}) | {"recipe": {"label_column": f"long {'name ' * 30}``` x"}}
    path.write_text(json.dumps(record))
    for name in ("checkpoint", "peft"):
        done = invoke("merge", "adapter", "--format", name, "-o", name)
        assert done.exit_code == 0, done.stderr
        card = Path(name, "README.md").read_text()
        assert "\x1b" not in card
        assert "\n# Owned" not in card
        assert "<script>" not in card.replace("\\<script\\>", "")
        assert card.count("\n```") == 2  # those of the recipe
        assert ModelCard.load(Path(name, "README.md")).data.get("license") is None
