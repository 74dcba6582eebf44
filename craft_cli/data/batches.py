"""Which rows make which update and which batch: a function of seed, epoch and lengths alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from craft_cli.data.tokens import Encoded

BUCKET = 50
"""Updates whose rows are sorted by length together: enough to save most padding, few enough to keep the order random."""


def plan_epoch(lengths: Sequence[int], update_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The rows of every update of an epoch, rows of similar length together.

    Args:
        lengths: tokens of each row.
        update_size: rows of one update, over all processes and accumulated batches; the last update may be smaller.
        seed: of the run.
        epoch: from 0.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    updates = []
    for start in range(0, len(order), BUCKET * update_size):
        bucket = sorted(order[start : start + BUCKET * update_size], key=lambda row: -lengths[row])
        updates += [bucket[first : first + update_size] for first in range(0, len(bucket), update_size)]
    return [updates[number] for number in torch.randperm(len(updates), generator=generator).tolist()]


def share_out(update: Sequence[int], batch_size: int, *, process: int, processes: int) -> list[list[int]]:
    """The batches that one process takes of an update: as few as `batch_size` allows, of sizes as even as can be.

    Every process gets the same number of batches; the last ones may be empty for some.
    """
    rounds = -(-len(update) // (batch_size * processes))
    size = -(-len(update) // (rounds * processes))
    starts = [(turn * processes + process) * size for turn in range(rounds)]
    return [list(update[start : start + size]) for start in starts]


def length_sorted_batches(encoded: Encoded, batch_size: int) -> list[list[int]]:
    """All rows once, rows of similar length together."""
    lengths = encoded.lengths
    order = sorted(range(len(encoded)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
