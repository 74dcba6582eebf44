"""The location of projections in each model family. A new family is a new row of the table.

Paths are relative to the base model (`model.base_model` of any head), and `{layer}` stands for the number of the layer.
Projections have canonical names in all families: `query`, `key`, `value` and `output` for the attention, `gate`, `up` and
`down` for the MLP. An MLP with two matrices has only `up` and `down`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from craft_cli.config import ALL_LINEAR, TARGETS
from craft_cli.errors import ConfigError, ModelError, nearest
from craft_cli.models.views import Rows, View

Family = Callable[[Any], Mapping[str, View]]
"""Views of all projections of a family, as functions of the model's configuration."""


def separate(layer: str, **modules: str) -> Family:
    """One linear module per projection, by path below the layer."""
    return lambda config: {name: View(f"{layer}.{module}") for name, module in modules.items()}


def transposed(family: Family) -> Family:
    """Weights stored as (d_in, d_out), as in transformers' Conv1D."""
    return lambda config: {name: replace(view, transposed=True) for name, view in family(config).items()}


def fused(module: str, layout: Callable[[Any], tuple[Rows, Rows, Rows]]) -> Family:
    """Query, key and value in one weight."""
    return lambda config: {
        name: View(module, rows) for name, rows in zip(("query", "key", "value"), layout(config), strict=True)
    }


def gate_and_up(module: str) -> Family:
    """Gate and up projection in one weight, the gate first."""

    def views(config: Any) -> Mapping[str, View]:
        width = config.intermediate_size
        return {"gate": View(module, Rows(0, width)), "up": View(module, Rows(width, width))}

    return views


def joined(*families: Family) -> Family:
    """The projections of all."""
    return lambda config: {name: view for family in families for name, view in family(config).items()}


# -- rows of query, key and value in a fused weight --- -----------------------------------------------------------------


def _heads(config: Any) -> tuple[int, int]:
    """The number of query heads, and the head size."""
    heads = config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def blocks(config: Any, groups: int | None = None) -> tuple[Rows, Rows, Rows]:
    """The queries of all heads, then all keys, then all values.

    Args:
        config: the model's configuration.
        groups: number of key-value heads. Default: from the configuration, or the number of query heads.
    """
    heads, size = _heads(config)
    groups = groups or getattr(config, "num_key_value_heads", None) or heads
    return (
        Rows(0, heads * size),
        Rows(heads * size, groups * size),
        Rows((heads + groups) * size, groups * size),
    )


def by_head(config: Any) -> tuple[Rows, Rows, Rows]:
    """Query, key and value, head by head."""
    heads, size = _heads(config)
    return Rows(0, size, heads), Rows(size, size, heads), Rows(2 * size, size, heads)


def by_group(config: Any, groups: int) -> tuple[Rows, Rows, Rows]:
    """For each key-value head: the queries of its query heads, its key, its value."""
    heads, size = _heads(config)
    queries = heads // groups * size
    return Rows(0, queries, groups), Rows(queries, size, groups), Rows(queries + size, size, groups)


def _falcon(config: Any) -> tuple[Rows, Rows, Rows]:
    """40B and 11B, 7B, the others."""
    if config.new_decoder_architecture:
        return by_group(config, config.num_kv_heads)
    return blocks(config, groups=1) if config.multi_query else by_head(config)


# -- the table ----------------------------------------------------------------------------------------------------------


_BERT = separate(
    "encoder.layer.{layer}", query="attention.self.query", key="attention.self.key", value="attention.self.value",
    output="attention.output.dense", up="intermediate.dense", down="output.dense",
)  # fmt: skip
_LLAMA = separate(
    "layers.{layer}", query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.o_proj",
    gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
)  # fmt: skip


def _bloom(config: Any) -> Mapping[str, View]:
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise ModelError("slow_but_exact in its configuration bypasses the adapted layers; set it to false")
    return joined(
        fused("h.{layer}.self_attention.query_key_value", by_head),
        separate("h.{layer}", output="self_attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    )(config)


def _t5(config: Any) -> Mapping[str, View]:
    """The encoder; version 1.1 has a gate."""
    mlp = {"gate": "wi_0", "up": "wi_1"} if config.is_gated_act else {"up": "wi"}
    attention = separate(
        "encoder.block.{layer}.layer.0.SelfAttention", query="q", key="k", value="v", output="o"
    )  # fmt: skip
    return joined(attention, separate("encoder.block.{layer}.layer.1.DenseReluDense", **mlp, down="wo"))(config)


FAMILIES: dict[str, Family] = {
    # encoders
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "deberta-v2": separate(
        "encoder.layer.{layer}", query="attention.self.query_proj", key="attention.self.key_proj",
        value="attention.self.value_proj", output="attention.output.dense", up="intermediate.dense", down="output.dense",
    ),
    "distilbert": separate(
        "transformer.layer.{layer}", query="attention.q_lin", key="attention.k_lin", value="attention.v_lin",
        output="attention.out_lin", up="ffn.lin1", down="ffn.lin2",
    ),
    "mpnet": separate(
        "encoder.layer.{layer}", query="attention.attn.q", key="attention.attn.k", value="attention.attn.v",
        output="attention.attn.o", up="intermediate.dense", down="output.dense",
    ),
    "modernbert": joined(
        fused("layers.{layer}.attn.Wqkv", blocks), gate_and_up("layers.{layer}.mlp.Wi"),
        separate("layers.{layer}", output="attn.Wo", down="mlp.Wo"),
    ),
    "t5": _t5,
    # decoders
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "olmo2": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "cohere": _LLAMA,
    "granite": _LLAMA,
    "phi": separate(
        "layers.{layer}", query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj",
        output="self_attn.dense", up="mlp.fc1", down="mlp.fc2",
    ),
    "phi3": joined(
        fused("layers.{layer}.self_attn.qkv_proj", blocks), gate_and_up("layers.{layer}.mlp.gate_up_proj"),
        separate("layers.{layer}", output="self_attn.o_proj", down="mlp.down_proj"),
    ),
    "opt": separate(
        "decoder.layers.{layer}", query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj",
        output="self_attn.out_proj", up="fc1", down="fc2",
    ),
    "gpt2": transposed(joined(
        fused("h.{layer}.attn.c_attn", blocks),
        separate("h.{layer}", output="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
    )),
    "gpt_neox": joined(
        fused("layers.{layer}.attention.query_key_value", by_head),
        separate("layers.{layer}", output="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    ),
    "bloom": _bloom,
    "falcon": joined(
        fused("h.{layer}.self_attention.query_key_value", _falcon),
        separate("h.{layer}", output="self_attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    ),
}  # fmt: skip

_REFUSED = {
    "albert": "all layers of ALBERT are one and the same, so there is nothing to stack",
    "gemma3": "of Gemma 3 the text models are supported (gemma3_text), not those with images",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_targets(targets: Sequence[str]) -> None:
    """Refuse names that are no projection.

    Raises:
        ConfigError: an unknown or repeated target, or none at all.
    """
    if tuple(targets) == (ALL_LINEAR,):
        return
    if ALL_LINEAR in targets:
        raise ConfigError(f"--targets: {ALL_LINEAR} cannot be combined with other projections; remove them")
    for target in targets:
        if target not in TARGETS:
            raise ConfigError(f"--targets: unknown projection '{target}'{nearest(target, (*TARGETS, ALL_LINEAR))}")
    if not targets or len(set(targets)) != len(targets):
        raise ConfigError(f"--targets: name each projection once, of {', '.join(TARGETS)}, or {ALL_LINEAR}")


def targets_of(config: Any, targets: Sequence[str]) -> tuple[str, ...]:
    """Resolve targets: `all-linear` means every projection of the model.

    Args:
        config: the model's `PretrainedConfig`.
        targets: canonical names, or `all-linear` alone.

    Raises:
        ConfigError: a target is unknown, or the family has none of this name.
        ModelError: the family has no row in the table.
    """
    check_targets(targets)
    views = _views(config)
    if tuple(targets) == (ALL_LINEAR,):
        return tuple(target for target in TARGETS if target in views)
    for target in targets:
        if target not in views:
            has = ", ".join(name for name in TARGETS if name in views)
            raise ConfigError(f"--targets: {config.model_type} has no projection '{target}'; it has {has}")
    return tuple(targets)


def layer_views(config: Any, targets: Sequence[str]) -> dict[str, list[View]]:
    """The views of every target, one per layer.

    Args:
        config: the model's `PretrainedConfig`.
        targets: canonical names, or `all-linear` alone.

    Raises:
        ConfigError: a target is unknown, or the family has none of this name.
        ModelError: the family has no row in the table.
    """
    names, templates = targets_of(config, targets), _views(config)
    return {
        name: [
            replace(templates[name], module=templates[name].module.format(layer=layer))
            for layer in range(config.num_hidden_layers)
        ]
        for name in names
    }


def _views(config: Any) -> Mapping[str, View]:
    kind = config.model_type
    if kind in FAMILIES:
        try:
            return FAMILIES[kind](config)
        except (ArithmeticError, AttributeError, TypeError) as error:
            raise ModelError(f"the sizes in config.json are invalid for a model of type '{kind}': {error}") from error
    reason = _REFUSED.get(kind)
    if reason is None and any(getattr(config, name, None) for name in _EXPERTS):
        reason = "its layers are mixtures of experts, whose weights cannot be stacked by layer"
    raise ModelError(
        f"models of type '{kind}' cannot be adapted{f': {reason}' if reason else ''}; "
        f"supported: {', '.join(sorted(FAMILIES))}"
    )
