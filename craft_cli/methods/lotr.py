"""LoTR (Bershatsky et al. 2024, arXiv 2402.01376): the changes of all layers as one low-rank tensor (Tucker-2).

    dW_l = s A G_l B        A (d_out, r) and B (r, d_in) of all layers, G_l (r, r) of layer l; s = alpha / r

A, B and G are trained. The authors' code (daskol/lotr) also shares A and B between query and value. Here they are
shared by all adapted projections if these have the same shape (`all`), or by the layers of a projection. G starts at
zero. A and B start at N(0, 1), or at the orthonormal bases of the stacked weights, as in the authors' code (`svd`:
Tucker-2 by HOSVD; their variant with the core of the weights in G does not start at the base model). The chain of a
layer is B^T (d_in, r), s G_l^T (r, r), A^T (r, d_out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from craft_cli.config import LotrOptions
from craft_cli.errors import ConfigError, ModelError, in_words
from craft_cli.methods.base import Chain, Change, Method, Progress
from craft_cli.methods.frozen import Frozen, Sketch
from craft_cli.models.cards import Description
from craft_cli.models.stacks import Shape, Weights
from craft_cli.tucker import hosvd

Bases = tuple[Tensor, Tensor]
"""The bases U_out (d_out, r) and U_in (d_in, r)."""


def sharing(shapes: Mapping[str, Shape], options: LotrOptions) -> dict[str, list[str]]:
    """The projections that share A and B, by the name of the pair."""
    if options.lotr_share == "all" and len({shape[1:] for shape in shapes.values()}) == 1:
        return {"all": list(shapes)}
    return {name: [name] for name in shapes}


@dataclass(frozen=True, eq=False, repr=False)
class Start(Sketch):
    """The identity of the weights, and initial values of A and B, which an adapter does not store.

    Attributes:
        bases: bases of every pair; empty for a random start.
    """

    bases: Mapping[str, Bases] = field(default_factory=dict)


class LotrChange(Change):
    """A and B of every pair, and G of every projection.

    Args:
        frozen: shapes, and optionally bases to start at.
        options: rank, alpha and sharing.
    """

    def __init__(self, frozen: Frozen, options: LotrOptions) -> None:
        super().__init__()
        self.shapes, self.scale = frozen.shapes, options.alpha / options.rank
        self.lotr_A, self.lotr_B, self.lotr_G = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.pair_of: dict[str, str] = {}
        bases = frozen.bases if isinstance(frozen, Start) else {}
        for pair, projections in sharing(self.shapes, options).items():
            _, d_out, d_in = self.shapes[projections[0]]
            self.lotr_A[pair] = nn.Parameter(bases[pair][0].contiguous() if bases else torch.randn(d_out, options.rank))
            self.lotr_B[pair] = nn.Parameter(
                bases[pair][1].T.contiguous() if bases else torch.randn(options.rank, d_in)
            )
            for name in projections:
                self.pair_of[name] = pair
                self.lotr_G[name] = nn.Parameter(torch.zeros(self.shapes[name][0], options.rank, options.rank))

    def chains(self, projection: str, dtype: torch.dtype | None = None) -> list[Chain]:
        """B^T (d_in, r), s G_l^T (r, r), A^T (r, d_out) of every layer."""
        pair = self.pair_of[projection]
        b, a = self.lotr_B[pair].T.to(dtype), self.lotr_A[pair].T.to(dtype)
        return [(b, g, a) for g in (self.scale * self.lotr_G[projection].mT).to(dtype).unbind(0)]


class Lotr(Method):
    """The LoTR method; it keeps no tensors of the base."""

    name, title, paper = "lotr", "LoTR", "arXiv 2402.01376"
    idea = "trained bases shared by all layers, one small trained matrix for every adapted weight"
    Options = LotrOptions

    def prepare(
        self, weights: Weights, options: LotrOptions, cache_dir: str | None, progress: Progress
    ) -> tuple[Start, Sequence[str]]:
        """Compute the bases of the stacked weights, if A and B start there.

        Raises:
            ConfigError: a rank above the dimensions of the weights.
            ModelError: a weight is not finite.
        """
        self.check_rank(weights.shapes, options)
        pairs = sharing(weights.shapes, options)
        notes = []
        if options.lotr_share == "all" and len(pairs) > 1:
            notes.append("the projections have different shapes, so each has its own A and B (--lotr-share projection)")
        bases: dict[str, Bases] = {}
        if options.lotr_start == "svd":
            for pair, projections in pairs.items():
                stack = [layer for name in projections for layer in weights.stacks[name]]
                most = min(weights.shapes[projections[0]][1:])
                if options.rank > most:
                    raise ConfigError(f"--rank {options.rank}: the maximum with --lotr-start svd is {most} here")
                progress(f"bases of {in_words(projections)}", 0, 1)
                try:
                    _, u_out, u_in = hosvd(stack, (1, options.rank, options.rank)).factors
                except (ValueError, RuntimeError) as error:
                    raise ModelError(f"{weights.model}: cannot decompose {in_words(projections)}: {error}") from error
                progress(f"bases of {in_words(projections)}", 1, 1)
                bases[pair] = (u_out, u_in)
        return replace(Start.of(weights), bases=bases), notes

    def build(self, frozen: Frozen, options: LotrOptions) -> LotrChange:
        """Initialize G at zero."""
        return LotrChange(frozen, options)

    def count(self, shapes: Mapping[str, Shape], options: LotrOptions) -> int:
        """The sum of r (d_in + d_out) per pair and L r^2 per projection."""
        r = options.rank
        pairs = (shapes[projections[0]] for projections in sharing(shapes, options).values())
        return sum(r * (d_out + d_in) for _, d_out, d_in in pairs) + sum(n * r * r for n, _, _ in shapes.values())

    def facts(
        self, frozen: Any, settings: Mapping[str, Any], trained: Mapping[str, Tensor], projection: str
    ) -> dict[str, Any]:
        """The number of its own parameters, and of those in the pair, which other projections may share."""
        options = self.options(settings)
        pair = next(name for name, them in sharing(frozen.shapes, options).items() if projection in them)
        shared = sum(trained[f"lotr_{part}.{pair}"].numel() for part in "AB")
        return {"parameters": trained[f"lotr_G.{projection}"].numel(), "shared": shared}

    def describe(self, settings: Mapping[str, Any]) -> Description:
        """Describe it by rank, alpha and sharing."""
        share = "over all projections" if settings["lotr_share"] == "all" else "by projection"
        return self.described(settings, f"alpha {settings['alpha']:g}, shared {share}", "in A, B and G of")


METHOD = Lotr()
