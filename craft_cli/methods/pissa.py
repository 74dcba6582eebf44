"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that starts at the leading singular vectors of the weight.

With the leading r singular vectors of W_l = U S V^T, and s = alpha / r:

    B0 = U_r (S_r / s)^1/2        A0 = (S_r / s)^1/2 V_r^T        (d_out, r), (r, d_in), frozen
    dW_l = s (B A - B0 A0)        B = B0 + b,  A = A0 + a

PiSSA trains A and B and subtracts s B0 A0 from the base. Here the differences a and b are trained, both zero at the
start, and the base does not change:

    dW_l = s (B a + b A0)

This is exactly zero at the start and has the same gradients, so training is the same with any optimizer without weight
decay. Weight decay acts on a and b, towards the base. The chain is [a^T A0^T] (d_in, 2r), s [B^T; b^T] (2r, d_out). It
equals peft's `init_lora_weights="pissa"`, or with `pissa_niter` its `"pissa_niter_N"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from craft_cli.config import PissaOptions
from craft_cli.methods.base import Chain, Change
from craft_cli.methods.singular import SingularMethod, SingularVectors
from craft_cli.models.cards import Description
from craft_cli.models.stacks import Shape


class PissaChange(Change):
    """a and b of every projection and layer.

    Args:
        frozen: the singular vectors of every projection.
        options: rank and alpha.
    """

    def __init__(self, frozen: SingularVectors, options: PissaOptions) -> None:
        super().__init__()
        self.shapes, self.scale = frozen.shapes, options.alpha / options.rank
        self.pissa_a, self.pissa_b = nn.ModuleDict(), nn.ModuleDict()
        for name, (u, s, v) in frozen.parts.items():
            root = (s / self.scale).sqrt()[:, None]  # (L, 1, r)
            self.register_buffer(f"a0_{name}", (v * root).mT.contiguous(), persistent=False)  # (L, r, d_in)
            self.register_buffer(f"b0_{name}", u * root, persistent=False)  # (L, d_out, r)
            self.pissa_a[name] = nn.ParameterList(torch.zeros(s.shape[1], v.shape[1]) for _ in s)
            self.pissa_b[name] = nn.ParameterList(torch.zeros(u.shape[1], s.shape[1]) for _ in s)

    def chains(self, projection: str, dtype: torch.dtype | None = None) -> list[Chain]:
        """[a^T A0^T] (d_in, 2r), s [B^T; b^T] (2r, d_out) of every layer."""
        chains: list[Chain] = []
        a_layers: Any = self.pissa_a[projection]
        b_layers: Any = self.pissa_b[projection]
        a0_layers, b0_layers = self.get_buffer(f"a0_{projection}"), self.get_buffer(f"b0_{projection}")
        for a, b, a0, b0 in zip(a_layers, b_layers, a0_layers, b0_layers, strict=True):
            right = self.scale * torch.cat([b0 + b, b], dim=1)  # (d_out, 2r)
            chains.append((torch.cat([a, a0]).T.to(dtype), right.T.to(dtype)))
        return chains


class Pissa(SingularMethod):
    """The PiSSA method; it keeps the leading singular vectors of every weight."""

    name, title, paper = "pissa", "PiSSA", "arXiv 2404.02948"
    idea = "LoRA that starts at the leading singular vectors of every adapted weight"
    Options = PissaOptions

    def build(self, frozen: SingularVectors, options: PissaOptions) -> PissaChange:
        """Initialize a and b at zero."""
        return PissaChange(frozen, options)

    def count(self, shapes: Mapping[str, Shape], options: PissaOptions) -> int:
        """L r (d_in + d_out) per projection."""
        return sum(n * min(options.rank, d_out, d_in) * (d_out + d_in) for n, d_out, d_in in shapes.values())

    def describe(self, settings: Mapping[str, Any]) -> Description:
        """Describe it by rank and alpha."""
        niter = f", randomized SVD, {settings['pissa_niter']} iterations" if settings.get("pissa_niter") else ""
        return self.described(settings, f"alpha {settings['alpha']:g}{niter}", "in A and B of")


METHOD = Pissa()
