"""Language modeling loss, computed at target positions only and in chunks.

The last layer of a language model maps every position to one logit per vocabulary entry. Here it is applied only to
positions whose next token is a target, in chunks, so that the logits and their gradients are never in memory all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from craft_cli.data.batches import Batch
from craft_cli.data.tokens import IGNORED
from craft_cli.errors import ConfigError, ModelError

_AT_ONCE = 2**24
"""Maximum logits in memory at once: 64 MB in float32."""

Scorer = Callable[[Tensor], Tensor]


def model_inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """The model inputs of a batch. Packed rows get a block-diagonal attention mask, other rows a mask of ones.

    Padding is on the right, where no token attends to it: masking it changes no loss, but costs a copy of grouped keys and values.

    Raises:
        ConfigError: the model's attention does not support such a mask.
    """
    if batch.segments is None:
        return {**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["input_ids"])}
    config = getattr(model, "module", model).config
    kind = str(config._attn_implementation)
    if kind not in ("sdpa", "eager"):
        raise ConfigError(f"--packing: this model's attention ({kind}) does not support a block mask; remove it")
    segments = batch.segments  # (bins, tokens)
    width = segments.shape[1]
    window = getattr(config.get_text_config(), "sliding_window", None)
    if window and width > window:
        raise ConfigError(
            f"--packing: this model has a sliding window of {window} tokens: pass --max-seq-length {window} or less, or remove it"
        )
    order = torch.arange(width, device=segments.device)
    seen = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order[None, :])  # (bins, tokens, tokens)
    mask = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)
    dtype = torch.get_autocast_dtype(seen.device.type) if torch.is_autocast_enabled(seen.device.type) else None
    mask = mask.to(dtype or getattr(model, "module", model).dtype)[:, None]
    return {**batch.inputs, "attention_mask": mask}


def hidden_at_targets(model: Any, inputs: dict[str, Any], targets: Tensor) -> tuple[Tensor, Tensor, Scorer, Tensor]:
    """Run the model and collect the inputs of its last layer at positions whose next token is a target.

    Args:
        model: a model with a language modeling head, possibly wrapped for several processes; called once.
        inputs: model inputs.
        targets: (rows, tokens), the token ids to train on, `IGNORED` elsewhere.

    Returns:
        The hidden states (N, width), their targets (N,), the logits (n, vocabulary) of some of them as the model computes
        them, and a zero that connects the model's output to the loss, because sharded engines wait for its gradient.
    """
    inner = getattr(model, "module", model)
    head = inner.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(inner).__name__} has no output embedding, so it is not a language model")
    following = torch.full_like(targets, IGNORED)
    following[:, :-1] = targets[:, 1:]
    learned = following != IGNORED  # (rows, tokens)
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:  # (rows, tokens, width)
        kept.append(hidden[learned])
        return hidden[:1, :1, :1] * 0.0

    scores_of = head.forward
    with _in_place_of(head, keep):
        returned = model(**inputs).logits
    finish = _finisher(inner.config)
    return kept[0], following[learned], lambda hidden: finish(scores_of(hidden)).float(), returned.float().sum()


def summed_loss(model: Any, inputs: dict[str, Any], targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the targets; see `hidden_at_targets`."""
    hidden, wanted, scores_of, nothing = hidden_at_targets(model, inputs, targets)
    loss: Tensor = _Loss.apply(hidden, wanted, scores_of, _rows_at_once(model))
    return loss + nothing


@torch.no_grad()
def losses_and_hits(model: Any, inputs: dict[str, Any], targets: Tensor) -> list[Tensor]:
    """For each row (3,): summed loss, number of targets predicted correctly, number of targets."""
    hidden, wanted, scores_of, _ = hidden_at_targets(model, inputs, targets)
    each = [torch.zeros(2, 0, device=hidden.device)]
    for part in _parts(len(wanted), _rows_at_once(model)):
        scores = scores_of(hidden[part])  # (n, vocabulary)
        losses = functional.cross_entropy(scores, wanted[part], reduction="none")
        each.append(torch.stack([losses, (scores.argmax(dim=-1) == wanted[part]).float()]))
    per_target = torch.cat(each, dim=1).cpu()  # (2, N)
    counts = (targets[:, 1:] != IGNORED).sum(dim=1).tolist()
    rows = zip(*(column.split(counts) for column in per_target), counts, strict=True)
    return [torch.tensor([float(losses.sum()), float(hits.sum()), float(count)]) for losses, hits, count in rows]


class _Loss(torch.autograd.Function):
    """Summed cross-entropy of a frozen last layer. The gradient is computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, scores_of: Scorer, at_once: int) -> Tensor:
        gradient = torch.zeros_like(hidden)  # (N, width)
        total = torch.zeros((), device=hidden.device)
        for part in _parts(len(wanted), at_once):
            with torch.enable_grad():
                some = hidden[part].detach().requires_grad_()
                loss = functional.cross_entropy(scores_of(some), wanted[part], reduction="sum")
                (gradient[part],) = torch.autograd.grad(loss, some)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None


def _rows_at_once(model: Any) -> int:
    return max(1, int(_AT_ONCE // getattr(model, "module", model).config.get_text_config().vocab_size))


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _finisher(config: Any) -> Scorer:
    """Scaling and capping that some model families apply to their logits."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # cohere
    scaling = getattr(config, "logits_scaling", None)  # granite
    cap = getattr(config, "final_logit_softcapping", None)  # gemma

    def finish(scores: Tensor) -> Tensor:
        scores = scores if scale is None else scores * scale
        scores = scores if scaling is None else scores / scaling
        return scores if cap is None else cap * torch.tanh(scores / cap)

    return finish


@contextmanager
def _in_place_of(head: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's forward temporarily."""
    previous = vars(head).get("forward")  # another library may have replaced it already
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if previous is not None:
            head.forward = previous
