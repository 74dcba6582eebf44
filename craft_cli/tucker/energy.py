"""Share of a stack's squared norm that a truncated HOSVD keeps, for all combinations of ranks at once.

The HOSVD at smaller ranks is the leading block of the full one, so the energy kept at ranks (r_layer, r_out, r_in) is the
sum of squares over a leading block of the full core, so three cumulative sums give it for all ranks. The full core is as
large as the stack. It is computed in blocks of output ranks and never held as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from craft_cli.tucker.hosvd import Matrix, eigh_in_place, gram_matrix, stack_shape
from craft_cli.tucker.ops import mode_product

_BLOCK_NUMBERS = 1 << 25
"""Maximum float64 values of the core in memory at once."""


@dataclass(frozen=True, eq=False)
class EnergyTable:
    """Energy kept: shares of ||W||^2, for a stack W (L, d_out, d_in).

    Attributes:
        shape: (L, d_out, d_in).
        norm2: ||W||^2.
        joint: (L, number of output ranks, number of input ranks), for layer ranks 1..L and the requested ranks.
        by_mode: for ranks 1..d of each mode alone: (L,), (d_out,), (d_in,).
    """

    shape: tuple[int, int, int]
    norm2: float
    joint: Tensor
    by_mode: tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def energy_table(layers: Sequence[Matrix] | Tensor, ranks_out: Sequence[int], ranks_in: Sequence[int]) -> EnergyTable:
    """Energy kept by the HOSVD of a stack at all combinations of these ranks and every layer rank.

    Args:
        layers: L matrices (d_out, d_in), each read several times; or a tensor (L, d_out, d_in).
        ranks_out: output ranks, ascending; a rank above its dimension is reduced to it.
        ranks_in: input ranks, likewise.

    Raises:
        ValueError: no layers, layers of different shapes, or values that are not finite.
    """
    count, d_out, d_in = stack_shape(layers)
    by_mode, bases = [], []
    for mode in range(3):
        values, vectors = eigh_in_place(gram_matrix(layers, mode))  # ascending
        energies = values.flip(0).clamp(min=0).cumsum(0)
        by_mode.append(energies / energies[-1].clamp(min=torch.finfo(torch.float64).tiny))
        bases.append(vectors.flip(1))
    norm2 = float(energies[-1])
    u_layer, u_out, u_in = bases
    take_in = torch.tensor([min(rank, d_in) - 1 for rank in ranks_in])

    rows = []
    block = max(1, _BLOCK_NUMBERS // (count * d_in))
    for start in range(0, d_out, block):
        part = u_out[:, start : start + block].T  # (block, d_out)
        projected = torch.stack([part @ layer[:].double() @ u_in for layer in layers])  # (L, block, d_in)
        core = mode_product(projected, u_layer.T, 0)
        rows.append(core.square_().cumsum(2)[:, :, take_in])  # (L, block, in)
    sums = torch.cat(rows, dim=1).cumsum(1).cumsum(0)  # (L, d_out, in)
    take_out = torch.tensor([min(rank, d_out) - 1 for rank in ranks_out])
    joint = (sums[:, take_out] / max(norm2, torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    return EnergyTable((count, d_out, d_in), norm2, joint, (by_mode[0], by_mode[1], by_mode[2]))
