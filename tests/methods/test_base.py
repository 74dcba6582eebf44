"""Chains of matrices: products, LoRA pairs and inner products, against the dense matrices."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from craft_cli.methods.base import Chain, delta, inner, inners, low_rank

SHAPES = [(7, 5), (7, 2, 5), (7, 3, 2, 5), (7, 1, 5), (7, 4, 3, 2, 5), (7, 5, 5)]


def chain(*sizes: int, seed: int = 0) -> Chain:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(a, b, dtype=torch.float64, generator=generator) for a, b in pairwise(sizes)]
    return tuple(draw)


def dense(matrices: Chain) -> torch.Tensor:
    product = torch.eye(7, dtype=torch.float64)
    for matrix in matrices:
        product = product @ matrix
    return product.T


@pytest.mark.parametrize("sizes", SHAPES)
def test_a_chain_is_its_product_and_a_lora_of_its_narrowest_rank(sizes: tuple[int, ...]) -> None:
    matrices = chain(*sizes)
    assert torch.allclose(delta(matrices), dense(matrices), atol=1e-12)
    a, b = low_rank(matrices)
    assert torch.allclose(b @ a, dense(matrices), atol=1e-12)
    assert len(a) == min(sizes[1:-1], default=7)


@pytest.mark.parametrize("one", SHAPES)
@pytest.mark.parametrize("other", SHAPES)
def test_inner_products_are_those_of_the_dense_changes(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    mine, theirs = chain(*one), chain(*other, seed=1)
    assert inner(mine, theirs) == pytest.approx(float((dense(mine) * dense(theirs)).sum()), rel=1e-10)


def test_layers_that_share_their_ends_and_layers_that_do_not() -> None:
    shared = chain(7, 3, 2, 5)
    layers = [(shared[0], chain(3, 2, seed=n)[0], shared[2]) for n in range(3)] + [chain(7, 3, 2, 5, seed=9)]
    expected = [float(dense(layer).square().sum()) for layer in layers]
    assert list(inners((layer, layer) for layer in layers)) == pytest.approx(expected, rel=1e-10)
