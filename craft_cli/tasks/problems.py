"""Loss, probabilities, predictions and linear probe for each problem type."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from craft_cli.config import MERGED_KEY, THRESHOLD
from craft_cli.errors import ModelError
from craft_cli.tasks.labels import MULTI, REGRESSION
from craft_cli.tasks.probe import Linear, Progress, fit_labels, fit_numbers, fit_several


def summed_loss(logits: Tensor, gold: Tensor, problem_type: str, class_weights: Tensor | None = None) -> Tensor:
    """The loss of a batch, summed over its rows.

    Args:
        logits: (rows, labels), or (rows, 1) for a regression.
        gold: label numbers (rows,); real numbers (rows,); or 0 and 1 for every label (rows, labels).
        problem_type: cross-entropy, squared error, or the mean over the labels of binary cross-entropies.
        class_weights: (labels,), a factor for the rows of each label.
    """
    logits = logits.float()
    if problem_type == REGRESSION:
        return functional.mse_loss(logits.squeeze(-1), gold.float(), reduction="sum")
    if problem_type == MULTI:
        losses = functional.binary_cross_entropy_with_logits(
            logits, gold.float(), pos_weight=class_weights, reduction="none"
        )
        return losses.mean(dim=-1).sum()
    losses = functional.cross_entropy(logits, gold, reduction="none")  # (rows,)
    return (losses if class_weights is None else losses * class_weights[gold]).sum()


def mean_loss(logits: Tensor, gold: Sequence[Any], problem_type: str) -> float:
    """The mean of `summed_loss` over rows; in float64 for regression, because rounding dominates squares of large numbers."""
    if problem_type == REGRESSION:
        loss = functional.mse_loss(logits.squeeze(-1).double(), torch.tensor(gold, dtype=torch.float64))
        return float(loss)
    return float(summed_loss(logits, torch.tensor(gold), problem_type)) / len(gold)


def probabilities(logits: Tensor, problem_type: str) -> Tensor:
    """Probabilities (rows, labels): softmax, or one sigmoid per label; for regression, the number itself."""
    if problem_type == REGRESSION:
        return logits
    return torch.sigmoid(logits) if problem_type == MULTI else torch.softmax(logits, dim=-1)


def decide(logits: Tensor, problem_type: str, threshold: float = THRESHOLD) -> list[Any]:
    """The prediction of every row: a label number, a real number, or 0 or 1 for every label."""
    if problem_type == REGRESSION:
        return logits.squeeze(-1).tolist()
    if problem_type == MULTI:
        return (torch.sigmoid(logits) > threshold).int().tolist()
    return logits.argmax(dim=-1).tolist()


def fit_outputs(
    features: Tensor,
    gold: Sequence[Any],
    problem_type: str,
    labels: int,
    factors: Sequence[float],
    *,
    bias: bool,
    progress: Progress,
) -> Linear:
    """Fit a linear probe (see `tasks.probe`) for a head with these labels.

    Args:
        features: (rows, features).
        gold: see `summed_loss`.
        problem_type: problem type, one of `PROBLEM_TYPES`.
        labels: number of labels.
        factors: class weights (labels,). Default: equal weights.
        bias: whether the layer has a bias.
        progress: see `tasks.probe`.
    """
    x, y = features.double().numpy(), np.array(gold)
    if problem_type == REGRESSION:
        return fit_numbers(x, y, bias=bias, progress=progress)
    if problem_type == MULTI:
        return fit_several(x, y, factors=factors, bias=bias, progress=progress)
    return fit_labels(x, y, labels, factors=factors, bias=bias, progress=progress)


def units_of(gold: Sequence[float]) -> tuple[float, float]:
    """Mean of the targets, and the power of two nearest to their standard deviation, so that scaling is exact."""
    spread = float(np.std(gold)) if np.ptp(gold) else 0.0  # equal numbers could get a nonzero value by rounding
    return float(np.mean(gold)), 2.0 ** round(math.log2(spread)) if spread > 0 else 1.0


def balanced_weights(gold: Sequence[Any], problem_type: str, labels: int) -> list[float]:
    """Class weights that balance frequent and rare labels.

    Single-label: scikit-learn's `balanced`, rows / (labels x rows of this label). Multi-label: rows without the label
    divided by rows with it, for the positive part of its loss.
    """
    if problem_type == MULTI:
        table = torch.tensor(gold)  # (rows, labels)
        positive = table.sum(dim=0)
        return ((len(table) - positive) / positive.clamp(min=1)).tolist()
    counts = Counter(gold)
    return [len(gold) / (labels * max(counts[number], 1)) for number in range(labels)]


def kept_threshold(record: Mapping[str, Any]) -> float:
    """The threshold in a training record.

    Raises:
        ModelError: the threshold is invalid.
    """
    threshold = record.get("threshold", THRESHOLD)
    if not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
        raise ModelError(
            f"the model's threshold (in config.json, under {MERGED_KEY}) is {threshold!r}, not a number between 0 and 1: correct it"
        )
    return float(threshold)


def best_threshold(logits: Tensor, gold: Sequence[Any]) -> float:
    """The threshold, in steps of 0.01, with the highest micro F1 on these rows.

    Ties are resolved towards 0.5.

    Args:
        logits: (rows, labels).
        gold: (rows, labels), 0 or 1.
    """
    thresholds = torch.arange(1, 100, dtype=torch.float64) / 100
    probabilities, gold_table = torch.sigmoid(logits.double()), torch.tensor(gold, dtype=torch.float64)
    scores = []
    for threshold in thresholds:
        applies = (probabilities > threshold).double()
        scores.append(float(2 * (applies * gold_table).sum() / (applies.sum() + gold_table.sum()).clamp(min=1)))
    best = max(scores)
    return min((float(t) for t, f1 in zip(thresholds, scores, strict=True) if f1 == best), key=lambda t: abs(t - 0.5))


def constant_answer(gold: Sequence[Any], problem_type: str) -> Any:
    """The best constant prediction: the most frequent label, the best number of most frequent labels, or the mean."""
    if problem_type == REGRESSION:
        return sum(gold) / len(gold)
    if problem_type != MULTI:
        counted = Counter(gold)
        return max(counted, key=lambda label: (counted[label], -label))
    counts = np.array(gold).sum(axis=0)  # (labels,)
    order = np.argsort(-counts, kind="stable")
    numbers = np.arange(1, len(order) + 1)
    f1 = 2 * np.cumsum(counts[order]) / (numbers * len(gold) + counts.sum())  # for the first label, the first two, ...
    answer = np.zeros(len(order), dtype=int)
    answer[order[: int(f1.argmax()) + 1]] = 1
    return answer.tolist()
