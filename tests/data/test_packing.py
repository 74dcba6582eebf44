"""Rows that share a sequence: each is there once, and nearly no space is left over."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from craft_cli.data.batches import collate
from craft_cli.data.packing import best_fit, packed
from craft_cli.data.tokens import IGNORED, Encoded


@pytest.mark.parametrize("limit", [127, 512, 1024])
def test_sequences_are_nearly_full(limit: int) -> None:
    lengths = random.Random(3).choices(range(4, 128), k=4003)
    together = best_fit(lengths, limit)
    assert sorted(itertools.chain(*together)) == list(range(len(lengths)))
    used = [sum(lengths[row] for row in rows) for rows in together]
    assert max(used) <= limit
    assert len(together) <= 1.01 * sum(lengths) / limit + 1


def test_a_row_of_full_length_is_alone_and_one_row_is_enough() -> None:
    assert best_fit([8, 3, 8, 5], 8) == [[0], [2], [3, 1]]
    assert best_fit([1], 1024) == [[0]]


def test_a_batch_of_packed_rows(pico_lm: Callable[..., Path]) -> None:
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    encoded = Encoded(
        [{"input_ids": row} for row in rows], ["a", "b", "c"], targets=[[IGNORED, *row[1:]] for row in rows]
    )
    shared = packed(encoded, 5)
    assert shared.lengths == [4, 5]
    assert shared.row_lengths == [4, 3, 2]
    assert shared.count([0, 1]) == 3
    batch = collate(shared, [1, 0], AutoTokenizer.from_pretrained(pico_lm()))
    assert batch.inputs["input_ids"].tolist()[0] == [5, 6, 7, 8, 9]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.segments is not None
    assert batch.targets is not None
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]]
    assert batch.targets.tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED, 11, 12, 13, IGNORED]]
