"""Linear probe, fitted with scikit-learn on the frozen base's inputs to the last layer of the head.

It initializes the head (LP-FT, Kumar et al. 2022, arXiv 2202.10054). Features are scaled to a mean variance of 1, and the
penalty is chosen by cross-validation. The returned weights apply to unscaled features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3)
"""Penalties to try; half of the penalty times the squared norm of the weights is added to the mean loss."""

MOST_AMPLIFIED = 100.0
"""Maximum amplification of rounding errors in the features; above it, a stronger penalty is used."""

_FOLDS = 5
_MANY_ROWS = 3000
"""From this many rows on, one validation part replaces five-fold cross-validation."""

Weights = Any  # row weights (rows,)

Progress = Callable[[int, int], None]
"""Called with (fits done, total fits)."""


def silent(done: int, total: int) -> None:
    """Ignore progress."""


class Linear(NamedTuple):
    """A linear layer.

    Attributes:
        weight: (outputs, features), float64.
        bias: (outputs,); zero for a layer without bias.
    """

    weight: Any
    bias: Any

    def __call__(self, features: Any) -> Any:
        """Map (rows, features) to (rows, outputs)."""
        return features @ self.weight.T + self.bias


def fit_labels(
    features: Any,
    gold: Any,
    labels: int,
    *,
    factors: Sequence[float] = (),
    bias: bool = True,
    progress: Progress = silent,
) -> Linear:
    """Multinomial logistic regression.

    Args:
        features: (rows, features).
        gold: (rows,), label numbers.
        labels: number of labels; a label without rows is never predicted.
        factors: class weights (labels,). Default: equal weights.
        bias: whether the layer has a bias; if not, features are scaled but not centered.
        progress: see `Progress`.
    """
    from sklearn.linear_model import LogisticRegression

    weights = np.asarray(factors)[gold] if len(factors) else np.ones(len(gold))
    present = np.unique(gold)

    def fit(x: Any, y: Any, w: Weights, penalty: float) -> Linear:
        model = LogisticRegression(C=1 / (penalty * w.sum()), fit_intercept=bias, max_iter=300, tol=1e-4)
        model.fit(x, y, sample_weight=w)
        weight, start = np.zeros((labels, x.shape[1])), np.zeros(labels)
        if len(model.classes_) == 2:  # a single output, for the second label
            one, two = model.classes_
            weight[two], start[two] = model.coef_[0] / 2, model.intercept_[0] / 2 if bias else 0.0
            weight[one], start[one] = -weight[two], -start[two]
        else:
            weight[model.classes_] = model.coef_
            start[model.classes_] = model.intercept_ if bias else 0.0
        return Linear(weight, start)

    def loss(layer: Linear, x: Any, y: Any, w: Weights) -> float:
        logits = layer(x)
        logits -= logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
        return float((w * losses).sum())

    if len(present) < 2:
        return Linear(np.zeros((labels, features.shape[1])), np.zeros(labels))
    return _fitted(features, gold, weights, fit, loss, gold, bias=bias, progress=progress)


def fit_several(
    features: Any, gold: Any, *, factors: Sequence[float] = (), bias: bool = True, progress: Progress = silent
) -> Linear:
    """One logistic regression per label, for multi-label tasks.

    Args:
        features: (rows, features).
        gold: (rows, labels), 0 or 1.
        factors: positive weights (labels,). Default: equal weights.
        bias: see `fit_labels`.
        progress: see `Progress`.
    """
    layers: list[tuple[Any, Any]] = []
    labels = np.asarray(gold).shape[1]

    def of_all(done: int, total: int) -> None:
        progress(len(layers) * total + done, labels * total)

    for number, column in enumerate(np.asarray(gold).T):
        pair = (1.0, factors[number]) if len(factors) else ()
        two = fit_labels(features, column.astype(int), 2, factors=pair, bias=bias, progress=of_all)
        weight, start = two.weight[1] - two.weight[0], two.bias[1] - two.bias[0]
        if len(np.unique(column)) < 2 and bias:  # only one class: use the odds with one row of the other class added
            start = np.log((column.sum() + 1) / (len(column) - column.sum() + 1))
        layers.append((weight, start))
    return Linear(np.stack([weight for weight, _ in layers]), np.array([start for _, start in layers]))


def fit_numbers(features: Any, gold: Any, *, bias: bool = True, progress: Progress = silent) -> Linear:
    """Ridge regression.

    Args:
        features: (rows, features).
        gold: (rows,), real numbers.
        bias: see `fit_labels`.
        progress: see `Progress`.
    """
    from sklearn.linear_model import Ridge

    scale = float(np.std(gold)) if np.ptp(gold) else 1.0

    def fit(x: Any, y: Any, w: Weights, penalty: float) -> Linear:
        model = Ridge(alpha=penalty * len(y), fit_intercept=bias).fit(x, y)
        return Linear(model.coef_[None], np.array([model.intercept_ if bias else 0.0]))

    def loss(layer: Linear, x: Any, y: Any, w: Weights) -> float:
        return float(((layer(x)[:, 0] - y) ** 2).sum())

    ranks = np.argsort(np.argsort(gold, kind="stable"), kind="stable")
    strata = ranks * 10 // max(len(ranks), 1)  # stratify by the size of the target
    fitted = _fitted(
        features, np.asarray(gold) / scale, np.ones(len(gold)), fit, loss, strata, bias=bias, progress=progress
    )
    return Linear(fitted.weight * scale, fitted.bias * scale)


def _fitted(
    features: Any,
    gold: Any,
    weights: Weights,
    fit: Callable[[Any, Any, Weights, float], Linear],
    loss: Callable[[Linear, Any, Any, Weights], float],
    strata: Any,
    *,
    bias: bool,
    progress: Progress,
) -> Linear:
    """Fit with the penalty that is best on held-out rows."""
    x = np.asarray(features, dtype=np.float64)
    mean = x.mean(axis=0) if bias else np.zeros(x.shape[1])
    scale = (
        float(np.sqrt(((x - mean) ** 2).mean())) or 1.0
    )  # one scale for all features, so that nearly constant ones get no large weight
    x = (x - mean) / scale
    parts, totals = _parts(strata), np.zeros(len(PENALTIES))
    fits = len(parts) * len(PENALTIES) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about many labels or convergence: the user cannot fix these
        for part, (train, test) in enumerate(parts):
            for number, penalty in enumerate(PENALTIES):
                layer = fit(x[train], gold[train], weights[train], penalty)
                totals[number] += loss(layer, x[test], gold[test], weights[test])
                progress(part * len(PENALTIES) + number + 1, fits)
        for penalty in PENALTIES[int(totals.argmin()) :: -1]:
            weight, start = fit(x, gold, weights, penalty)
            weight = weight / scale
            layer = Linear(weight, start - weight @ mean)
            if _amplification(layer, features) <= MOST_AMPLIFIED:
                break
    progress(fits, fits)
    return layer


def _amplification(layer: Linear, features: Any) -> float:
    """Upper bound on the amplification of a relative error in the features: the size of the features times the weights."""
    inside = np.linalg.norm(layer.weight, 2) * np.sqrt((np.asarray(features) ** 2).sum(axis=1).mean())
    return float(inside / max(np.std(layer(features)), 1e-30)) if layer.weight.any() else 0.0


def _parts(strata: Any) -> list[tuple[Any, Any]]:
    """Stratified splits into rows to fit and rows to validate; empty if there are too few rows."""
    order = np.argsort(strata, kind="stable")
    fold = np.empty(len(order), dtype=int)
    fold[order] = np.arange(len(order)) % _FOLDS
    parts = [(np.flatnonzero(fold != part), np.flatnonzero(fold == part)) for part in range(_FOLDS)]
    parts = [(train, test) for train, test in parts if len(test) and len(np.unique(strata[train])) > 1]
    return parts[:1] if len(order) > _MANY_ROWS else parts
