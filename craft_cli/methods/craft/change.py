"""CRAFT's change: frozen Tucker factors, one small trained matrix per mode (arXiv 2602.17510).

For one projection with factors G, U_layer, U_out, U_in and transforms J = I + K, layer l's weight changes by

    dW_l = U_out S_l U_in^T                         (d_out, d_in)
    C0   = G x0 U_layer                             (L, r_out, r_in)
    C    = C0 + G x0 (U_layer K_layer)
    E    = C + K_out C
    S    = (C - C0) + K_out C + E K_in^T            (L, r_out, r_in)

K is stored and trained. Every term of S has a factor K, so at K = 0 the change is exactly zero, and two large
reconstructions are never subtracted. It equals the dense form

    dW = G x0 U_layer J_layer x1 U_out J_out x2 U_in J_in  -  G x0 U_layer x1 U_out x2 U_in

The chain of a layer is U_in, S_l^T, U_out^T. This module depends only on torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from craft_cli.methods.base import Chain, Change
from craft_cli.tucker import MODES, TuckerTensor, mode_product

PAPER_NOISE = 0.01 * 0.02
"""Standard deviation of K in the paper's initialization, J = I + 0.01 N(0, 0.02^2)."""


class Transforms(nn.Module):
    """The transforms of one projection, shared by all its layers.

    Args:
        decomposition: decomposition of the stacked weight (L, d_out, d_in).
        init_noise: standard deviation of the initial K; 0 starts exactly at the base model.
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
    def k(self) -> dict[str, nn.Parameter]:
        """K (r, r) by mode."""
        return {mode: getattr(self, f"k_{mode}") for mode in MODES}

    @property
    def decomposition(self) -> TuckerTensor:
        """The frozen decomposition."""
        return TuckerTensor(self.core, (self.u_layer, self.u_out, self.u_in), self.spectra)

    def slices(self) -> Tensor:
        """The slices S (L, r_out, r_in), in the dtype of the transforms."""
        k_layer, k_out, k_in = self.k.values()
        change = mode_product(self.core, self.u_layer @ k_layer, 0)  # C - C0
        c = self.c0 + change
        k_out_c = k_out @ c
        return change + k_out_c + (c + k_out_c) @ k_in.T


def slices_in_turn(decomposition: TuckerTensor, k: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Iterate over S_l (r_out, r_in) in float64, since an untrusted file can have many layers.

    S_l = sum_r (U_layer J_layer)_lr J_out G_r J_in^T - U_layer_lr G_r: the core is transformed once for all layers,
    slice by slice, and nothing larger than the core is computed.
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


class CraftChange(Change):
    """The change of several projections.

    Args:
        decompositions: decomposition of the stacked weight, by projection.
        init_noise: standard deviation of the initial K.
    """

    def __init__(self, decompositions: Mapping[str, TuckerTensor], init_noise: float = 0.0) -> None:
        super().__init__()
        self.shapes = {name: decomposition.shape for name, decomposition in decompositions.items()}
        self.transform = nn.ModuleDict(
            {name: Transforms(decomposition, init_noise) for name, decomposition in decompositions.items()}
        )

    def of(self, projection: str) -> Transforms:
        """The transforms of a projection."""
        transforms = self.transform[projection]
        assert isinstance(transforms, Transforms)
        return transforms

    def trained(self) -> dict[str, nn.Parameter]:
        """K of every projection and mode, by name in an adapter's file."""
        return {f"transform.{name}.{mode}": k for name in self.transform for mode, k in self.of(name).k.items()}

    def chains(self, projection: str, dtype: torch.dtype | None = None) -> list[Chain]:
        """U_in (d_in, r_in), S_l^T (r_in, r_out), U_out^T (r_out, d_out) of every layer."""
        transforms = self.of(projection)
        u_in, u_out_t = transforms.u_in.to(dtype), transforms.u_out.T.to(dtype)
        return [(u_in, s.T, u_out_t) for s in transforms.slices().to(dtype).unbind(0)]
