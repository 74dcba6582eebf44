"""Tucker format of a stack of layer matrices: a small core, one factor matrix per mode, and the full spectra."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from craft_cli.tucker.ops import multi_mode_product

MODES = ("layer", "out", "in")
"""Names of the three modes of a stack W (L, d_out, d_in)."""


@dataclass(frozen=True, eq=False)
class TuckerTensor:
    """A stack W (L, d_out, d_in) in Tucker format, W ~ core x0 U_layer x1 U_out x2 U_in.

    Attributes:
        core: G, (r_layer, r_out, r_in).
        factors: U_layer (L, r_layer), U_out (d_out, r_out), U_in (d_in, r_in), orthonormal columns.
        spectra: all singular values of each unfolding of W, descending: (L,), (d_out,), (d_in,). They give the
            error of a truncation without the original.

    Raises:
        ValueError: the shapes do not match.
    """

    core: Tensor
    factors: tuple[Tensor, Tensor, Tensor]
    spectra: tuple[Tensor, Tensor, Tensor]

    def __post_init__(self) -> None:
        if self.core.ndim != 3 or len(self.factors) != 3 or len(self.spectra) != 3:
            raise ValueError(f"the core must have three modes, but its shape is {tuple(self.core.shape)}")
        for mode, factor, spectrum, rank in zip(MODES, self.factors, self.spectra, self.core.shape, strict=True):
            if factor.ndim != 2 or factor.shape[1] != rank or not 1 <= rank <= factor.shape[0]:
                raise ValueError(
                    f"factor of mode {mode} is {tuple(factor.shape)}, which does not fit a core {tuple(self.core.shape)}"
                )
            if tuple(spectrum.shape) != (factor.shape[0],):
                raise ValueError(
                    f"spectrum of mode {mode} is {tuple(spectrum.shape)}, not ({factor.shape[0]},) as its factor"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (L, d_out, d_in) of the stack."""
        layer, out, in_ = (factor.shape[0] for factor in self.factors)
        return layer, out, in_

    @property
    def ranks(self) -> tuple[int, int, int]:
        """The multilinear ranks (r_layer, r_out, r_in)."""
        layer, out, in_ = self.core.shape
        return layer, out, in_

    @property
    def energy(self) -> float:
        """The share of the squared norm that the core keeps, ||G||^2 / ||W||^2; 1.0 for a stack of zeros."""
        total = self.spectra[0].double().square().sum()
        return (
            min(1.0, float(self.core.double().square().sum() / total)) if total > 0 else 1.0
        )  # float32 may round above 1

    @property
    def energy_by_mode(self) -> tuple[float, float, float]:
        """The share of ||W||^2 that truncating each mode alone would keep."""
        kept = []
        for spectrum, rank in zip(self.spectra, self.ranks, strict=True):
            squares = spectrum.double().square()
            kept.append(float(squares[:rank].sum() / squares.sum()) if squares.sum() > 0 else 1.0)
        return kept[0], kept[1], kept[2]

    def truncated(self, ranks: tuple[int, int, int]) -> TuckerTensor:
        """The same decomposition at smaller ranks: leading columns and leading block, without recomputing anything.

        Raises:
            ValueError: a rank is below 1 or above the current one.
        """
        if any(not 1 <= rank <= kept for rank, kept in zip(ranks, self.ranks, strict=True)):
            raise ValueError(f"cannot truncate multilinear ranks {self.ranks} to {tuple(ranks)}")
        layer, out, in_ = ranks
        u_layer, u_out, u_in = self.factors
        return TuckerTensor(
            core=self.core[:layer, :out, :in_].contiguous(),
            factors=(u_layer[:, :layer].contiguous(), u_out[:, :out].contiguous(), u_in[:, :in_].contiguous()),
            spectra=self.spectra,
        )

    def reconstruct(self) -> Tensor:
        """The dense stack core x0 U_layer x1 U_out x2 U_in, (L, d_out, d_in)."""
        return multi_mode_product(self.core, self.factors)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> TuckerTensor:
        """A copy in another dtype or on another device."""
        move = lambda tensors: tuple(t.to(dtype=dtype, device=device) for t in tensors)  # noqa: E731
        return TuckerTensor(self.core.to(dtype=dtype, device=device), move(self.factors), move(self.spectra))
