"""Where each model family keeps its attention projections. A new family is a new row of the table.

Paths are relative to the base model (`model.base_model` of any head), `{layer}` stands for the number of the layer.
The canonical names of the projections are `query`, `key`, `value` and `output`, whatever the family calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from craft_cli.errors import ConfigError, ModelError, nearest
from craft_cli.models.views import Rows, View

TARGETS = ("query", "key", "value", "output")

Family = Mapping[str, Callable[[Any], View]]
"""For every canonical projection, its view in a layer, given the model's configuration."""


def separate(attention: str, query: str, key: str, value: str, output: str) -> Family:
    """A family with one linear module for each projection, below the path `attention`."""
    names = {"query": query, "key": key, "value": value, "output": output}

    def at(name: str) -> Callable[[Any], View]:
        return lambda config: View(f"{attention}.{name}")

    return {target: at(name) for target, name in names.items()}


_BERT = separate("encoder.layer.{layer}.attention", "self.query", "self.key", "self.value", "output.dense")

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "deberta-v2": separate(
        "encoder.layer.{layer}.attention", "self.query_proj", "self.key_proj", "self.value_proj", "output.dense"
    ),
    "distilbert": separate("transformer.layer.{layer}.attention", "q_lin", "k_lin", "v_lin", "out_lin"),
    "gpt2": {  # Conv1D: one weight (d, 3 d) for query, key and value
        "query": lambda config: View("h.{layer}.attn.c_attn", Rows(0, config.hidden_size), transposed=True),
        "key": lambda config: View(
            "h.{layer}.attn.c_attn", Rows(config.hidden_size, config.hidden_size), transposed=True
        ),
        "value": lambda config: View(
            "h.{layer}.attn.c_attn", Rows(2 * config.hidden_size, config.hidden_size), transposed=True
        ),
        "output": lambda config: View("h.{layer}.attn.c_proj", transposed=True),
    },
    "llama": separate("layers.{layer}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
}


def check_targets(targets: Sequence[str]) -> None:
    """Refuse names that are no projection.

    Raises:
        ConfigError: an unknown or repeated target, or none at all.
    """
    for target in targets:
        if target not in TARGETS:
            raise ConfigError(f"--targets: unknown projection '{target}'{nearest(target, TARGETS)}")
    if not targets or len(set(targets)) != len(targets):
        raise ConfigError(f"--targets: name each projection once, of {', '.join(TARGETS)}")


def layer_views(config: Any, targets: Sequence[str]) -> dict[str, list[View]]:
    """The views of every target, one a layer.

    Args:
        config: the model's `PretrainedConfig`.
        targets: canonical names.

    Raises:
        ConfigError: a target is unknown.
        ModelError: the family has no row in the table.
    """
    check_targets(targets)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"no attention projections are known for models of type '{config.model_type}'; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    layers = config.num_hidden_layers
    views = {}
    for target in targets:
        template = family[target](config)
        views[target] = [replace(template, module=template.module.format(layer=layer)) for layer in range(layers)]
    return views
