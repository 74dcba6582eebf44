"""Decoders with the head of a language model: exact start, generation, merge, LoRA, and a model run from disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import build_pico, shake, token_batch
from picos import DECODERS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import craft_cli as craft
from craft_cli.errors import ModelError
from craft_cli.methods.adapter_folder import read_adapter
from craft_cli.methods.as_dense import AdaptedBase
from craft_cli.models.hub import resolve
from craft_cli.models.loading import load_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
Make = Callable[..., Path]
KIND = "AutoModelForCausalLM"


def loaded(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """At the tokens that are not padding."""
    batch = token_batch()
    found: torch.Tensor = model(**batch).logits[batch["attention_mask"].bool()]
    return found


@torch.no_grad()
def generated(model: Any) -> list[list[int]]:
    """Greedy answers of 12 tokens to prompts of the same length."""
    prompts = token_batch()["input_ids"][:2]
    answers: list[list[int]] = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=False, eos_token_id=None
    ).tolist()
    return answers


def adapted_one(base: Path, **options: Any) -> Any:
    """A model with a shaken adapter on every projection, saved in the folder `saved`."""
    model = loaded(base)
    start = logits(model)
    adapter = craft.attach(model, **({"targets": "all-linear", "ranks": (6, 5, 2)} | options))
    assert torch.equal(logits(model), start)
    shake(adapter, 0.1)
    adapter.save("saved")
    assert (logits(model) - start).abs().max() > 1e-2 * start.abs().max()
    return model


@pytest.mark.parametrize("family", DECODERS)
def test_a_language_model_is_adapted_generates_and_leaves(family: str, pico: Make) -> None:
    base = pico(family, kind=KIND)
    model = adapted_one(base)
    record = json.loads(Path("saved/adapter_config.json").read_text())
    assert record["head"] == []
    assert record["model"]["architecture"].endswith(("ForCausalLM", "LMHeadModel"))
    expected, answers = logits(model), generated(model)

    streamed = AdaptedBase(read_adapter(Path("saved")))
    batch = token_batch()
    torch.testing.assert_close(streamed.base.logits(streamed.base.read, batch), logits(loaded(base)))
    torch.testing.assert_close(streamed.logits(batch), expected)

    assert craft.merge("saved", "merged").difference <= 1e-5
    merged, report = load_model(resolve("merged"), KIND)
    assert not report
    assert load_file("merged/model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert Path("merged", file).read_bytes() == (base / file).read_bytes()
    torch.testing.assert_close(logits(merged.eval()), expected, rtol=1e-4, atol=1e-5)
    assert generated(merged) == answers

    craft.merge("saved", "lora", format="peft")
    config = json.loads(Path("lora/adapter_config.json").read_text())
    assert (config["task_type"], config["lora_alpha"]) == ("CAUSAL_LM", config["r"])
    assert config["modules_to_save"] is None
    assert "rank_pattern" not in config
    again = peft.PeftModel.from_pretrained(loaded(base), "lora").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_tied_embeddings_stay_tied_and_untied_ones_apart(pico: Make, tmp_path: Path) -> None:
    base = build_pico("llama", tmp_path / "tied", kind=KIND, tie_word_embeddings=True)
    expected = logits(adapted_one(base))
    craft.merge("saved", "merged")
    written = load_file("merged/model.safetensors")
    assert "lm_head.weight" not in written
    torch.testing.assert_close(logits(loaded("merged")), expected, rtol=1e-4, atol=1e-5)
    # a file with a head of its own, whatever its configuration says: transformers takes it
    tensors = load_file(base / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2},
        base / "model.safetensors",
        {"format": "pt"},
    )
    expected = logits(adapted_one(base))
    craft.merge("saved", "merged", overwrite=True)
    assert "lm_head.weight" in load_file("merged/model.safetensors")
    torch.testing.assert_close(logits(loaded("merged")), expected, rtol=1e-4, atol=1e-5)


def test_its_head_belongs_to_the_base(pico: Make) -> None:
    shutil.copytree(pico("gpt_neox", kind=KIND), "base")
    adapted_one(Path("base").resolve())
    tensors = load_file("base/model.safetensors")
    assert "embed_out.weight" in tensors
    tensors["embed_out.weight"][0] += 1
    save_file(tensors, "base/model.safetensors", {"format": "pt"})
    told = "the weights of the language model's head differ"
    with pytest.raises(ModelError, match=told):
        craft.load(loaded("base"), "saved")
    with pytest.raises(ModelError, match=told):
        craft.merge("saved", "merged")
    craft.merge("saved", "merged", allow_other_base=True)


def test_a_model_without_that_head_is_none(pico: Make) -> None:
    with pytest.raises(ModelError, match=r"is not a language model: it lacks lm_head\.weight"):
        load_model(resolve(str(pico("llama"))), KIND)


def test_a_head_named_is_trained_and_kept(pico: Make) -> None:
    base = pico("llama", kind=KIND)
    model = loaded(base)
    adapter = craft.attach(model, head=["lm_head.weight"], ranks=(6, 5, 2))
    assert model.lm_head.weight.requires_grad
    shake(adapter, 0.1)
    with torch.no_grad():
        model.lm_head.weight += 0.5
    adapter.save("saved")
    again = loaded(base)
    craft.load(again, "saved")
    assert torch.equal(logits(again), logits(model))
    craft.merge("saved", "merged")
    torch.testing.assert_close(logits(loaded("merged")), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_files_of_a_chat_model_are_copied_whatever_side_it_pads(side: str, pico: Make) -> None:
    shutil.copytree(pico("llama", kind=KIND), "base")
    files = {
        "chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}\n",
        "generation_config.json": '{"temperature": 0.6, "do_sample": true, "eos_token_id": [1, 2]}',
        "added_tokens.json": '{ "film": 8 }',
    }
    for name, text in files.items():
        Path("base", name).write_text(text)
    settings = json.loads(Path("base/tokenizer_config.json").read_text())
    Path("base/tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": side}))
    adapted_one(Path("base").resolve())
    craft.merge("saved", "merged")
    assert {name: Path("merged", name).read_text() for name in files} == files
    assert loaded("merged").generation_config.temperature == 0.6
    result = craft.merge("saved", "lora", format="peft")
    line = f"vllm serve {Path('base').resolve()} --enable-lora --max-lora-rank 8 --lora-modules tuned=lora"
    assert result.serve == {"vLLM": line}
    card = Path("lora/README.md").read_text()
    assert "base = LlamaForCausalLM.from_pretrained('base')" in card
    assert "label" not in card.lower()


@pytest.mark.slow
def test_its_head_is_not_quantised(pico: Make) -> None:
    pytest.importorskip("bitsandbytes")
    from craft_cli.models.loading import load_quantised

    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    base = resolve(str(pico("llama", kind=KIND, **sizes)))
    model, fresh = load_quantised(base, KIND, {}, 4, torch.float32, torch.device("cpu"))
    assert fresh == []
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    start = logits(model)
    assert torch.equal(logits(model), start)
    adapter = craft.attach(model, craft.decompose(str(base.folder), "all-linear", (6, 5, 2)))
    assert torch.equal(logits(model), start)
    shake(adapter, 0.1)
    adapter.save("saved")
    assert (logits(model) - start).abs().max() > 1e-2 * start.abs().max()
