"""An adapter goes onto the very base that it was trained on, and what differs is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico, classifier, failure, invoke, shake
from helpers import config, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import craft_cli as craft
from craft_cli.errors import ModelError
from craft_cli.models.hub import resolve
from craft_cli.models.identity import Base, base_in, base_of

FEED_FORWARD = "encoder.layer.1.intermediate.dense.weight"


def identity(folder: Path | str) -> Base:
    return base_of(resolve(str(folder)))


def weight(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 2 + 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def setting(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def swapped_words(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(
        text.replace('"film"', '"X"').replace('"book"', '"film"').replace('"X"', '"book"')
    )


def added_tokens(folder: Path) -> None:
    (folder / "added_tokens.json").write_text("{}")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "feed-forward": (lambda base: weight(base, FEED_FORWARD), "the layers differ"),
    "bias": (lambda base: weight(base, "encoder.layer.0.attention.self.query.bias"), "the layers differ"),
    "embeddings": (lambda base: weight(base, "embeddings.word_embeddings.weight"), "the embeddings differ"),
    "heads": (lambda base: setting(base, num_attention_heads=4), "'num_attention_heads' of its configuration was 2, is 4"),
    "activation": (lambda base: setting(base, hidden_act="relu"), "'hidden_act' of its configuration"),
    "words": (swapped_words, r"its tokenizer differs (tokenizer.json)"),
    "tokenizer's settings": (
        added_tokens,
        "its tokenizer differs (added_tokens.json)",
    ),
}  # fmt: skip
COMMANDS = {"eval": ("eval", "run", "--data-dir", "data", "--task", "sst2"), "merge": ("merge", "run", "-o", "out")}


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(("change", "command"), list(zip(CHANGES, [*COMMANDS] * 4, strict=False)))
def test_every_part_of_the_base_counts(change: str, command: str) -> None:
    apply, told = CHANGES[change]
    apply(Path("base"))
    message = failure(*COMMANDS[command])
    assert told in message
    assert "--allow-other-base" in message
    assert invoke(*COMMANDS[command], "--allow-other-base").exit_code == 0


def test_the_same_base_in_any_form(pico: Callable[..., Path], tmp_path: Path) -> None:
    """Sharded, pickled, below a head's prefix, in memory, of another torch dtype that holds its values."""
    for family in ("bert", "gpt2", "llama", "distilbert"):
        folder = pico(family)
        one = identity(folder)
        assert one.weights.keys() >= {"embeddings", "layers"}
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        assert base_in(model, torch.float32) == one
        assert not one.differences(base_in(model.half(), torch.float32))  # rounded: only the settings are known
        headed = tmp_path / family
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(
            headed, max_shard_size="9KB"
        )
        assert one.weights == identity(headed).weights
        assert not one.differences(Base(identity(headed).weights, identity(headed).config))
    half = build_pico("bert", tmp_path / "half", dtype=torch.bfloat16)
    wide = AutoModelForSequenceClassification.from_pretrained(half, dtype=torch.float32)
    assert base_in(wide, torch.bfloat16).weights == identity(half).weights
    torch.save(load_file(half / "model.safetensors"), half / "pytorch_model.bin")
    before = identity(half).weights
    (half / "model.safetensors").unlink()
    assert identity(half).weights == before


@pytest.mark.parametrize("odd", ["layer.1.attention.self", "self.value", "layer.0.attention.self.query"])
def test_weights_of_two_dtypes_are_known_again(odd: str, tmp_path: Path) -> None:
    base = build_pico("bert", tmp_path / "base")
    mixed = {
        name: tensor.bfloat16() if odd in name else tensor
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    adapter = craft.attach(classifier(base, dtype=torch.float32), craft.decompose(str(base), ranks="6,5,2"))
    shake(adapter)
    adapter.save("adapter")
    assert torch.equal(
        logits(craft.load(classifier(base, dtype=torch.float32), "adapter").model), logits(adapter.model)
    )
    assert craft.merge("adapter", "merged").tensors_changed == 6


def test_an_adapter_of_a_model_in_a_wider_dtype_is_merged_onto_its_checkpoint(tmp_path: Path) -> None:
    base = build_pico("bert", tmp_path / "base", dtype=torch.bfloat16)
    adapter = craft.attach(classifier(base, dtype=torch.float32), ranks="6,5,2")
    shake(adapter)
    adapter.save("adapter")
    assert craft.merge("adapter", "merged").tensors_changed == 6
    build_pico("bert", base, dtype=torch.float32)
    with pytest.raises(ModelError, match="differ from those of"):
        craft.merge("adapter", "other")


def test_hashes_are_kept_until_the_file_changes(pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(pico(), "base")
    monkeypatch.setattr("craft_cli.models.identity._KEPT_FROM", 0)
    one = identity("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("craft_cli.models.identity._sha256", lambda tensor: pytest.fail("hashed again"))
        assert identity("base") == one
    stat = Path("base/model.safetensors").stat()
    weight(Path("base"), FEED_FORWARD)
    os.utime("base/model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size and time
    assert identity("base").differences(one) == ["the layers differ"]


def test_in_python_too(pico: Callable[..., Path]) -> None:
    adapter = craft.attach(classifier(pico()), craft.decompose(str(pico()), ranks="6,5,2"))
    shake(adapter)
    adapter.save("adapter")
    shutil.copytree(pico(), "base")
    weight(Path("base"), FEED_FORWARD)
    with pytest.raises(ModelError, match="the layers differ"):
        craft.load(classifier(Path("base")), "adapter")
    craft.load(classifier(Path("base")), "adapter", allow_other_base=True).save("other")
    craft.load(classifier(Path("base")), "other")  # which is its base from now on


@pytest.mark.parametrize("method", ["craft", "lora"])
def test_what_is_saved_on_another_base_belongs_to_it(method: str, pico: Callable[..., Path]) -> None:
    adapter = craft.attach(classifier(pico()), method=method)
    shake(adapter)
    for name in ("adapter", "second"):
        adapter.save(name)
    shutil.copytree(pico(), "base")
    weight(Path("base"), "encoder.layer.0.attention.self.query.weight")
    weight(Path("base"), FEED_FORWARD)
    model = classifier(Path("base"))
    other = craft.load(model, "adapter", allow_other_base=True)
    craft.load(model, "second", name="second", allow_other_base=True)  # held beside it
    other.save("other")
    craft.load(classifier(Path("base")), "other")
    craft.load(model, "other", name="other")
    assert other.names == ("default", "second", "other")
    craft.merge("other", "merged")  # it finds this base by its name
    with pytest.raises(ModelError, match="the weights of this model"):
        craft.load(classifier(pico()), "other")


def test_a_pooler_that_is_trained_is_no_part_of_the_base(pico: Callable[..., Path]) -> None:
    shutil.copytree(pico(), "base")
    stored = load_file("base/model.safetensors")
    save_file({name: tensor for name, tensor in stored.items() if "pooler." not in name}, "base/model.safetensors")
    model = classifier(Path("base"))
    head = [name for name, _ in model.named_parameters() if "pooler." in name or "classifier." in name]
    adapter = craft.attach(model, method="lora", head=head)
    shake(adapter)
    adapter.save("adapter")
    again = classifier(Path("base"))  # with another random pooler
    craft.load(again, "adapter")
    assert torch.equal(logits(again), logits(model))


def test_resuming_and_going_on_from_another_run(pico: Callable[..., Path], data_dir: Path) -> None:
    shutil.copytree(pico(), "base")
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    craft.train(config(Path("base"), data_dir, max_steps=2, **settings))
    weight(Path("base"), FEED_FORWARD)
    with pytest.raises(ModelError, match="resume: the run was trained on another base: the layers differ"):
        craft.train(config(Path("base"), data_dir, max_steps=3, resume=True, **settings))
    with pytest.raises(ModelError, match="init_from: out was trained on another base: the layers differ"):
        craft.train(config(Path("base"), data_dir, max_steps=1, init_from="out", output_dir="two"))
    craft.train(config(Path("base"), data_dir, max_steps=3, resume=True, allow_other_base=True, **settings))
    weight(Path("base"), "encoder.layer.0.attention.self.query.weight")
    again = config(Path("base"), data_dir, max_steps=4, resume=True, allow_other_base=True, **settings)
    assert craft.train(again).updates >= 1


def test_a_user_without_a_home_is_served(pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    one = identity(pico())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)
    assert identity(pico()) == one
