"""The decomposition against its definition and against TensorLy (DESIGN properties 2 and 3)."""

from __future__ import annotations

import itertools
import weakref
from typing import ClassVar

import numpy as np
import pytest
import tensorly
import torch
from tensorly.tenalg import multi_mode_dot
from tensorly.tenalg.svd import svd_interface

from craft_cli.tucker import (
    TuckerTensor,
    canonical_signs,
    eigh_in_place,
    fold,
    gram_matrix,
    hosvd,
    mode_product,
    multi_mode_product,
    unfold,
)

SHAPES = [(3, 5, 7), (4, 6, 2), (2, 20, 3), (1, 4, 4)]


def stack_of(shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_unfold_equals_tensorly_and_fold_undoes_it(mode: int) -> None:
    tensor = stack_of((3, 5, 7))
    assert np.array_equal(unfold(tensor, mode).numpy(), tensorly.unfold(tensor.numpy(), mode))
    assert torch.equal(fold(unfold(tensor, mode), mode, tensor.shape), tensor)


def test_fold_quotes_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"mode-1 unfolding of \(3, 5, 7\) is \(5, 21\), not \(5, 20\)"):
        fold(torch.zeros(5, 20), 1, (3, 5, 7))


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_mode_product_equals_tensorly(mode: int) -> None:
    tensor, matrix = stack_of((3, 5, 7)), stack_of((1, 4, (3, 5, 7)[mode]), 1)[0]
    expected = tensorly.tenalg.mode_dot(tensor.numpy(), matrix.numpy(), mode)
    assert np.allclose(mode_product(tensor, matrix, mode).numpy(), expected, rtol=1e-13, atol=1e-13)


def test_mode_product_quotes_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5, 7\) along mode 1 by a matrix \(4, 6\)"):
        mode_product(torch.zeros(3, 5, 7), torch.zeros(4, 6), 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_gram_matrices_are_those_of_the_unfoldings(shape: tuple[int, int, int]) -> None:
    stack = stack_of(shape)
    for mode in range(3):
        expected = torch.tril(unfold(stack, mode) @ unfold(stack, mode).T)
        gram = torch.tril(gram_matrix(stack, mode))
        assert torch.allclose(gram, expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_keeps_the_energy_identity_and_the_bound(shape: tuple[int, int, int]) -> None:
    stack = stack_of(shape)
    total = stack.square().sum()
    full = hosvd(stack, dtype=torch.float64)
    for ranks in itertools.product(range(1, shape[0] + 1), range(1, shape[1] + 1), range(1, shape[2] + 1)):
        part = full.truncated(ranks)
        assert part.ranks == ranks
        for factor in part.factors:
            assert torch.allclose(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64), atol=1e-12)
        error = (stack - part.reconstruct()).square().sum()
        assert error == pytest.approx(float(total - part.core.square().sum()), abs=1e-10)
        discarded = sum(s[r:].square().sum() for s, r in zip(part.spectra, ranks, strict=True))
        assert error <= discarded + 1e-10
        assert part.energy == pytest.approx(float(1 - error / total), abs=1e-12)
    assert torch.allclose(full.reconstruct(), stack, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 6, 2)])
def test_factors_equal_tensorly_up_to_signs(shape: tuple[int, int, int]) -> None:
    stack, ranks = stack_of(shape), (2, 3, 2)
    ours = hosvd(stack, ranks, dtype=torch.float64)
    factors = []
    for mode, rank in enumerate(ranks):
        u, s, _ = svd_interface(tensorly.unfold(stack.numpy(), mode), n_eigenvecs=rank)
        factors.append(u)
        assert np.allclose(np.abs(u.T @ ours.factors[mode].numpy()), np.eye(rank), atol=1e-9)
        assert np.allclose(s, ours.spectra[mode][:rank].numpy(), rtol=1e-10)
    core = multi_mode_dot(stack.numpy(), [u.T for u in factors])
    assert np.allclose(np.abs(core), np.abs(ours.core.numpy()), atol=1e-9)


def test_smaller_ranks_are_the_leading_part() -> None:
    stack = stack_of((3, 5, 7))
    small, part = hosvd(stack, (2, 3, 4), dtype=torch.float64), hosvd(stack, dtype=torch.float64).truncated((2, 3, 4))
    for ours, theirs in zip(small.factors, part.factors, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.allclose(small.core, part.core, atol=1e-13)


def test_a_second_run_is_the_same_bit_for_bit() -> None:
    stack = stack_of((4, 30, 20)).float()
    first, second = hosvd(stack, (3, 8, 9)), hosvd(list(stack), (3, 8, 9))
    assert torch.equal(first.core, second.core)
    for a, b in zip(first.factors + first.spectra, second.factors + second.spectra, strict=True):
        assert torch.equal(a, b)


def test_signs_do_not_depend_on_those_given() -> None:
    vectors = stack_of((1, 6, 4))[0]
    flipped = vectors * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    assert torch.equal(canonical_signs(vectors), canonical_signs(flipped))
    assert (canonical_signs(vectors).abs().max(0).values == canonical_signs(vectors).max(0).values).all()


class CountingLayer:
    """A layer that is read only by rows; the log holds how many numbers of all layers are alive after each reading."""

    alive: ClassVar[int] = 0

    def __init__(self, matrix: torch.Tensor, log: list[tuple[str, int]]) -> None:
        self._matrix, self.shape, self._log = matrix, tuple(matrix.shape), log

    def __getitem__(self, rows: slice, /) -> torch.Tensor:
        part = self._matrix[rows].clone()
        CountingLayer.alive += part.numel()
        weakref.finalize(part, self._gone, part.numel())
        self._log.append(("read", CountingLayer.alive))
        return part

    def announce(self) -> None:
        self._log.append(("announced", 0))

    @staticmethod
    def _gone(numbers: int) -> None:
        CountingLayer.alive -= numbers


def test_one_layer_is_held_at_a_time_and_the_next_announced() -> None:
    stack = stack_of((5, 12, 4))
    log: list[tuple[str, int]] = []
    passes: list[int] = []
    lazily = hosvd([CountingLayer(layer, log) for layer in stack], dtype=torch.float64, advance=passes.append)
    assert torch.equal(lazily.core, hosvd(stack, dtype=torch.float64).core)
    assert sum(passes) == 4 * 5
    assert 0 < max(alive for _, alive in log) <= 12 * 4
    turn = [*(("read", 48), ("announced", 0)) * 4, ("read", 48)]  # nothing follows the last layer
    assert log[-len(turn) :] == turn


def test_parameters_are_decomposed_as_tensors_are_into_rows_that_lie_together() -> None:
    stack = stack_of((3, 9, 7))
    found = hosvd([torch.nn.Parameter(layer) for layer in stack], (2, 4, 3), dtype=torch.float64)
    for ours, theirs in zip(found.factors, hosvd(stack, (2, 4, 3), dtype=torch.float64).factors, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
        assert not ours.requires_grad


def test_eigenvectors_take_the_place_of_the_matrix() -> None:
    stack = stack_of((3, 9, 7))
    gram = gram_matrix(stack, 1)
    whole = torch.tril(gram) + torch.tril(gram, -1).T
    values, vectors = eigh_in_place(gram)
    assert vectors.data_ptr() == gram.data_ptr()
    assert torch.allclose(values, torch.linalg.eigvalsh(whole), atol=1e-12)
    assert torch.allclose(vectors @ torch.diag(values) @ vectors.T, whole, atol=1e-12)


def test_rank_deficient_stack_has_orthonormal_factors() -> None:
    stack = torch.einsum("l,o,i->loi", torch.arange(1.0, 4.0), torch.arange(1.0, 5.0), torch.ones(8)).double()
    full = hosvd(stack, dtype=torch.float64)
    for factor in full.factors:
        assert torch.allclose(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64), atol=1e-10)
    assert full.truncated((1, 1, 1)).energy == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("layers", "ranks", "message"),
    [
        ([torch.zeros(2, 3), torch.zeros(3, 2)], None, r"layer 1 is \(3, 2\), but layer 0 is \(2, 3\)"),
        ([torch.ones(2, 3)], (1, 3, 1), r"\(1, 3, 1\) of a stack \(1, 2, 3\)"),
        ([torch.ones(2, 3)], (0, 1, 1), "between 1 and"),
        ([torch.full((2, 3), torch.inf)], None, "non-finite"),
        ([], None, "one or more matrices"),
    ],
)
def test_impossible_input(layers: list[torch.Tensor], ranks: tuple[int, int, int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hosvd(layers, ranks)


def test_parts_that_do_not_fit_are_refused() -> None:
    good = hosvd(stack_of((3, 5, 7)), (2, 3, 4))
    with pytest.raises(ValueError, match="does not fit a core"):
        TuckerTensor(good.core, (good.factors[1], good.factors[0], good.factors[2]), good.spectra)
    with pytest.raises(ValueError, match="cannot truncate"):
        good.truncated((3, 3, 4))
    assert multi_mode_product(good.core, good.factors).shape == good.shape
