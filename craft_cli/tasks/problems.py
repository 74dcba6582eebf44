"""What the outputs of a head mean, for every kind of problem: loss, probabilities, predictions, and a head that is fitted."""

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
    """Loss of a batch, summed over its rows.

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
    """The mean over rows of `summed_loss`; of numbers in float64, or far from zero the squares would hold rounding alone."""
    if problem_type == REGRESSION:
        found = functional.mse_loss(logits.squeeze(-1).double(), torch.tensor(gold, dtype=torch.float64))
        return float(found)
    return float(summed_loss(logits, torch.tensor(gold), problem_type)) / len(gold)


def probabilities(logits: Tensor, problem_type: str) -> Tensor:
    """Probability of every label (rows, labels): softmax, or one sigmoid a label; of a regression the number itself."""
    if problem_type == REGRESSION:
        return logits
    return torch.sigmoid(logits) if problem_type == MULTI else torch.softmax(logits, dim=-1)


def decide(logits: Tensor, problem_type: str, threshold: float = THRESHOLD) -> list[Any]:
    """The prediction of every row: a label number, a real number, or a 0 or 1 for every label."""
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
    """A linear probe (see `tasks.probe`) for a head of these labels.

    Args:
        features: (rows, features).
        gold: see `summed_loss`.
        problem_type: decides what is fitted.
        labels: how many there are.
        factors: (labels,), of the loss of each label's rows; none without.
        bias: whether the layer has one.
        progress: see `tasks.probe`.
    """
    x, y = features.double().numpy(), np.array(gold)
    if problem_type == REGRESSION:
        return fit_numbers(x, y, bias=bias, progress=progress)
    if problem_type == MULTI:
        return fit_several(x, y, factors=factors, bias=bias, progress=progress)
    return fit_labels(x, y, labels, factors=factors, bias=bias, progress=progress)


def units_of(gold: Sequence[float]) -> tuple[float, float]:
    """The mean of some numbers, and the power of two next to their standard deviation: dividing by it loses nothing."""
    spread = float(np.std(gold)) if np.ptp(gold) else 0.0  # else rounding makes one of equal numbers
    return float(np.mean(gold)), 2.0 ** round(math.log2(spread)) if spread > 0 else 1.0


def balanced_weights(gold: Sequence[Any], problem_type: str, labels: int) -> list[float]:
    """A factor for every label against rare ones being drowned.

    Of one label a row, scikit-learn's `balanced`: rows / (labels x rows of this label). Where several labels apply, the
    rows without a label against those with it, for the positive part of its loss.
    """
    if problem_type == MULTI:
        table = torch.tensor(gold)  # (rows, labels)
        positive = table.sum(dim=0)
        return ((len(table) - positive) / positive.clamp(min=1)).tolist()
    counts = Counter(gold)
    return [len(gold) / (labels * max(counts[number], 1)) for number in range(labels)]


def kept_threshold(record: Mapping[str, Any]) -> float:
    """The threshold that the record of a training tells.

    Raises:
        ModelError: it is none.
    """
    told = record.get("threshold", THRESHOLD)
    if not isinstance(told, (int, float)) or not 0 < told < 1:
        raise ModelError(
            f"the model's threshold (in config.json, under {MERGED_KEY}) is {told!r}, not a number between 0 and 1: correct it"
        )
    return float(told)


def best_threshold(logits: Tensor, gold: Sequence[Any]) -> float:
    """Where a label should begin to apply: the threshold, in steps of 0.01, with the highest micro F1 on these rows.

    Of several as good it is the one nearest to 0.5.

    Args:
        logits: (rows, labels).
        gold: (rows, labels), 0 or 1.
    """
    thresholds = torch.arange(1, 100, dtype=torch.float64) / 100
    probabilities, gold_table = torch.sigmoid(logits.double()), torch.tensor(gold, dtype=torch.float64)
    found = []
    for threshold in thresholds:
        applies = (probabilities > threshold).double()
        found.append(float(2 * (applies * gold_table).sum() / (applies.sum() + gold_table.sum()).clamp(min=1)))
    best = max(found)
    return min((float(t) for t, f1 in zip(thresholds, found, strict=True) if f1 == best), key=lambda t: abs(t - 0.5))


def constant_answer(gold: Sequence[Any], problem_type: str) -> Any:
    """The one answer to all rows that is best on these: the most frequent label, so many of the most frequent ones, the mean."""
    if problem_type == REGRESSION:
        return sum(gold) / len(gold)
    if problem_type != MULTI:
        counted = Counter(gold)
        return max(counted, key=lambda label: (counted[label], -label))
    counts = np.array(gold).sum(axis=0)  # (labels,)
    order = np.argsort(-counts, kind="stable")
    numbers = np.arange(1, len(order) + 1)
    f1 = 2 * np.cumsum(counts[order]) / (numbers * len(gold) + counts.sum())  # of the first, the first two, ...
    answer = np.zeros(len(order), dtype=int)
    answer[order[: int(f1.argmax()) + 1]] = 1
    return answer.tolist()
