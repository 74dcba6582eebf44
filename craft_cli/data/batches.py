"""Which rows make which update and which batch, a function of seed, epoch and lengths alone; rows as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from craft_cli.data.tokens import IGNORED, Encoded

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


class Batch(NamedTuple):
    """Padded rows.

    Attributes:
        inputs: of the model, (rows, tokens) each.
        targets: (rows,), (rows, labels) or (rows, tokens); None where the gold is not known.
        words: as in `Encoded`, in the padded rows.
        segments: (bins, tokens), the number of the row that a token belongs to, -1 for padding, where several rows share a
            bin; such tokens see those of their own row alone.
    """

    inputs: dict[str, Tensor]
    targets: Tensor | None
    words: list[list[int]] | None = None
    segments: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        targets = None if self.targets is None else self.targets.to(device)
        segments = None if self.segments is None else self.segments.to(device)
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, targets, self.words, segments)


def collate(encoded: Encoded, rows: Sequence[int], tokenizer: Any) -> Batch:
    """A batch, padded to its longest row; what is padding has no target, whatever its token is.

    Padding stands on the right, whatever the tokenizer's own side is: there no position and no token of a text depends on
    the rows beside it.
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
    return Batch(inputs, targets, words)


def collate_packed(encoded: Encoded, rows: Sequence[int], tokenizer: Any) -> Batch:
    """A batch of rows of tokens with targets, several in a bin as long as the longest row; padding is as in `collate`."""
    lengths = encoded.lengths
    width = max(lengths[row] for row in rows)
    bins: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):  # first fit, the longest first
        fits = next((held for held in bins if sum(lengths[other] for other in held) + lengths[row] <= width), None)
        bins.append([row]) if fits is None else fits.append(row)
    ids = torch.full((len(bins), width), tokenizer.pad_token_id)
    targets, segments = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
    positions = torch.zeros_like(ids)
    assert encoded.targets is not None
    for number, held in enumerate(bins):
        start = 0
        for segment, row in enumerate(held):
            part = slice(start, start + lengths[row])
            ids[number, part] = torch.tensor(encoded.features[row]["input_ids"])
            targets[number, part] = torch.tensor(encoded.targets[row])
            segments[number, part] = segment
            positions[number, part] = torch.arange(lengths[row])
            start += lengths[row]
    return Batch({"input_ids": ids, "position_ids": positions}, targets, segments=segments)


def padding(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The part of the tokens in these batches (row numbers) that is padding."""
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches if rows)
    return 1 - sum(lengths[row] for rows in batches for row in rows) / max(padded, 1)
