"""Many small adapters on one base: factors by reference, several held at once, switched in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico, classifier, failure, invoke, shake
from helpers import logits
from safetensors.torch import load_file

import craft_cli as craft
from craft_cli.errors import ConfigError, ModelError
from craft_cli.methods.model_adapter import ModelAdapter

Make = Callable[..., Path]


def make_two(base: Path, factors: str = "reference") -> list[torch.Tensor]:
    """Two adapters `one` and `two` with other transforms, heads and labels; their logits."""
    found = []
    for number, name in enumerate(("one", "two")):
        model = classifier(base, id2label={0: f"{name}-a", 1: f"{name}-b"})
        adapter = craft.attach(model, craft.decompose(str(base), ranks=(6, 5, 2)))
        shake(adapter, 0.2 + 0.3 * number)
        with torch.no_grad():
            for tensor in adapter.head_state().values():
                tensor.add_(0.1 * (number + 1))
        adapter.training_record = {"task": name}
        adapter.save(name, factors=factors)
        found.append(logits(model))
    return found


def test_several_are_held_and_switched_in_place(pico: Make) -> None:
    one, two = make_two(pico(), "include")
    model = classifier(pico())
    base = logits(model)
    adapter = craft.load(model, "one", name="one")
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert craft.load(model, "two", name="two") is adapter
    assert (adapter.names, adapter.active) == (("one", "two"), "two")
    assert torch.equal(logits(model), two)
    assert model.config.id2label == {0: "two-a", 1: "two-b"}
    adapter.use("one")
    assert torch.equal(logits(model), one)
    assert (model.config.id2label, adapter.training_record) == ({0: "one-a", 1: "one-b"}, {"task": "one"})
    with adapter.disabled():
        assert torch.equal(logits(model), base)  # with the head it had
    assert torch.equal(logits(model), one)
    with torch.no_grad():  # what is trained meanwhile is not lost by a switch
        adapter.change.trained()["transform.query.in"].add_(0.1)
    moved = logits(model)
    adapter.use("two")
    adapter.use("one")
    assert torch.equal(logits(model), moved)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with pytest.raises(ConfigError, match="this model has no adapter 'three'; known: one, two"):
        adapter.use("three")
    with pytest.raises(ModelError, match="already has an adapter"):
        craft.load(model, "two")


def test_an_attached_adapter_is_held_beside_a_loaded_one(pico: Make) -> None:
    one, _ = make_two(pico())
    model = classifier(pico())
    adapter = craft.attach(model, craft.decompose(str(pico()), ranks=(6, 5, 2)))
    shake(adapter, 0.4)
    own = logits(model)
    craft.load(model, "one", name="one")
    assert torch.equal(logits(model), one)
    adapter.use("default")
    assert torch.equal(logits(model), own)
    other = craft.attach(classifier(pico()), craft.decompose(str(pico()), ranks=(4, 4, 2)))
    other.save("other")
    with pytest.raises(ModelError, match="other differs from the adapter on this model in method, base or size"):
        craft.load(model, "other", name="other")
    assert torch.equal(logits(model), own)


def test_a_reference_is_small_and_finds_its_factors(pico: Make, tmp_path: Path) -> None:
    one, _ = make_two(pico())
    tensors = load_file("one/adapter_model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"transform", "head"}
    model = classifier(pico())
    craft.load(model, "one")  # out of the cache
    assert torch.equal(logits(model), one)
    (entry,) = (tmp_path / "cache/craft").glob("*.safetensors")
    entry.unlink()
    model = classifier(pico())
    craft.load(model, "one")  # made again from the base
    assert torch.equal(logits(model), one)
    assert entry.is_file()
    for command_ in ("merge", "inspect"):
        assert invoke(command_, "one").exit_code == 0


@pytest.mark.parametrize("why", ["gone", "other weights", "other factors"])
def test_a_reference_without_its_factors_is_refused(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_pico("bert", tmp_path / "base")
    make_two(base)
    (entry,) = (tmp_path / "cache/craft").glob("*.safetensors")
    entry.unlink()
    message = "the weights of its base have changed"
    if why == "gone":
        base.rename(tmp_path / "moved")
        message = "its base is not available"
    elif why == "other weights":
        build_pico("bert", base, initializer_range=0.1)
    else:
        record = json.loads(Path("one/adapter_config.json").read_text())
        record["factors"] |= {"sha256": "0" * 64, "sketch": {}}
        Path("one/adapter_config.json").write_text(json.dumps(record))
        message = "decomposing its base gives different ones here"
    looked = failure("inspect", "one")  # it makes nothing
    assert "they are not in the cache; load or merge the adapter once" in looked
    told = failure("merge", "one") if why == "gone" else invoke("merge", "one").stderr
    assert f"one only refers to its factors (sha256 {'0' if why == 'other factors' else ''}" in told
    assert message in told
    assert "copy the file of factors from the machine it was trained on into" in told
    assert "save it there with factors='include'" in told


CODE = """
from pathlib import Path
Path("PROOF").write_text("ran")
from transformers import BertConfig
class Config(BertConfig):
    pass
"""


def test_code_of_a_base_whose_factors_are_made_again_runs_only_with_the_flag(tmp_path: Path) -> None:
    base = build_pico("bert", tmp_path / "base")
    make_two(base)
    (entry,) = (tmp_path / "cache/craft").glob("*.safetensors")
    entry.unlink()
    (base / "code.py").write_text(CODE)
    settings = json.loads((base / "config.json").read_text())
    settings |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}
    (base / "config.json").write_text(json.dumps(settings))
    assert "--trust-remote-code" in failure("merge", "one")
    told = invoke("merge", "one", "--trust-remote-code").stderr
    assert Path("PROOF").exists()
    assert "--trust-remote-code" not in told


def test_training_with_referred_factors(pico: Make, data_dir: Path) -> None:
    settings = ("--model", str(pico()), "--task", "sst2", "--data-dir", str(data_dir), "--ranks", "6,5,2", "--use-cpu")
    for kind in ("include", "reference"):
        done = invoke("train", *settings, "--max-steps", "2", "--output-dir", kind, "--adapter-factors", kind)
        assert done.exit_code == 0, done.stderr
    small, whole = (Path(kind, "adapter/adapter_model.safetensors") for kind in ("reference", "include"))
    assert small.stat().st_size < whole.stat().st_size / 2
    assert invoke("eval", "reference", "--json").stdout == invoke("eval", "include", "--json").stdout.replace(
        '"include"', '"reference"'
    )
    with pytest.raises(ConfigError, match="expected include or reference, not 'none'"):
        ModelAdapter.save(craft.load(classifier(pico()), "include/adapter"), "x", factors="none")


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("lora", {"rank": 0}, "^rank: "), ("lora", {"rank": -1}, "^rank: "), ("lora", {"alpha": "much"}, "^alpha: "),
        ("lora", {"lora_dropout": 2.0}, "^lora_dropout: "), ("craft", {"ranks": "6,5"}, "^ranks: "),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_is_refused_by_its_name(
    method: str, options: dict[str, Any], told: str, pico: Make
) -> None:
    with pytest.raises(ConfigError, match=told):
        craft.attach(classifier(pico()), method=method, **options)


def test_an_option_of_none_is_the_default(pico: Make) -> None:
    adapter = craft.attach(classifier(pico()), method="lora", rank=None, alpha=None)
    assert (adapter.options.rank, adapter.options.alpha) == (8, 16.0)


def test_what_one_method_prepared_is_refused_by_another(pico: Make) -> None:
    factors = craft.decompose(str(pico()), ranks=(6, 5, 2))
    with pytest.raises(ConfigError, match=r"lora needs no factors, .* omit them"):
        craft.attach(classifier(pico()), factors, method="lora")
    kept = craft.attach(classifier(pico()), method="lora").frozen
    with pytest.raises(ConfigError, match=r"craft needs the factors of craft\.decompose"):
        craft.attach(classifier(pico()), kept)
    adapter = craft.attach(classifier(pico()), kept, method="lora", targets=["value"])
    assert (adapter.frozen.targets, list(adapter.frozen.shapes)) == (("value",), ["value"])
    adapter.save("value")
    assert craft.load(classifier(pico()), "value").frozen.targets == ("value",)
    with pytest.raises(ConfigError, match="prepared only for query, value, not for key"):
        craft.attach(classifier(pico()), kept, method="lora", targets=["key"])


@pytest.mark.parametrize("method", ["craft", "lora"])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_an_adapter_of_a_model_that_was_cast_loads(method: str, cast: str, pico: Callable[..., Path]) -> None:
    adapter = craft.attach(classifier(pico()), method=method)
    shake(adapter)
    getattr(adapter.model, cast)()
    adapter.save("adapter")
    loaded = craft.load(classifier(pico()), "adapter")
    for name, parameter in loaded.change.trained().items():
        assert torch.equal(parameter, adapter.change.trained()[name].float())


FROZEN: list[tuple[str, dict[str, Any]]] = [
    ("craft", {}), ("pissa", {"rank": 2}), ("lora-xs", {"rank": 2}), ("superlora", {"rank": 2, "superlora_projection": 0.3})
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), FROZEN, ids=[name for name, _ in FROZEN])
def test_a_model_that_was_emptied_has_its_frozen_tensors_again(
    method: str, options: dict[str, Any], pico: Make
) -> None:
    """They are in no state_dict: `load_state_dict` alone would leave whatever lay in memory, without a word."""
    model = classifier(pico())
    shake(craft.attach(model, method=method, **options), 0.1)
    expected = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    transformers_own = [(name, tensor.clone()) for name, tensor in model.named_buffers() if ".craft." not in name]
    for way in ("emptied", "through meta", "assigned"):
        if way != "emptied":
            model.to("meta")
        if way != "assigned":
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan)
        model.load_state_dict(state, assign=way == "assigned")
        for name, tensor in transformers_own:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, tensor)
        assert torch.equal(logits(model), expected), way
