"""Calibration of probabilities: the expected calibration error, and temperature scaling.

Guo et al. 2017, arXiv 1706.04599. Gold is (rows,) label numbers for single-label tasks, or (rows, labels) of 0 and 1 for
multi-label tasks, where the probability of each label counts as a separate forecast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

BINS = 15
"""Number of bins of equal width, as in the paper."""
_AT_ONCE = 256
COLDEST, HOTTEST = 0.05, 20.0
"""Search range of the temperature."""


def forecast_error(logits: Tensor, gold: Tensor) -> float | None:
    """The expected calibration error of logits (rows, labels): of the predicted label, or of every label; None without rows."""
    if gold.ndim == 2:
        return expected_calibration_error(torch.sigmoid(logits.double()).flatten(), gold.flatten())
    forecasts = [
        torch.softmax(rows.double(), dim=-1).max(dim=-1) for rows in logits.split(_AT_ONCE)
    ]  # there can be thousands of labels
    confidence, chosen = (torch.cat(parts) for parts in zip(*forecasts, strict=True))
    return expected_calibration_error(confidence, chosen == gold)


def expected_calibration_error(probabilities: Tensor, right: Tensor, bins: int = BINS) -> float | None:
    """Mean gap between probability and frequency over bins of equal width, weighted by the forecasts per bin.

    Args:
        probabilities: (forecasts,); a value on a boundary belongs to the lower bin.
        right: (forecasts,), 1 for a correct forecast.
        bins: number of bins.
    """
    if not len(probabilities):
        return None
    place = (torch.ceil(probabilities * bins) - 1).clamp(0, bins - 1).nan_to_num().long()
    surplus = torch.bincount(place, probabilities.double() - right.double(), bins)  # sums (bins,)
    return float(surplus.abs().sum() / len(probabilities))


def temperature(logits: Tensor, gold: Tensor) -> float:
    """The T between `COLDEST` and `HOTTEST` that minimizes the mean loss of logits (rows, labels) / T.

    Returns 1.0 if the rows do not determine it: without wrong answers the loss only falls as T does, and with a single
    outcome there is nothing to calibrate.
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
