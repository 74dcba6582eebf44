"""CRAFT's change of the weights: frozen Tucker factors, one small trained matrix for every mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from craft_cli.tucker import MODES, TuckerTensor, mode_product


def change_slices(decomposition: TuckerTensor, k: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """S_l (r_out, r_in) of every layer in float64, one at a time: a stranger's file may name many layers.

    The core is moved once for all of them, slice by slice: nothing is built that is larger than the core.
    """
    core = decomposition.core.double()
    r_layer, r_out, r_in = core.shape
    flat, u_layer = core.reshape(r_layer, -1), decomposition.factors[0].double()
    adapted = u_layer + u_layer @ k["layer"].double()  # (L, r_layer)
    j_out, j_in = (torch.eye(len(k[mode]), dtype=torch.float64) + k[mode].double() for mode in ("out", "in"))
    moved = torch.empty_like(flat)
    for slice_, into in zip(core, moved, strict=True):
        into.copy_((j_out @ slice_ @ j_in.T).flatten())
    for before, after in zip(u_layer, adapted, strict=True):
        yield (after @ moved - before @ flat).reshape(r_out, r_in)


PAPER_NOISE = 0.01 * 0.02
"""Standard deviation of K in the paper's start, J = I + 0.01 N(0, 0.02^2)."""


class ProjectionAdapter(nn.Module):
    """The transforms of one projection, for all its layers.

    Args:
        decomposition: of the stacked weight (L, d_out, d_in).
        init_noise: standard deviation of K at the start; 0 starts exactly at the base model.
    """

    core: Tensor
    u_layer: Tensor
    u_out: Tensor
    u_in: Tensor
    c0: Tensor

    def __init__(self, decomposition: TuckerTensor, init_noise: float = 0.0) -> None:
        super().__init__()
        self.spectra = decomposition.spectra
        for name, tensor in zip(("u_layer", "u_out", "u_in"), decomposition.factors, strict=True):
            self.register_buffer(name, tensor.clone(), persistent=False)
        self.register_buffer("core", decomposition.core.clone(), persistent=False)
        self.register_buffer("c0", mode_product(self.core, self.u_layer, 0), persistent=False)
        for mode, rank in zip(MODES, decomposition.ranks, strict=True):
            k = torch.randn(rank, rank, dtype=self.core.dtype) * init_noise
            self.register_parameter(f"k_{mode}", nn.Parameter(k))  # (r, r)

    @property
    def transforms(self) -> dict[str, nn.Parameter]:
        """K of every mode by its name, (r, r)."""
        return {mode: self.get_parameter(f"k_{mode}") for mode in MODES}

    @property
    def decomposition(self) -> TuckerTensor:
        """The frozen factors, as they were given."""
        return TuckerTensor(self.core, (self.u_layer, self.u_out, self.u_in), self.spectra)

    def slices(self) -> Tensor:
        """S (L, r_out, r_in), in the dtype of the transforms."""
        k_layer, k_out, k_in = self.transforms.values()
        change = mode_product(self.core, self.u_layer @ k_layer, 0)  # C - C0
        c = self.c0 + change
        k_out_c = k_out @ c
        return change + k_out_c + (c + k_out_c) @ k_in.T

    def deltas(self) -> Iterator[Tensor]:
        """dW_l (d_out, d_in) of every layer, dense, one at a time."""
        for s in self.slices():
            yield self.u_out @ s @ self.u_in.T
