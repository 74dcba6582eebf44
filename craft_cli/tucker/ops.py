"""Mode-n operations on tensors: unfolding, folding and the mode product.

Convention: the mode-n unfolding of a tensor (d_0, ..., d_N) is the matrix (d_n, product of the others) whose columns
run over the other modes in ascending order, the last one fastest. This is TensorLy's layout; it differs from Kolda and
Bader 2009 only in the order of the columns, which affects no result here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The mode-`mode` unfolding, (d_mode, product of the other dimensions)."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def fold(matrix: Tensor, mode: int, shape: Sequence[int]) -> Tensor:
    """The tensor of `shape` whose mode-`mode` unfolding is `matrix`.

    Raises:
        ValueError: `matrix` is not an unfolding of a tensor of this shape.
    """
    rest = [size for n, size in enumerate(shape) if n != mode]
    columns = 1
    for size in rest:
        columns *= size
    if tuple(matrix.shape) != (shape[mode], columns):
        raise ValueError(
            f"a mode-{mode} unfolding of {tuple(shape)} is {(shape[mode], columns)}, not {tuple(matrix.shape)}"
        )
    return matrix.reshape(shape[mode], *rest).movedim(0, mode)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Tensor x_mode matrix: every mode-`mode` fibre multiplied by `matrix` (j, d_mode).

    Raises:
        ValueError: the matrix does not have d_mode columns.
    """
    if matrix.ndim != 2 or matrix.shape[1] != tensor.shape[mode]:
        raise ValueError(
            f"cannot multiply a tensor {tuple(tensor.shape)} along mode {mode} by a matrix {tuple(matrix.shape)}"
        )
    product: Tensor = torch.tensordot(matrix, tensor, dims=([1], [mode]))
    return product.movedim(0, mode)


def multi_mode_product(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Tensor x_0 matrices[0] x_1 matrices[1] ..., one matrix per mode."""
    for mode, matrix in enumerate(matrices):
        tensor = mode_product(tensor, matrix, mode)
    return tensor


def orthonormal(columns: Tensor) -> bool:
    """Whether U^T U of U (n, r) is the identity, up to rounding in float32."""
    difference = columns.T @ columns - torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    return bool(difference.abs().max() <= 1e-4)
