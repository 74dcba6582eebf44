"""The order of the data: which rows make which update, whatever the number of processes.

The rows of one update are fixed by seed and epoch alone. N processes with batch B share out what one process with
batch N B would take, so they compute the same update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
    """The batches that one process takes of an update, at most `batch_size` rows each.

    Every process gets the same number of batches; the last one may be empty for some.
    """
    rounds = -(-len(update) // (batch_size * processes))
    starts = [(turn * processes + process) * batch_size for turn in range(rounds)]
    return [list(update[start : start + batch_size]) for start in starts]
