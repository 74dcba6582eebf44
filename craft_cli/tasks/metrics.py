"""Metrics, named as in scikit-learn and scipy, and the tables by label.

Every metric is defined for all predictions: a correlation with constant values is 0, and so are R2 for constant gold and
the F1 of a label that neither occurs nor is predicted. Only the errors (`mae`, `rmse`) of non-finite predictions are
non-finite.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def compute_metrics(names: Sequence[str], gold: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Compute metrics of predictions.

    Args:
        names: single-label: `accuracy`, `f1` (of label 1 of two), `f1_macro`, `matthews_correlation`; multi-label:
            `f1_micro`, `f1_macro`; regression: `pearson`, `spearman`, `mae`, `rmse`, `r2`.
        gold: label numbers, 0 or 1 for every label, or real numbers.
        predictions: in the same form.

    `f1_macro` averages over all labels that occur in gold or predictions.
    """
    with warnings.catch_warnings():  # constant inputs and undefined ratios are defined here
        warnings.simplefilter("ignore")
        values = {name: float(_METRICS[name](np.asarray(gold), np.asarray(predictions))) for name in names}
    return {name: value if math.isfinite(value) or lower_is_better(name) else 0.0 for name, value in values.items()}


def lower_is_better(name: str) -> bool:
    """Whether lower values are better: `loss`, `mae`, `rmse`, `perplexity`, also with a split, as in `loss_mismatched`."""
    return name.split("_")[0] in ("loss", "mae", "rmse", "perplexity")


def _accuracy(gold: Any, predictions: Any) -> Any:
    from sklearn.metrics import accuracy_score

    return accuracy_score(gold, predictions)


def _f1(gold: Any, predictions: Any) -> Any:
    from sklearn.metrics import f1_score

    return f1_score(gold, predictions, zero_division=0.0)


def _matthews(gold: Any, predictions: Any) -> Any:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(gold, predictions)


def _pearson(gold: Any, predictions: Any) -> Any:
    from scipy.stats import pearsonr

    return pearsonr(gold, predictions).statistic if len(gold) > 1 and np.isfinite(predictions).all() else 0.0


def _spearman(gold: Any, predictions: Any) -> Any:
    from scipy.stats import spearmanr

    return spearmanr(gold, predictions).statistic if len(gold) > 1 else 0.0


def _mae(gold: Any, predictions: Any) -> Any:
    return np.abs(gold - predictions).mean()


def _rmse(gold: Any, predictions: Any) -> Any:
    return np.sqrt(np.square(gold - predictions).mean())


def _r2(gold: Any, predictions: Any) -> Any:
    constant = np.all(gold == gold[0])
    return 0.0 if constant else 1 - np.square(gold - predictions).sum() / np.square(gold - gold.mean()).sum()


def _f1_of_many(average: str) -> Callable[[Any, Any], Any]:
    def f1(gold: Any, predictions: Any) -> Any:
        from sklearn.metrics import f1_score

        return f1_score(gold, predictions, average=average, zero_division=0.0)

    return f1


_METRICS: dict[str, Callable[[Any, Any], Any]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "mae": _mae,
    "rmse": _rmse,
    "r2": _r2,
    "f1_micro": _f1_of_many("micro"),
    "f1_macro": _f1_of_many("macro"),
}


MOST_CONFUSED = 200
"""Maximum labels of a confusion matrix: larger ones are unreadable, and thousands of labels would need gigabytes."""


def confusion(gold: Sequence[int], predictions: Sequence[int], labels: Sequence[str]) -> list[list[int]]:
    """Confusion matrix: gold labels are rows, predicted labels are columns."""
    from sklearn.metrics import confusion_matrix

    matrix: list[list[int]] = confusion_matrix(gold, predictions, labels=range(len(labels))).tolist()
    return matrix


def by_label(gold: Sequence[Any], predictions: Sequence[Any], labels: Sequence[str]) -> dict[str, Mapping[str, float]]:
    """Precision, recall, f1 and support (rows with this gold label) of every label."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        np.asarray(gold), np.asarray(predictions), labels=range(len(labels)), zero_division=0.0
    )
    names = ("precision", "recall", "f1", "support")
    return {
        label: {
            name: int(column[number]) if name == "support" else float(column[number])
            for name, column in zip(names, columns, strict=True)
        }
        for number, label in enumerate(labels)
    }


def averages(
    by_label: Mapping[str, Mapping[str, float]], confusion: Sequence[Sequence[int]] | None = None
) -> dict[str, dict[str, float]]:
    """The average lines of a table by label, named as in scikit-learn's classification_report.

    Args:
        by_label: the table.
        confusion: confusion matrix of a single-label task; without it, accuracy is omitted.
    """
    support = [row["support"] for row in by_label.values()]
    rates = {name: np.array([row[name] for row in by_label.values()]) for name in ("precision", "recall", "f1")}
    total, parts = sum(support), np.array(support) / max(sum(support), 1)
    averages: dict[str, dict[str, float]] = {}
    if confusion is not None:
        averages["accuracy"] = {"f1": float(np.trace(confusion)) / max(total, 1), "support": total}
    averages["macro avg"] = {name: float(values.mean()) for name, values in rates.items()} | {"support": total}
    averages["weighted avg"] = {name: float(values @ parts) for name, values in rates.items()} | {"support": total}
    return averages


def renamed(metrics: Mapping[str, float], split: str, splits: Sequence[str] | Mapping[str, Any]) -> dict[str, float]:
    """Metrics by name. Those of further splits have the split as a suffix: `accuracy_mismatched`."""
    if split == next(iter(splits)):
        return dict(metrics)
    return {f"{name}_{split.removeprefix('validation_')}": value for name, value in metrics.items()}
