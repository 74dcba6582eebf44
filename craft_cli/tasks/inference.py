"""Outputs of a model for rows, batch by batch, in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from craft_cli.data.tokens import Encoded, collate
from craft_cli.errors import CraftError


@torch.no_grad()
def predict_batches(
    model: Any,
    encoded: Encoded,
    batches: Sequence[Sequence[int]],
    tokenizer: Any,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], object] = lambda: False,
) -> list[Tensor]:
    """Logits (rows, labels) of every batch, float32 on the CPU; of fewer, once `cancelled` says so."""
    was_training = model.training
    model.eval()
    outputs, done, total = [], 0, sum(len(batch) for batch in batches)
    for batch in batches:
        if cancelled():
            break
        inputs, _ = collate(encoded, batch, tokenizer)
        outputs.append(model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.float().cpu())
        done += len(batch)
        progress(done, total)
    model.train(was_training)
    return outputs


def in_order(outputs: Sequence[Tensor], batches: Sequence[Sequence[int]], examples: int) -> Tensor:
    """Logits (examples, labels) in the order of the rows.

    Raises:
        CraftError: a row was counted twice or not at all.
    """
    rows = torch.tensor([row for batch in batches for row in batch])
    if sorted(rows.tolist()) != list(range(examples)):
        raise CraftError(f"evaluation counted {len(rows)} rows of {examples}; please report this")
    logits = torch.cat(list(outputs))
    return torch.empty_like(logits).index_copy_(0, rows, logits)
