"""What is made of a model's logits: a loss, predictions, scores, metrics. One place for every kind of problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from craft_cli.errors import ConfigError, DataError
from craft_cli.tasks.base import MULTI, REGRESSION, Task
from craft_cli.tasks.metrics import by_label, compute_metrics, confusion


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


def balanced_weights(gold: Sequence[Any], task: Task) -> list[float]:
    """A weight for every label against rare ones being drowned.

    Of one label a row, scikit-learn's `balanced`: rows / (labels x rows of this label). Where several labels apply, the
    rows without a label against those with it, for the positive part of its loss.

    Raises:
        ConfigError: a regression has no labels to weigh.
    """
    if task.problem_type == REGRESSION:
        raise ConfigError("--class-weights: a regression has no labels to weigh")
    if task.problem_type == MULTI:
        table = torch.tensor(gold)  # (rows, labels)
        positive = table.sum(dim=0)
        return ((len(table) - positive) / positive.clamp(min=1)).tolist()
    counts = [max(list(gold).count(number), 1) for number in range(len(task.labels))]
    return [len(gold) / (len(counts) * count) for count in counts]


def scores(logits: Tensor, problem_type: str) -> Tensor:
    """Probability of every label (rows, labels): softmax, or one sigmoid a label; of a regression the number itself."""
    if problem_type == REGRESSION:
        return logits
    return torch.sigmoid(logits) if problem_type == MULTI else torch.softmax(logits, dim=-1)


def decide(logits: Tensor, problem_type: str, threshold: float = 0.5) -> list[Any]:
    """The prediction of every row: a label number, a real number, or a 0 or 1 for every label."""
    if problem_type == REGRESSION:
        return logits.squeeze(-1).tolist()
    if problem_type == MULTI:
        return (torch.sigmoid(logits) > threshold).int().tolist()
    return logits.argmax(dim=-1).tolist()


def measure(logits: Tensor, gold: Sequence[Any], task: Task, threshold: float = 0.5) -> dict[str, float]:
    """The task's metrics, and the mean loss."""
    metrics = compute_metrics(task.metrics, gold, decide(logits, task.problem_type, threshold))
    return metrics | {"loss": float(summed_loss(logits, torch.tensor(gold), task.problem_type)) / len(gold)}


def constant_metric(train: Sequence[Any], gold: Sequence[Any], task: Task) -> float:
    """The task's first metric for always predicting what is most frequent (or the mean) in the training rows."""
    if task.problem_type == REGRESSION:
        guess: Any = sum(train) / len(train)
    elif task.problem_type == MULTI:
        guess = [int(2 * sum(column) > len(train)) for column in zip(*train, strict=True)]
    else:
        guess = max(set(train), key=lambda label: (list(train).count(label), -label))
    return compute_metrics(task.metrics[:1], gold, [guess] * len(gold))[task.metrics[0]]


def align_labels(labels: Sequence[str], id2label: Mapping[int, str] | None) -> tuple[str, ...]:
    """The label names in the order of a checkpoint's head, if it has names; by name, never by position.

    Raises:
        DataError: the checkpoint names other labels.
    """
    if not id2label:
        return tuple(labels)
    theirs = [id2label[number] for number in sorted(id2label)]
    if all(name.startswith("LABEL_") for name in theirs) and len(theirs) == len(labels):
        return tuple(labels)
    by_lower = {label.lower(): label for label in labels}
    if sorted(name.lower() for name in theirs) != sorted(by_lower):
        raise DataError(f"the checkpoint has the labels {', '.join(theirs)}, the data {', '.join(labels)}")
    return tuple(by_lower[name.lower()] for name in theirs)


def records(
    logits: Tensor, task: Task, threshold: float = 0.5, gold: Sequence[Any] | None = None
) -> Iterator[dict[str, Any]]:
    """A mapping for each row: `prediction`, `scores` by label, and `label` where gold is known.

    A prediction is a label's name, the names of all labels that apply, or a number.
    """
    for row, (values, number) in enumerate(
        zip(scores(logits, task.problem_type).tolist(), decide(logits, task.problem_type, threshold), strict=True)
    ):
        record: dict[str, Any] = {
            "prediction": _named(number, task),
            "scores": {name: round(value, 6) for name, value in zip(task.labels, values, strict=True)},
        }
        if gold is not None:
            record["label"] = _named(gold[row], task)
        yield record


def _named(value: Any, task: Task) -> Any:
    if task.problem_type == REGRESSION:
        return round(float(value), 6)
    if task.problem_type == MULTI:
        return [name for name, applies in zip(task.labels, value, strict=True) if applies]
    return task.labels[value]


def _tables(task: Task, gold: list[Any], found: list[Any]) -> dict[str, Any]:
    if task.problem_type == REGRESSION:
        return {}
    tables: dict[str, Any] = {"by_label": by_label(gold, found, task.labels)}
    if task.problem_type != MULTI:
        tables["confusion"] = confusion(gold, found, task.labels)
    return tables
