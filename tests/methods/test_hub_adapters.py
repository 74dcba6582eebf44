"""Adapters on the hub: shared, loaded by their id, and nothing fetched but what an adapter is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import classifier, failure, invoke, shake
from helpers import endpoint, logits
from loopback_hub import LoopbackHub

import craft_cli as craft
from craft_cli.errors import ModelError
from craft_cli.methods.adapter_folder import adapter_at

Make = Callable[..., Path]


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own


@pytest.fixture
def connected(
    hub: LoopbackHub, signed_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoopbackHub]:
    """This process asks the hub on this machine, and keeps what it fetches in the test's folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    with endpoint(hub):
        yield hub


def saved(base: Path, factors: str = "include", name: str | None = None) -> torch.Tensor:
    model = classifier(base, id2label={0: "no", 1: "yes"})
    adapter = craft.attach(model, craft.decompose(name or str(base), ranks=(6, 5, 2)))
    shake(adapter)
    adapter.save("mine", card="---\nlibrary_name: craft\n---\n# Mine\n", factors=factors)
    return logits(model)


def test_an_adapter_is_shared_and_loaded_by_its_id(pico: Make, connected: LoopbackHub, tmp_path: Path) -> None:
    connected.add("someone/base", pico())
    expected = saved(pico(), "reference", "someone/base")
    connected.requests.clear()
    done = invoke("merge", "mine", "--format", "adapter", "--push-to-hub", "someone/mine")
    assert done.exit_code == 0, done.output
    assert "copied    adapter-copy" in done.stdout
    assert "someone/mine will be created as public" in done.stderr
    for name, data in connected.uploads["someone/mine"].items():
        path = tmp_path / "served" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "served/evil.bin").write_bytes(b"not asked for")
    del connected.uploads["someone/mine"]
    connected.add("someone/mine", tmp_path / "served")
    assert "# Mine" in (tmp_path / "served/README.md").read_text()

    shutil.rmtree(tmp_path / "cache")  # no factors there: they came with the copy
    model = classifier(pico())
    craft.load(model, "someone/mine")
    assert torch.equal(logits(model), expected)
    assert connected.downloaded() == ["adapter_config.json", "adapter_model.safetensors"]
    assert not (tmp_path / "cache").exists()

    invoke("inspect", "someone/mine")
    assert invoke("merge", "someone/mine", "-o", "first").exit_code == 0  # fetches the rest of the base
    asked = len(connected.requests)
    for command in (["inspect"], ["merge"], ["merge", "--format", "peft"]):
        done = invoke(*command, "someone/mine")
        assert done.exit_code == 0, done.output
    assert Path("mine-merged/model.safetensors").is_file()
    assert Path("mine-peft/adapter_model.safetensors").is_file()
    (answer,) = craft.predict("someone/mine", ["the film was good"], use_cpu=True)
    assert answer["prediction"] in ("no", "yes")
    assert craft.compare(["adapter-copy", "someone/mine"]).cosine[0][1] == pytest.approx(1.0)
    assert len(connected.requests) == asked  # all out of the hub's cache


def test_what_the_hub_does_not_have_is_explained(pico: Make, connected: LoopbackHub, tmp_path: Path) -> None:
    connected.add("someone/model", pico())
    saved(pico())
    (tmp_path / "mine/adapter_model.safetensors").unlink()
    connected.add("someone/half", tmp_path / "mine")
    assert adapter_at("someone/model") is None
    told = failure("merge", "someone/model")
    assert "someone/model is neither a run nor an adapter" in told
    assert "there is no folder and no hub model 'someone/else'" in failure("merge", "someone/else")
    with pytest.raises(
        ModelError, match=r"'someone/half' has no adapter_model\.safetensors, so the adapter is incomplete"
    ):
        craft.load(classifier(pico()), "someone/half")
    asked = len(connected.requests)
    Path("runs").mkdir()
    assert "runs/frist is neither a run nor an adapter" in failure("merge", "runs/frist")
    assert len(connected.requests) == asked  # a folder that is mistyped is nobody's repository
    connected.stop()
    with pytest.raises(ModelError, match=r"'someone/third' is neither a folder .* the hub cannot be reached"):
        craft.load(classifier(pico()), "someone/third")


def test_a_shared_copy_does_not_say_where_things_lie(pico: Make, connected: LoopbackHub) -> None:
    saved(pico())
    record = json.loads(Path("mine/adapter_config.json").read_text())
    record["training"] = {"recipe": {"model": str(pico()), "train_file": "/home/me/secret.csv"}}
    Path("mine/adapter_config.json").write_text(json.dumps(record))
    done = invoke("merge", "mine", "--format", "adapter", "--push-to-hub", "someone/mine")
    assert done.exit_code == 0, done.output
    assert "note: its base is a local folder; others can attach it to their own model" in done.stderr
    for name, data in connected.uploads["someone/mine"].items():
        assert str(pico().parent).encode() not in data, name
        assert b"/home/me" not in data
    model = classifier(pico())
    craft.load(model, "adapter-copy")


def test_options_of_merging_are_not_for_a_copy(pico: Make) -> None:
    saved(pico())
    assert "copies the adapter unchanged" in failure("merge", "mine", "--format", "adapter", "--trim")
    assert invoke("merge", "mine", "--format", "adapter", "-o", "copy").exit_code == 0
    assert "is not empty" in failure("merge", "mine", "--format", "adapter", "-o", "copy")
    assert invoke("merge", "mine", "--format", "adapter", "-o", "copy", "--overwrite").exit_code == 0
    model, other = classifier(pico()), classifier(pico())
    craft.load(model, "mine")
    craft.load(other, "copy")
    assert torch.equal(logits(model), logits(other))
