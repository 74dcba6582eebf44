"""Whether probabilities mean what they say: the expected calibration error, and the temperature that corrects them.

Guo et al. 2017, arXiv 1706.04599. Everywhere the gold is (rows,) label numbers, with one label a row, or (rows, labels)
of 0 and 1, where several can apply: then the probability of each label is a forecast by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

BINS = 15
"""Of equal width, as in the paper."""
_AT_ONCE = 256
COLDEST, HOTTEST = 0.05, 20.0
"""Between these a temperature is looked for."""


def forecast_error(logits: Tensor, gold: Tensor) -> float | None:
    """The expected calibration error of logits (rows, labels): of the label chosen, or of every label; None of no row."""
    if gold.ndim == 2:
        return expected_calibration_error(torch.sigmoid(logits.double()).flatten(), gold.flatten())
    found = [
        torch.softmax(rows.double(), dim=-1).max(dim=-1) for rows in logits.split(_AT_ONCE)
    ]  # labels may be thousands
    confidence, chosen = (torch.cat(parts) for parts in zip(*found, strict=True))
    return expected_calibration_error(confidence, chosen == gold)


def expected_calibration_error(probabilities: Tensor, right: Tensor, bins: int = BINS) -> float | None:
    """Mean distance of probability and frequency, over bins of equal width weighted by their forecasts.

    Args:
        probabilities: (forecasts,); one between two bins belongs to the lower one.
        right: (forecasts,), 1 where it came true.
        bins: how many.
    """
    if not len(probabilities):
        return None
    place = (torch.ceil(probabilities * bins) - 1).clamp(0, bins - 1).nan_to_num().long()
    surplus = torch.bincount(place, probabilities.double() - right.double(), bins)  # (bins,), of sums
    return float(surplus.abs().sum() / len(probabilities))


def temperature(logits: Tensor, gold: Tensor) -> float:
    """The T, from `COLDEST` to `HOTTEST`, for which the mean loss of logits (rows, labels) / T is smallest.

    1.0 where the rows cannot tell: with no wrong answer the loss only falls as T does, and one outcome says nothing of
    the others.
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()
    if len(gold.unique()) < 2 or not logits.isfinite().all() or _all_right(logits, gold):
        return 1.0

    def loss(log_t: float) -> float:
        cooled = logits / math.exp(log_t)
        if gold.ndim == 2:
            return float(functional.binary_cross_entropy_with_logits(cooled, gold.double()))
        return float(functional.cross_entropy(cooled, gold))

    bounds = math.log(COLDEST), math.log(HOTTEST)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8}).x)


def _all_right(logits: Tensor, gold: Tensor) -> bool:
    if gold.ndim == 2:
        return bool(((2 * gold - 1) * logits >= 0).all())
    return bool((logits.gather(1, gold[:, None])[:, 0] == logits.amax(dim=-1)).all())
