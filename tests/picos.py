"""A pico configuration of every family, and which of them stand for a layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

_SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
_COMMON: dict[str, Any] = {
    "vocab_size": 64, "max_position_embeddings": 48, "pad_token_id": 0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip

_DECODER: dict[str, Any] = _SIZES | {
    "vocab_size": 64, "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_GROUPED = _DECODER | {"num_attention_heads": 4, "num_key_value_heads": 2}
_WIDE_HEADS = _GROUPED | {"head_dim": 10}
_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}

PICO: dict[str, dict[str, Any]] = {
    "bert": _SIZES | _COMMON,
    "roberta": _SIZES | _COMMON,
    "xlm-roberta": _SIZES | _COMMON,
    "camembert": _SIZES | _COMMON,
    "electra": _SIZES | _COMMON | {"embedding_size": 16},
    "deberta-v2": _SIZES | _COMMON | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "distilbert": {
        "vocab_size": 64, "max_position_embeddings": 48, "dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 32,
        "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "pad_token_id": 0,
    },
    "mpnet": _SIZES | _COMMON,
    "modernbert": _SIZES | _COMMON | {
        "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "t5": {
        "vocab_size": 64, "d_model": 24, "d_kv": 10, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
        "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu", "initializer_factor": 0.3,
    },
    "llama": _WIDE_HEADS,
    "mistral": _WIDE_HEADS | {"sliding_window": 6},
    "qwen2": _GROUPED | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": _WIDE_HEADS,
    "gemma": _WIDE_HEADS,
    "gemma2": _WIDE_HEADS | {"sliding_window": 6, "query_pre_attn_scalar": 10},
    "gemma3_text": _WIDE_HEADS | {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 10},
    "olmo2": _GROUPED,
    "smollm3": _GROUPED | {"no_rope_layer_interval": 2},
    "stablelm": _DECODER | {"num_key_value_heads": 1, "partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "cohere": _GROUPED | {"logit_scale": 0.25},
    "granite": _GROUPED | {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "phi": _DECODER | {"num_key_value_heads": 1, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0},
    "phi3": _GROUPED,
    "opt": {
        "vocab_size": 64, "max_position_embeddings": 48, "hidden_size": 24, "word_embed_proj_dim": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "ffn_dim": 32, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    },
    "gpt2": {
        "vocab_size": 64, "n_positions": 48, "n_embd": 24, "n_layer": 3, "n_head": 2, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    },
    "gpt_neox": _DECODER | _NO_DROPOUT,
    "bloom": {
        "vocab_size": 64, "hidden_size": 24, "n_layer": 3, "n_head": 2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 1, **_NO_DROPOUT,
    },
    "falcon": _DECODER | _NO_DROPOUT | {
        "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 32,
    },
}  # fmt: skip
"""A pico configuration of every supported family; llama's query is 40 x 24, its key and value 20 x 24."""
LAYOUTS = ("bert", "llama", "gpt2", "gpt_neox", "phi3", "falcon", "t5")
"""A family for every way in which weights are laid out: separate, of fewer key-value heads and heads of a size of their own,
in blocks and transposed, head by head, in blocks with gate and up in one, by group, encoder and decoder."""


FUSED = ("modernbert", "phi3", "gpt2", "gpt_neox", "bloom", "falcon")
"""Families with query, key and value in one weight."""


def families(auto_class: str, among: Iterable[str] = ()) -> list[Any]:
    """The families that transformers has such a class for, as parameters of a test: all but one of each layout are slow.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        among: these only.
    """
    import transformers

    known = getattr(transformers, auto_class)._model_mapping._config_mapping
    classes = getattr(transformers, auto_class)._model_mapping._model_mapping
    names = [name for name in PICO if name in known and name in classes and (not among or name in among)]
    return [pytest.param(name, marks=() if name in LAYOUTS else pytest.mark.slow) for name in names]


def names(auto_class: str) -> list[str]:
    """The names of these families."""
    return [str(one.values[0]) for one in families(auto_class)]


_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
"""Families with a class of language models that are none as they were pre-trained."""
DECODERS = [one for one in families("AutoModelForCausalLM") if one.values[0] not in _ENCODERS]
"""The families of language models, as parameters of a test."""
