"""LoRA (Hu et al. 2021, arXiv 2106.09685): a trained product of two thin matrices for every layer.

    dW_l = s B_l A_l        A_l (r, d_in), B_l (d_out, r)        s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv
    2312.03732)

A starts as in peft (Kaiming uniform) and B at zero, so that the change is exactly zero at the start. The chain of a
layer is A_l^T, s B_l^T. It equals peft's `LoraConfig(r, lora_alpha, lora_dropout, use_rslora)` on the same modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from craft_cli.config import LoraOptions
from craft_cli.methods.base import Chain, Change, Method
from craft_cli.methods.frozen import Frozen
from craft_cli.models.cards import Description
from craft_cli.models.stacks import Shape


class LoraChange(Change):
    """A and B of every projection and layer.

    Args:
        shapes: shape (L, d_out, d_in) of every projection's stack.
        options: rank, alpha and dropout.
    """

    def __init__(self, shapes: Mapping[str, Shape], options: LoraOptions) -> None:
        super().__init__()
        self.shapes, self.dropout, self.scale = shapes, options.lora_dropout, _scale(options)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        for name, (layers, d_out, d_in) in shapes.items():
            a = [nn.Parameter(torch.empty(options.rank, d_in)) for _ in range(layers)]
            for matrix in a:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            self.lora_A[name] = nn.ParameterList(a)
            self.lora_B[name] = nn.ParameterList(torch.zeros(d_out, options.rank) for _ in range(layers))

    def chains(self, projection: str, dtype: torch.dtype | None = None) -> list[Chain]:
        """A_l^T (d_in, r), s B_l^T (r, d_out) of every layer."""
        a_layers, b_layers = self.lora_A[projection], self.lora_B[projection]
        assert isinstance(a_layers, nn.ParameterList)
        assert isinstance(b_layers, nn.ParameterList)
        pairs = zip(a_layers, b_layers, strict=True)
        return [(a.T.to(dtype), (self.scale * b.T).to(dtype)) for a, b in pairs]


def _scale(options: LoraOptions) -> float:
    return options.alpha / (math.sqrt(options.rank) if options.use_rslora else options.rank)


class Lora(Method):
    """The LoRA method; it keeps no tensors of the base."""

    name, title, paper = "lora", "LoRA", "arXiv 2106.09685"
    idea = "a trained product of two thin matrices for every adapted weight"
    Options = LoraOptions
    training_only = ("lora_dropout",)

    def build(self, frozen: Frozen, options: LoraOptions) -> LoraChange:
        """Initialize A at random and B at zero."""
        return LoraChange(frozen.shapes, options)

    def count(self, shapes: Mapping[str, Shape], options: LoraOptions) -> int:
        """L r (d_in + d_out) per projection."""
        return sum(n * options.rank * (d_out + d_in) for n, d_out, d_in in shapes.values())

    def describe(self, settings: Mapping[str, Any]) -> Description:
        """Describe it by rank and alpha."""
        rslora = ", rsLoRA" if settings["use_rslora"] else ""
        return self.described(settings, f"alpha {settings['alpha']:g}{rslora}", "in A and B of")


METHOD = Lora()
