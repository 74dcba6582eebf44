"""Metrics, losses and predictions of every kind of problem, against scikit-learn, scipy and cases computed by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from craft_cli.tasks.labels import MULTI, NUMBER, OWN_METRICS, REGRESSION, SINGLE
from craft_cli.tasks.metrics import averages, by_label, compute_metrics, confusion, lower_is_better
from craft_cli.tasks.sequence_classification import SequenceClassification as Task
from craft_cli.tasks.sequence_classification import decide, probabilities, summed_loss


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_are_those_of_scikit_learn(classes: int) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    draw = random.Random(classes)
    labels, predictions = (draw.choices(range(classes), k=300) for _ in range(2))
    assert compute_metrics(("accuracy", "f1_macro"), labels, predictions) == {
        "accuracy": accuracy_score(labels, predictions),
        "f1_macro": f1_score(labels, predictions, average="macro"),
    }
    if classes == 2:
        assert compute_metrics(("f1",), labels, predictions) == {"f1": f1_score(labels, predictions)}
    with pytest.raises(KeyError):
        compute_metrics(("f2",), labels, predictions)


def test_macro_f1_is_of_the_labels_that_occur_whatever_they_are() -> None:
    """GLUE's f1 would be that of label 1: 0 of [1, 1] and 2 of [0, 0]."""
    gold = [0] * 8 + [1] * 2
    assert compute_metrics(("f1_macro",), gold, [0] * 10)["f1_macro"] == pytest.approx((16 / 18 + 0) / 2)
    more = [*[0] * 9, 2]  # a third label, in a prediction alone
    assert compute_metrics(("f1_macro",), gold, more)["f1_macro"] == pytest.approx((16 / 17 + 0 + 0) / 3)
    assert compute_metrics(("f1_macro",), [1, 1, 2], [1, 1, 2]) == {"f1_macro": 1.0}  # and nothing of label 0


@pytest.mark.parametrize(
    ("labels", "predictions", "expected"),
    [
        ([0, 1, 0], [0, 0, 0], {"accuracy": 2 / 3, "f1": 0.0}),  # one label predicted
        ([0, 0, 0], [0, 0, 0], {"accuracy": 1.0, "f1": 0.0}),  # the label f1 is of does not occur
        ([1, 1], [1, 1], {"accuracy": 1.0, "f1": 1.0}),
        ([1], [0], {"accuracy": 0.0, "f1": 0.0}),
    ],
)
def test_metrics_of_degenerate_predictions_are_numbers(
    labels: list[int], predictions: list[int], expected: dict[str, float]
) -> None:
    assert compute_metrics(("accuracy", "f1"), labels, predictions) == pytest.approx(expected)  # and no warning


def test_correlations_are_those_of_scipy_and_matthews_that_of_scikit_learn() -> None:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import matthews_corrcoef

    draw = random.Random(3)
    gold = [draw.random() * 5 for _ in range(80)]
    guess = [value + draw.random() for value in gold]
    assert compute_metrics(("pearson", "spearman"), gold, guess) == {
        "pearson": pytest.approx(pearsonr(gold, guess).statistic),
        "spearman": pytest.approx(spearmanr(gold, guess).statistic),
    }
    labels, found = (draw.choices(range(2), k=80) for _ in range(2))
    assert compute_metrics(("matthews_correlation",), labels, found)["matthews_correlation"] == pytest.approx(
        matthews_corrcoef(labels, found)
    )


def test_errors_of_numbers_are_those_of_scikit_learn_in_the_units_of_the_gold() -> None:
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    draw = random.Random(4)
    gold = [draw.gauss(350_000, 90_000) for _ in range(200)]
    guess = [0.7 * value + draw.gauss(0, 40_000) for value in gold]
    assert compute_metrics(("mae", "rmse", "r2"), gold, guess) == {
        "mae": pytest.approx(mean_absolute_error(gold, guess)),
        "rmse": pytest.approx(root_mean_squared_error(gold, guess)),
        "r2": pytest.approx(r2_score(gold, guess)),
    }


@pytest.mark.parametrize(
    ("gold", "guess", "expected"),
    [
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], (2 / 3, math.sqrt(2 / 3), 0.0)),  # the mean
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], (4 / 3, math.sqrt(8 / 3), -3.0)),  # worse than the mean
        ([2.0, 2.0], [1.0, 4.0], (1.5, math.sqrt(2.5), 0.0)),  # constant gold
        ([2.0, 2.0], [2.0, 2.0], (0.0, 0.0, 0.0)),
        ([0.1] * 3, [0.2] * 3, (0.1, 0.1, 0.0)),  # whose mean is another float
        ([2.0], [5.0], (3.0, 3.0, 0.0)),
    ],
)
def test_errors_of_degenerate_numbers(gold: list[float], guess: list[float], expected: tuple[float, ...]) -> None:
    assert tuple(compute_metrics(("mae", "rmse", "r2"), gold, guess).values()) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_error_of_predictions_that_are_not_finite_is_not_none(bad: float) -> None:
    found = compute_metrics(("pearson", "mae", "rmse", "r2"), [1.0, 2.0, 3.0], [1.0, bad, 3.0])
    assert (found["pearson"], found["r2"]) == (0.0, 0.0)
    assert not math.isfinite(found["mae"])
    assert not math.isfinite(found["rmse"])


def test_it_is_known_which_metrics_are_errors() -> None:
    every = {name for names in OWN_METRICS.values() for name in names} | {"f1", "matthews_correlation", "loss"}
    assert {name for name in every if lower_is_better(name)} == {"loss", "mae", "rmse"}
    assert lower_is_better("loss_mismatched")
    assert not lower_is_better("accuracy_mismatched")


@pytest.mark.parametrize(
    ("names", "gold", "guess", "expected"),
    [
        (("pearson", "spearman"), [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
        (("pearson", "spearman"), [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], -1.0),
        (("pearson", "spearman"), [1.0, 2.0, 3.0], [2.5, 2.5, 2.5], 0.0),  # constant output
        (("pearson", "spearman"), [2.0, 2.0], [1.0, 3.0], 0.0),  # constant gold
        (("pearson", "spearman"), [2.0], [1.0], 0.0),  # one row
        (("matthews_correlation",), [0, 1, 1, 0], [1, 1, 1, 1], 0.0),  # one label predicted
        (("matthews_correlation",), [1, 1], [1, 1], 0.0),
        (("matthews_correlation",), [0, 1, 1, 0], [1, 0, 0, 1], -1.0),
        (("f1_micro", "f1_macro"), [[1, 0], [0, 1]], [[1, 0], [0, 1]], 1.0),
        (("f1_micro", "f1_macro"), [[1, 0], [0, 1]], [[0, 0], [0, 0]], 0.0),  # nothing predicted
    ],
)
def test_metrics_by_hand_are_numbers_without_warnings(
    names: tuple[str, ...], gold: list[Any], guess: list[Any], expected: float
) -> None:
    assert compute_metrics(names, gold, guess) == dict.fromkeys(names, pytest.approx(expected))


def test_micro_counts_cells_and_macro_labels() -> None:
    gold, guess = [[1, 0], [1, 1], [1, 0]], [[1, 1], [1, 0], [1, 1]]
    # label 0: f1 1; label 1: no hit, two false alarms, one miss: f1 0. Cells: 3 hits, 2 false alarms, 1 miss.
    assert compute_metrics(("f1_micro", "f1_macro"), gold, guess) == pytest.approx({"f1_micro": 6 / 9, "f1_macro": 0.5})


def test_the_tables_count_what_was_taken_for_what() -> None:
    gold, guess, labels = [0, 0, 1, 1, 2], [0, 1, 1, 1, 0], ("a", "b", "c")
    assert confusion(gold, guess, labels) == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    table = by_label(gold, guess, labels)
    assert table["b"] == {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(0.8), "support": 2}
    assert table["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert confusion([0, 0], [0, 0], labels) == [[2, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_the_averages_are_those_of_scikit_learns_report() -> None:
    from sklearn.metrics import classification_report

    draw = random.Random(4)
    gold, guess = draw.choices(range(3), (6, 3, 1), k=90), draw.choices(range(3), k=90)
    labels = ("a", "b", "c")
    expected = classification_report(gold, guess, target_names=labels, output_dict=True)
    found = averages(by_label(gold, guess, labels), confusion(gold, guess, labels))
    assert list(found) == ["accuracy", "macro avg", "weighted avg"]
    assert found["accuracy"] == {"f1": pytest.approx(expected["accuracy"]), "support": 90}
    for name in ("macro avg", "weighted avg"):
        row = {key.removesuffix("-score"): value for key, value in expected[name].items()}
        assert found[name] == pytest.approx(row)
    several, other = ([[draw.randint(0, 1) for _ in labels] for _ in range(40)] for _ in range(2))
    expected = classification_report(several, other, target_names=labels, output_dict=True, zero_division=0.0)
    found = averages(by_label(several, other, labels))
    assert list(found) == ["macro avg", "weighted avg"]
    assert found["weighted avg"]["recall"] == pytest.approx(expected["weighted avg"]["recall"])
    empty = averages({"a": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}})
    assert empty["weighted avg"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_losses_are_those_of_torch_summed_over_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator)
    gold = torch.tensor([0, 2, 1, 1, 0])
    weights = torch.tensor([0.5, 2.0, 3.0])
    assert summed_loss(logits, gold, SINGLE) == pytest.approx(float(functional.cross_entropy(logits, gold)) * 5)
    weighted = functional.cross_entropy(logits, gold, weight=weights, reduction="sum")
    assert summed_loss(logits, gold, SINGLE, weights) == pytest.approx(float(weighted))
    several = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]])
    binary = functional.binary_cross_entropy_with_logits(logits, several)
    assert summed_loss(logits, several, MULTI) == pytest.approx(float(binary) * 5)
    real = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert summed_loss(logits[:, :1], real, REGRESSION) == pytest.approx(
        float(functional.mse_loss(logits[:, 0], real)) * 5
    )


def test_scores_and_decisions() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0], [1.0, -3.0, 0.5]])
    assert probabilities(logits, SINGLE).sum(dim=-1).tolist() == pytest.approx([1, 1])
    assert decide(logits, SINGLE) == [1, 0]
    assert decide(logits, MULTI) == [[0, 1, 0], [1, 0, 1]]
    assert decide(logits, MULTI, threshold=0.8) == [[0, 1, 0], [0, 0, 0]]
    assert decide(logits[:, :1], REGRESSION) == [0.0, 1.0]
    assert probabilities(logits[:, :1], REGRESSION).tolist() == [[0.0], [1.0]]


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    gold = [0] * 7 + [1] * 2 + [2]
    task = Task("own", labels=("a", "b", "c"))
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 2]), y=gold)
    assert task.balanced(gold) == pytest.approx(list(expected))
    several = Task("own", labels=("a", "b"), problem_type=MULTI)
    assert several.balanced([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]) == pytest.approx([1 / 3, 3.0])


def test_the_constant_answer_is_taken_from_the_training_rows() -> None:
    single = Task("own", labels=("a", "b"), metrics=("accuracy",))
    assert single.baseline([1, 1, 0], [0, 0, 0, 1]) == {"accuracy": 0.25}
    assert single.baseline([1, 0], [0, 0, 0, 1]) == {"accuracy": 0.75}  # the first label of as many
    real = Task("own", labels=NUMBER, metrics=("pearson",), problem_type=REGRESSION)
    assert real.baseline([1.0, 5.0], [1.0, 2.0, 3.0]) == {"pearson": 0.0}
    several = Task("own", labels=("a", "b"), metrics=("f1_micro",), problem_type=MULTI)
    assert several.baseline([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]) == {"f1_micro": 1.0}


def test_measure_has_the_tasks_metrics_and_the_loss() -> None:
    task = Task("own", labels=NUMBER, metrics=("pearson", "spearman"), problem_type=REGRESSION)
    found = task.measure(list(torch.tensor([[1.0], [2.0], [4.0]])), [1.0, 2.0, 3.0])
    assert list(found) == ["pearson", "spearman", "loss"]
    assert found["loss"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("problem", [SINGLE, MULTI])
def test_thousands_of_labels_make_tables_that_fit(problem: str) -> None:
    """Labels x labels would be 2 GB."""
    count = 4000
    task = Task("own", ("text",), tuple(map(str, range(count))), OWN_METRICS[problem], problem)
    gold: list[Any] = [row % count for row in range(60)]
    if problem == MULTI:
        gold = [[float(label == number) for label in range(count)] for number in gold]
    scores = list(torch.eye(60, count) * 5)
    tables = task.tables(scores, gold)
    assert "confusion" not in tables
    assert len(tables["by_label"]) == count
    assert task.measure(scores, gold)["f1_macro"] >= 0
    assert len(task.balanced(gold)) == count
    assert math.isfinite(task.baseline(gold, gold)["f1_macro"])


def test_f1_of_a_task_is_one_measure_whatever_labels_a_batch_holds() -> None:
    three = Task("own", ("text",), ("a", "b", "c"), OWN_METRICS[SINGLE])
    assert "f1" not in three.metrics  # own labels: the macro average, of two as of more
    from craft_cli.tasks.glue import TASKS

    assert all(len(task.labels) == 2 for task in TASKS.values() if "f1" in task.metrics)
