"""Energy that HOSVD keeps of a tensor without any structure: what chance looks like."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from craft_cli.tucker import hosvd

_LARGEST_RANDOM = 768, 1 << 24
"""Width and numbers of the random tensors."""


@lru_cache
def random_energy(shape: tuple[int, int, int], ranks: tuple[int, int, int]) -> float:
    """Energy that HOSVD at these ranks keeps of a Gaussian random tensor of this shape: what no structure looks like.

    A real tensor (fixed seed) is decomposed. A large one is scaled down, ranks with it: in high dimensions the energy
    depends on the proportions alone.
    """
    stack = _random_stack(shape)
    scaled = [
        min(size, max(1, round(rank * size / whole)))
        for rank, size, whole in zip(ranks, stack.shape, shape, strict=True)
    ]
    return hosvd(stack, (scaled[0], scaled[1], scaled[2])).energy


@lru_cache
def random_by_mode(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Energy kept by each mode's ranks alone, of such a tensor; a large one is scaled down, so these may be shorter."""
    by_mode = []
    for spectrum in hosvd(_random_stack(shape), (1, 1, 1)).spectra:
        energies = spectrum.double().square().cumsum(0)
        by_mode.append(energies / energies[-1])
    return by_mode[0], by_mode[1], by_mode[2]


def _random_stack(shape: tuple[int, int, int]) -> Tensor:
    layers, d_out, d_in = shape
    widest, numbers = _LARGEST_RANDOM
    scale = min(1.0, widest / max(d_out, d_in), (numbers / (layers * d_out * d_in)) ** 0.5)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(layers, max(1, round(d_out * scale)), max(1, round(d_in * scale)), generator=generator)
