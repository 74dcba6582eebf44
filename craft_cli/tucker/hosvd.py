"""Higher-order SVD of a stack of layer matrices that never has to exist as one tensor.

De Lathauwer, De Moor, Vandewalle (2000), "A multilinear singular value decomposition": U_n holds the leading left
singular vectors of the mode-n unfolding of the original tensor, the core is the tensor projected on them. Neither
sequentially truncated (ST-HOSVD) nor iterated (HOOI), so the factors for smaller ranks are the leading columns.

The left singular vectors come from the eigenvectors of the three Gram matrices W_(n) W_(n)^T, accumulated layer by
layer in float64: a Gram matrix squares the condition number, and float64 pays for that. This reads every layer three
times and holds one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from craft_cli.tucker.ops import mode_product
from craft_cli.tucker.tucker_tensor import MODES, TuckerTensor


class Matrix(Protocol):
    """One layer's matrix (d_out, d_in), read when its rows are asked for: a tensor, or a view into a file."""

    @property
    def shape(self) -> Sequence[int]:
        """(d_out, d_in)."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """The rows asked for, (rows, d_in)."""


def hosvd(
    layers: Sequence[Matrix] | Tensor,
    ranks: tuple[int, int, int] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[int], None] = lambda passes: None,
) -> TuckerTensor:
    """Decompose a stack W (L, d_out, d_in), given as L matrices or as one tensor.

    Args:
        layers: L matrices (d_out, d_in), each read by rows, several times; or a tensor (L, d_out, d_in).
        ranks: (r_layer, r_out, r_in); full without.
        device: where to compute; the CPU without.
        dtype: of the result. The computation is float64 throughout.
        advance: called with the number of layers read since the last call; 3 L in all.

    Raises:
        ValueError: no layers, layers of different shapes, values that are not finite, or a rank out of its range.
    """
    shape = stack_shape(layers)
    ranks = shape if ranks is None else ranks
    if any(not 1 <= rank <= size for rank, size in zip(ranks, shape, strict=True)):
        raise ValueError(f"multilinear ranks {tuple(ranks)} of a stack {shape} must lie between 1 and its dimensions")

    spectra, bases = [], []
    for gram in gram_matrices(layers, device=device, advance=advance):
        values, vectors = torch.linalg.eigh(gram)  # ascending
        spectra.append(values.flip(0).clamp(min=0).sqrt())
        bases.append(canonical_signs(vectors.flip(1)))
    u_layer, u_out, u_in = (basis[:, :rank].contiguous() for basis, rank in zip(bases, ranks, strict=True))

    projected = []
    for layer in layers:
        projected.append(u_out.T @ _float64(layer[:], device) @ u_in)  # (r_out, r_in)
        advance(1)
    core = mode_product(torch.stack(projected), u_layer.T, 0)  # (r_layer, r_out, r_in)
    return TuckerTensor(core, (u_layer, u_out, u_in), (spectra[0], spectra[1], spectra[2])).to(dtype, "cpu")


def gram_matrices(
    layers: Sequence[Matrix] | Tensor,
    *,
    device: torch.device | str | None = None,
    advance: Callable[[int], None] = lambda passes: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """W_(n) W_(n)^T for the three modes: (L, L), (d_out, d_out), (d_in, d_in), float64."""
    count, d_out, d_in = stack_shape(layers)
    gram_layer = torch.zeros(count, count, dtype=torch.float64, device=device)
    gram_out = torch.zeros(d_out, d_out, dtype=torch.float64, device=device)
    gram_in = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
    for layer in layers:
        weight = _float64(layer[:], device)  # (d_out, d_in)
        gram_out.addmm_(weight, weight.T)
        gram_in.addmm_(weight.T, weight)
        advance(1)
    if not (torch.isfinite(gram_out).all() and torch.isfinite(gram_in).all()):
        raise ValueError("the weights hold values that are not finite (inf or nan)")
    # Products between layers need rows of all of them at once: as many at a time as make up about one layer.
    block = -(-d_out // count)
    done = 0
    for start in range(0, d_out, block):
        rows = torch.stack([_float64(layer[start : start + block], device).flatten() for layer in layers])
        gram_layer.addmm_(rows, rows.T)  # (L, rows * d_in)
        advance(min(d_out, start + block) * count // d_out - done)
        done = min(d_out, start + block) * count // d_out
    return gram_layer, gram_out, gram_in


def canonical_signs(vectors: Tensor) -> Tensor:
    """Columns with their signs fixed: the entry of largest magnitude is positive.

    Singular vectors are defined up to sign; transforms trained in one basis mean something else in the other.
    """
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))  # (1, columns)
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors)


def stack_shape(layers: Sequence[Matrix] | Tensor) -> tuple[int, int, int]:
    """(L, d_out, d_in) of a stack.

    Raises:
        ValueError: no layers, or layers of different shapes.
    """
    shapes = [tuple(layer.shape) for layer in layers]
    if not shapes or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"a stack is one or more matrices ({MODES[1]}, {MODES[2]}), not {shapes[:1]}")
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(f"layer {number} is {shape}, but layer 0 is {shapes[0]}: they cannot be stacked")
    d_out, d_in = shapes[0]
    return len(shapes), d_out, d_in


def _float64(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    return tensor.to(device=device, dtype=torch.float64)
