"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604): a trained r x r matrix between frozen singular vectors of the weight.

With the leading r singular vectors of W_l = U S V^T:

    dW_l = s U_r R_l S_r V_r^T        R_l (r, r) trained, s = alpha / r

The singular values are on the input side, and the scale is alpha / r, as in the authors' code
(MohammadrezaBanaei/LoRA-XS). There R starts at N(0, 1e-5^2), here at zero, so that the change is exactly zero. The
chain of a layer is V_r S_r (d_in, r), s R_l^T (r, r), U_r^T (r, d_out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from craft_cli.config import LoraXsOptions
from craft_cli.methods.base import Chain, Change
from craft_cli.methods.singular import SingularMethod, SingularVectors
from craft_cli.models.cards import Description
from craft_cli.models.stacks import Shape


class LoraXsChange(Change):
    """R of every projection and layer.

    Args:
        frozen: the singular vectors of every projection.
        options: rank and alpha.
    """

    def __init__(self, frozen: SingularVectors, options: LoraXsOptions) -> None:
        super().__init__()
        self.shapes, self.scale = frozen.shapes, options.alpha / options.rank
        self.lora_xs = nn.ParameterDict()
        for name, (u, s, v) in frozen.parts.items():
            self.register_buffer(f"out_{name}", u.mT.contiguous(), persistent=False)  # (L, r, d_out)
            self.register_buffer(f"in_{name}", v * s[:, None], persistent=False)  # (L, d_in, r)
            self.lora_xs[name] = nn.Parameter(torch.zeros(*s.shape, s.shape[1]))  # (L, r, r)

    def chains(self, projection: str, dtype: torch.dtype | None = None) -> list[Chain]:
        """V_r S_r (d_in, r), s R_l^T (r, r), U_r^T (r, d_out) of every layer."""
        into, out = self.get_buffer(f"in_{projection}").to(dtype), self.get_buffer(f"out_{projection}").to(dtype)
        r = (self.scale * self.lora_xs[projection].mT).to(dtype)
        return list(zip(into, r.unbind(0), out, strict=True))


class LoraXs(SingularMethod):
    """The LoRA-XS method; it keeps the leading singular vectors of every weight."""

    name, title, paper = "lora-xs", "LoRA-XS", "arXiv 2405.17604"
    idea = "a small trained matrix between the frozen leading singular vectors of every adapted weight"
    Options = LoraXsOptions

    def build(self, frozen: SingularVectors, options: LoraXsOptions) -> LoraXsChange:
        """Initialize R at zero."""
        return LoraXsChange(frozen, options)

    def count(self, shapes: Mapping[str, Shape], options: LoraXsOptions) -> int:
        """L r^2 per projection."""
        return sum(n * min(options.rank, d_out, d_in) ** 2 for n, d_out, d_in in shapes.values())

    def describe(self, settings: Mapping[str, Any]) -> Description:
        """Describe it by rank and alpha."""
        return self.described(settings, f"alpha {settings['alpha']:g}", "between the singular vectors of")


METHOD = LoraXs()
