"""Tucker decomposition of stacked layer matrices, in pure torch: operations, format, algorithm."""

from craft_cli.tucker.energy import EnergyTable, energy_table
from craft_cli.tucker.hosvd import (
    Matrix,
    canonical_basis,
    canonical_signs,
    eigh_in_place,
    gram_matrix,
    hosvd,
    stack_shape,
)
from craft_cli.tucker.ops import fold, mode_product, multi_mode_product, orthonormal, unfold
from craft_cli.tucker.tucker_tensor import MODES, TuckerTensor

__all__ = [
    "MODES",
    "EnergyTable",
    "Matrix",
    "TuckerTensor",
    "canonical_basis",
    "canonical_signs",
    "eigh_in_place",
    "energy_table",
    "fold",
    "gram_matrix",
    "hosvd",
    "mode_product",
    "multi_mode_product",
    "orthonormal",
    "stack_shape",
    "unfold",
]
