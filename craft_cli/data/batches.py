"""Batch plans and collation. A plan depends only on seed, epoch and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from craft_cli.data.tokens import IGNORED, Encoded

BUCKET = 50
"""Updates per length bucket: enough to save most padding, few enough to keep the order random."""


def plan_epoch(lengths: Sequence[int], update_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Plan the rows of every update of an epoch, grouped by similar length.

    Args:
        lengths: tokens of each row.
        update_size: rows of one update, over all processes and accumulated batches; the last update may be smaller.
        seed: random seed of the run.
        epoch: epoch number, from 0.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    updates = []
    for start in range(0, len(order), BUCKET * update_size):
        bucket = sorted(order[start : start + BUCKET * update_size], key=lambda row: -lengths[row])
        updates += [bucket[first : first + update_size] for first in range(0, len(bucket), update_size)]
    return [updates[number] for number in torch.randperm(len(updates), generator=generator).tolist()]


def share_out(update: Sequence[int], batch_size: int, *, process: int, processes: int) -> list[list[int]]:
    """One process's batches of an update: as few as `batch_size` allows, of equal size where possible.

    Every process gets the same number of batches; the last ones may be empty for some.
    """
    rounds = -(-len(update) // (batch_size * processes))
    size = -(-len(update) // (rounds * processes))
    starts = [(turn * processes + process) * size for turn in range(rounds)]
    return [list(update[start : start + size]) for start in starts]


def length_sorted_batches(encoded: Encoded, batch_size: int) -> list[list[int]]:
    """All rows, in batches of similar length."""
    lengths = encoded.lengths
    order = sorted(range(len(encoded)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Batch(NamedTuple):
    """A padded batch.

    Attributes:
        inputs: model inputs, each (rows, tokens).
        targets: (rows,), (rows, labels) or (rows, tokens); None without gold labels.
        words: as in `Encoded`, for the padded rows.
        segments: (sequences, tokens) of packed rows, see `Encoded`, -1 for padding; tokens attend only to tokens of the
            same row.
    """

    inputs: dict[str, Tensor]
    targets: Tensor | None
    words: list[list[int]] | None = None
    segments: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """A copy of the batch on a device."""
        targets = None if self.targets is None else self.targets.to(device)
        segments = None if self.segments is None else self.segments.to(device)
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, targets, self.words, segments)


def collate(encoded: Encoded, rows: Sequence[int], tokenizer: Any) -> Batch:
    """Pad rows to the longest one. Padding is masked by position, never by token id, so it has no target.

    Padding is on the right for every tokenizer, so that the positions of a text do not depend on the other rows of its
    batch.
    """
    features = [encoded.features[row] for row in rows]
    inputs = dict(tokenizer.pad(features, padding="longest", padding_side="right", return_tensors="pt"))
    words = None if encoded.words is None else [encoded.words[row] for row in rows]
    targets = None
    if encoded.targets is not None:
        targets = torch.full(inputs["input_ids"].shape, IGNORED)  # (rows, tokens)
        for number, row in enumerate(rows):
            targets[number, : len(encoded.targets[row])] = torch.tensor(encoded.targets[row])
    elif encoded.labels is not None:
        targets = torch.tensor([encoded.labels[row] for row in rows])
    segments = None
    if encoded.segments is not None:
        segments = torch.full(inputs["input_ids"].shape, -1)  # (sequences, tokens)
        for number, row in enumerate(rows):
            segments[number, : len(encoded.segments[row])] = torch.tensor(encoded.segments[row])
        inputs["position_ids"] = _positions(segments)
    return Batch(inputs, targets, words, segments)


def _positions(segments: Tensor) -> Tensor:
    """The position of each token within its row, (sequences, tokens)."""
    order = torch.arange(segments.shape[1]).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return order - torch.where(starts, order, 0).cummax(dim=1).values


def padding(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of padding among all tokens of these batches of row numbers."""
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches if rows)
    return 1 - sum(lengths[row] for rows in batches for row in rows) / max(padded, 1)
