"""Compute scores batch by batch, and restore the order of the rows."""

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
    """Compute the task's scores of all rows, batch by batch, until `cancelled` returns true."""
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
    """Restore the order of the rows from batches.

    Raises:
        CraftError: a row is missing or appears twice.
    """
    rows = [row for batch in batches for row in batch]
    if sorted(rows) != list(range(examples)):
        raise CraftError(f"evaluation counted {len(rows)} rows of {examples}; please report this")
    by_row = dict(zip(rows, (scores for batch in outputs for scores in batch), strict=True))
    return [by_row[row] for row in range(examples)]


def not_finite(scores: Sequence[Tensor]) -> list[int]:
    """Rows with non-finite scores, except words (words, labels) without a token, whose scores are all -inf."""
    seen = [row[~row.isneginf().all(dim=-1)] if row.ndim > 1 else row for row in scores]
    return [number for number, row in enumerate(seen) if not row.isfinite().all()]
