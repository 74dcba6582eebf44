"""LoRAs without a head, and what peft does with several: mix them, switch between them, swap them in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import classifier, failure, invoke, shake, token_batch
from helpers import saved_adapter
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_as_lora import with_peft

import craft_cli as craft
from craft_cli.api.predictor import load_adapted

Make = Callable[..., Path]


def lora_of(base: Path, name: str, seed: int, **options: Any) -> torch.Tensor:
    """A LoRA without its head, as `name`; the hidden states of the adapted model."""
    model = classifier(base)
    torch.manual_seed(seed)
    adapter = craft.attach(model, **(options or {"ranks": (6, 5, 2)}))
    shake(adapter)
    adapter.save(f"{name}-adapter")
    craft.merge(f"{name}-adapter", name, format="peft", head=False)
    return states(model)


@torch.no_grad()
def states(model: Any) -> torch.Tensor:
    return model.eval().base_model(**token_batch()).last_hidden_state


def test_a_lora_without_its_head(pico: Make) -> None:
    base = pico("llama")
    saved_adapter(base)
    done = invoke("merge", "adapter", "-o", "lora", "--format", "peft", "--no-head")
    assert done.exit_code == 0, done.stderr
    serve = f"vllm serve {base.resolve()} --runner pooling --enable-lora --max-lora-rank 8 --lora-modules tuned=lora"
    assert serve in done.stdout.replace("\n", " ").replace("  ", "")
    assert "the trained head is omitted" in done.stderr
    assert "serve the checkpoint that `craft merge` writes" in done.stderr
    config = json.loads(Path("lora/adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert all(".lora_" in name for name in load_file("lora/adapter_model.safetensors"))
    assert json.loads(Path("lora/merge.json").read_text())["head"] == []
    assert torch.allclose(states(with_peft(base).get_base_model()), states(load_adapted(Path("adapter"))[0]), atol=1e-6)
    card = ModelCard.load("lora/README.md")
    assert "The trained head is omitted" in card.content
    assert card.data.pipeline_tag == "feature-extraction"
    assert card.data.eval_results is None


def test_nothing_is_left_of_an_adapter_without_its_head(pico: Make) -> None:
    model = classifier(pico())
    adapter = craft.attach(model, ranks=(6, 5, 2))
    adapter.training_record = {"task": "own"}
    adapter.save("head")
    assert craft.merge("head", "lora", format="peft").tensors_changed == 0
    told = failure("merge", "head", "-o", "other", "--format", "peft", "--no-head")
    assert "--no-head leaves nothing to export, because only the head was trained; remove it" in told
    assert "--no-head is for --format peft" in failure("merge", "head", "--no-head")


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_loras_are_mixed_by_peft(family: str, pico: Make) -> None:
    """Of any ranks, one among them; peft mixes none that has a head."""
    base = pico(family)
    model = classifier(base)
    lora_of(base, "lora", 1)
    lora_of(base, "other", 2, method="lora", rank=1)
    mixed = with_peft(base)
    mixed.load_adapter("other", "other")
    for kind in ("cat", "svd"):
        mixed.add_weighted_adapter(["default", "other"], [0.5, 0.25], kind, combination_type=kind, svd_rank=12)
        mixed.set_adapter(kind)
        right = classifier(base)
        for name, weight in (("lora", 0.5), ("other", 0.25)):
            whole = classifier(base)
            craft.load(whole, f"{name}-adapter").merge()
            for mine, theirs, before in zip(right.parameters(), whole.parameters(), model.parameters(), strict=True):
                mine.data += weight * (theirs.data - before.data)
        assert torch.allclose(states(mixed.get_base_model()), states(right), atol=1e-5)


def test_loras_are_swapped_by_peft(pico: Make) -> None:
    """Loaded beside each other and switched, and in place of each other, as servers do it."""
    from peft.utils.hotswap import hotswap_adapter

    base = pico()
    right = {
        "lora": lora_of(base, "lora", 1),
        "other": lora_of(base, "other", 2),
        "thin": lora_of(base, "thin", 3, method="lora", rank=1),
    }
    model = with_peft(base)
    for name in ("other", "thin"):
        model.load_adapter(name, name)
    for name, adapter in (("thin", "thin"), ("lora", "default"), ("other", "other"), ("lora", "default")):
        model.set_adapter(adapter)
        assert torch.allclose(states(model.get_base_model()), right[name], atol=1e-6)
    swapped = with_peft(base)
    for name in ("other", "lora"):
        hotswap_adapter(swapped, name, "default")
        assert torch.allclose(states(swapped.get_base_model()), right[name], atol=1e-6)
