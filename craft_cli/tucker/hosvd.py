"""Higher-order SVD of a stack of layer matrices, without forming the stack as one tensor.

De Lathauwer, De Moor, Vandewalle (2000), "A multilinear singular value decomposition": U_n holds the leading left
singular vectors of the mode-n unfolding of the original tensor, the core is the tensor projected on them. Neither
sequentially truncated (ST-HOSVD) nor iterated (HOOI), so the factors for smaller ranks are the leading columns.

The left singular vectors come from the eigenvectors of the Gram matrices W_(n) W_(n)^T, accumulated layer by layer in
float64, because a Gram matrix squares the condition number. Modes are processed one after the other, so only one Gram
matrix and one layer are in memory at a time. Every layer is read four times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from craft_cli.tucker.ops import mode_product
from craft_cli.tucker.tucker_tensor import MODES, TuckerTensor

_BLOCKS = 8
"""Rows per block when accumulating a Gram matrix."""
_EQUAL = 1e-9
"""Relative gap below which eigenvalues count as equal: rounding would rotate their vectors visibly in float32."""


class Matrix(Protocol):
    """The matrix (d_out, d_in) of one layer, read when its rows are indexed: a tensor, or a view into a file.

    A method `announce()`, if there is one, is called one layer ahead, to prefetch.
    """

    @property
    def shape(self) -> Sequence[int]:
        """(d_out, d_in)."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Read rows, (rows, d_in)."""


@torch.no_grad()
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
        ranks: (r_layer, r_out, r_in). Default: full ranks.
        device: device for the computation. Default: the CPU.
        dtype: dtype of the result. The computation is in float64.
        advance: called with the number of layers read since the last call; 4 L in all.

    Raises:
        ValueError: no layers, layers of different shapes, values that are not finite, or a rank out of its range.
    """
    shape = stack_shape(layers)
    ranks = shape if ranks is None else ranks
    if any(not 1 <= rank <= size for rank, size in zip(ranks, shape, strict=True)):
        raise ValueError(f"multilinear ranks {tuple(ranks)} of a stack {shape} must be between 1 and its dimensions")

    spectra, bases = [], []
    for mode, rank in enumerate(ranks):
        values, vectors = eigh_in_place(gram_matrix(layers, mode, device=device, advance=advance))  # ascending
        values = values.flip(0).clamp(min=0)
        spectra.append(values.sqrt())
        bases.append(canonical_basis(values, vectors.flip(1), rank).contiguous())
        del vectors  # as large as the next Gram matrix
    u_layer, u_out, u_in = bases

    projected = [u_out.T @ layer @ u_in for layer in _in_turn(layers, device, advance)]  # (r_out, r_in) each
    core = mode_product(torch.stack(projected), u_layer.T, 0)  # (r_layer, r_out, r_in)
    return TuckerTensor(core, (u_layer, u_out, u_in), (spectra[0], spectra[1], spectra[2])).to(dtype, "cpu")


@torch.no_grad()
def gram_matrix(
    layers: Sequence[Matrix] | Tensor,
    mode: int,
    *,
    device: torch.device | str | None = None,
    advance: Callable[[int], None] = lambda passes: None,
) -> Tensor:
    """The lower triangle of W_(mode) W_(mode)^T, (d_mode, d_mode), float64; the upper triangle is undefined.

    Raises:
        ValueError: no layers, layers of different shapes, or values that are not finite.
    """
    shape = stack_shape(layers)
    gram = torch.zeros(shape[mode], shape[mode], dtype=torch.float64, device=device)
    if mode == 0:
        for rows in _rows_of_all(layers, device, advance):
            gram.addmm_(rows, rows.T)
    else:
        for layer in _in_turn(layers, device, advance):
            _add_gram(gram, layer if mode == 1 else layer.T)
    if not torch.isfinite(gram.diagonal()).all():
        raise ValueError("the weights contain non-finite values (inf or nan)")
    return gram


def eigh_in_place(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) of a symmetric matrix given by its lower triangle.

    The vectors overwrite the matrix, because LAPACK's workspace is already twice as large.
    """
    values = gram.new_empty(len(gram))
    vectors = gram.T  # column-major, as LAPACK expects
    torch.linalg.eigh(vectors, UPLO="U", out=(values, vectors))
    return values, vectors


def _add_gram(gram: Tensor, matrix: Tensor) -> None:
    """Add matrix matrix^T to the lower triangle, in blocks of rows up to the diagonal: about half of the work."""
    size = -(-len(gram) // _BLOCKS)
    for start in range(0, len(gram), size):
        stop = min(start + size, len(gram))
        gram[start:stop, :stop].addmm_(matrix[start:stop], matrix[:stop].T)


def _in_turn(
    layers: Sequence[Matrix] | Tensor, device: torch.device | str | None, advance: Callable[[int], None]
) -> Iterator[Tensor]:
    """Iterate over the layers (d_out, d_in) in float64, in one buffer that the next layer overwrites."""
    layer = torch.empty(*stack_shape(layers)[1:], dtype=torch.float64, device=device)
    for number, stored in enumerate(layers):
        layer.copy_(stored[:].to(device))  # moved in the stored dtype, then widened
        if number + 1 < len(layers):  # lets a layer on disk be prefetched
            getattr(layers[number + 1], "announce", lambda: None)()
        yield layer
        advance(1)


def _rows_of_all(
    layers: Sequence[Matrix] | Tensor, device: torch.device | str | None, advance: Callable[[int], None]
) -> Iterator[Tensor]:
    """Iterate over blocks of the same rows of all layers, (L, rows * d_in) in float64; a block is about as large as one layer."""
    count, d_out, d_in = stack_shape(layers)
    block = -(-d_out // count)
    rows = torch.empty(count, block, d_in, dtype=torch.float64, device=device)
    done = 0
    for start in range(0, d_out, block):
        stop = min(start + block, d_out)
        for stored, into in zip(layers, rows, strict=True):
            into[: stop - start].copy_(stored[start:stop].to(device))
        yield rows[:, : stop - start].flatten(1)
        advance(stop * count // d_out - done)
        done = stop * count // d_out


def canonical_basis(values: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """The leading `rank` columns of a basis that depends only on the subspaces, (n, rank).

    The vectors of eigenvalues (or singular values) that are equal up to rounding are defined only up to rotation, and
    the rotation an algorithm returns depends on the number of threads. For these, the basis is built from fixed random
    vectors, projected on the subspace and orthonormalized in order.

    Args:
        values: (k,), descending.
        vectors: (n, k), orthonormal, in the same order.
        rank: number of columns to return, at most k.
    """
    ends = (values[:-1] - values[1:] > _EQUAL * values[0]).nonzero().flatten() + 1
    bounds = [0, *ends.tolist(), len(values)]
    found = vectors[:, :rank]
    for start, stop in pairwise(bounds):  # the whole group of equal values, even if the rank splits it
        if stop - start > 1 and start < rank:
            found = found.clone()
            found[:, start:stop] = _settled(vectors[:, start:stop])[:, : rank - start]
    return canonical_signs(found)


def _settled(vectors: Tensor) -> Tensor:
    """A canonical orthonormal basis (n, k) of the span of k orthonormal vectors (n, k)."""
    draw = torch.Generator().manual_seed(0)
    fixed = torch.randn(vectors.shape, generator=draw, dtype=torch.float64).to(vectors)
    basis: Tensor = torch.linalg.qr(vectors @ (vectors.T @ fixed))[0]
    return basis


def canonical_signs(vectors: Tensor) -> Tensor:
    """Fix the signs of columns: the first entry of largest magnitude, up to rounding, becomes positive.

    Singular vectors are defined up to sign, and transforms trained in one basis are wrong in another.
    """
    sizes = vectors.abs()
    largest = (sizes >= sizes.amax(0) * (1 - 1e-6)).to(torch.uint8).argmax(dim=0, keepdim=True)  # (1, columns)
    return vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0).to(vectors)


def stack_shape(layers: Sequence[Matrix] | Tensor) -> tuple[int, int, int]:
    """The shape (L, d_out, d_in) of a stack.

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
