"""The random baseline: the energy that HOSVD keeps of a tensor without structure."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from craft_cli.tucker import hosvd

_LARGEST_RANDOM = 768, 1 << 24
"""Maximum width and maximum size of the random tensors."""


@lru_cache
def random_energy(shape: tuple[int, int, int], ranks: tuple[int, int, int]) -> float:
    """Energy that HOSVD at these ranks keeps of a Gaussian random tensor of this shape.

    A random tensor (fixed seed) is actually decomposed. A large shape is scaled down together with the ranks, because in
    high dimensions the energy depends only on their ratios.
    """
    stack = _random_stack(shape)
    scaled = [
        min(size, max(1, round(rank * size / whole)))
        for rank, size, whole in zip(ranks, stack.shape, shape, strict=True)
    ]
    return hosvd(stack, (scaled[0], scaled[1], scaled[2])).energy


@lru_cache
def random_by_mode(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Energy that each mode's ranks alone keep of a random tensor. A large shape is scaled down, so the results may be shorter."""
    by_mode = []
    for spectrum in _random_spectra(shape):
        energies = spectrum.square().cumsum(0)
        by_mode.append(energies / energies[-1])
    return by_mode[0], by_mode[1], by_mode[2]


def random_curves(shape: tuple[int, int, int]) -> list[tuple[list[float], list[float]]]:
    """Singular values of a random tensor by mode: their positions in the full shape, and their ratio to the largest."""
    curves = []
    for spectrum, whole in zip(_random_spectra(shape), shape, strict=True):
        step = whole / len(spectrum)
        numbers = [(number + 0.5) * step + 0.5 for number in range(len(spectrum))]
        curves.append((numbers, (spectrum / spectrum[0]).tolist()))
    return curves


@lru_cache
def _random_spectra(shape: tuple[int, int, int]) -> list[Tensor]:
    return [spectrum.double() for spectrum in hosvd(_random_stack(shape), (1, 1, 1)).spectra]


def _random_stack(shape: tuple[int, int, int]) -> Tensor:
    layers, d_out, d_in = shape
    widest, numbers = _LARGEST_RANDOM
    scale = min(1.0, widest / max(d_out, d_in), (numbers / (layers * d_out * d_in)) ** 0.5)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(layers, max(1, round(d_out * scale)), max(1, round(d_in * scale)), generator=generator)
