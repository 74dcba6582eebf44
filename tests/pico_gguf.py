"""A pico GGUF with a tokenizer of bytes, and a package that holds it in place of the demo language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

from craft_cli.files import sha256_of
from craft_cli.models import demo
from craft_cli.models.demo import tensors_digest

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


def make_package(folder: Path) -> dict[str, torch.Tensor]:
    """A package `pico_llm` with that GGUF, which cannot be imported; the weights."""
    package = folder / "pico_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it wants llama.cpp')\n")
    return write_gguf(package / "pico.gguf")


def use_package(folder: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `demo-llm` be that one."""
    wanted = Path("wanted.safetensors")
    save_file(weights, wanted)
    monkeypatch.syspath_prepend(str(folder))
    digests: Any = sha256_of(folder / "pico_llm/pico.gguf"), tensors_digest(wanted)
    monkeypatch.setattr(demo, "SMOLLM2", demo.Quantised("Pico", "pico_llm", "pico.gguf", *digests))
