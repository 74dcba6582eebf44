"""Scores of a model for rows, batch by batch, and in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from craft_cli.data.batches import collate
from craft_cli.data.tokens import Encoded
from craft_cli.errors import CraftError
from craft_cli.tasks.base import Task


@torch.no_grad()
def predict_batches(
    model: Any,
    task: Task,
    encoded: Encoded,
    batches: Sequence[Sequence[int]],
    tokenizer: Any,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], object] = lambda: False,
) -> list[list[Tensor]]:
    """The task's scores of every row of every batch; of fewer batches, once `cancelled` says so."""
    was_training = model.training
    model.eval()
    outputs, done, total = [], 0, sum(len(batch) for batch in batches)
    for batch in batches:
        if cancelled():
            break
        outputs.append(task.scores(model, collate(encoded, batch, tokenizer).to(device)))
        done += len(batch)
        progress(done, total)
    model.train(was_training)
    return outputs


def in_order(outputs: Sequence[Sequence[Any]], batches: Sequence[Sequence[int]], examples: int) -> list[Any]:
    """What was computed for batches, in the order of the rows.

    Raises:
        CraftError: a row was counted twice or not at all.
    """
    rows = [row for batch in batches for row in batch]
    if sorted(rows) != list(range(examples)):
        raise CraftError(f"evaluation counted {len(rows)} rows of {examples}; please report this")
    found = dict(zip(rows, (scores for batch in outputs for scores in batch), strict=True))
    return [found[row] for row in range(examples)]


def not_finite(scores: Sequence[Tensor]) -> list[int]:
    """The rows whose scores are not all finite; words (words, labels) without a token, whose scores are all -inf, apart."""
    seen = [row[~row.isneginf().all(dim=-1)] if row.ndim > 1 else row for row in scores]
    return [number for number, row in enumerate(seen) if not row.isfinite().all()]
