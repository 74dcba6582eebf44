"""The linear probe against its own objective, written down again, and against scikit-learn's and the normal equations."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from craft_cli.tasks import probe
from craft_cli.tasks.labels import MULTI, REGRESSION, SINGLE
from craft_cli.tasks.probe import fit_labels, fit_numbers, fit_several
from craft_cli.tasks.problems import best_threshold, constant_answer, units_of
from craft_cli.tasks.sequence_classification import SequenceClassification as Task


def rows(count: int = 60, width: int = 7, labels: int = 3) -> tuple[Any, Any]:
    """Features of very different sizes, and labels that they tell something of."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(count, width)) * np.logspace(-1, 1, width) + 3
    scores = (features - 3) @ draw.normal(size=(width, labels)) + draw.normal(size=(count, labels))
    return features, scores.argmax(axis=1)


def one_penalty(monkeypatch: pytest.MonkeyPatch, penalty: float) -> None:
    monkeypatch.setattr(probe, "PENALTIES", (penalty,))


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
def test_the_objective_is_at_its_lowest(
    labels: int, bias: bool, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean cross-entropy plus half the penalty times the squared norm, on features whose variances have the mean 1."""
    one_penalty(monkeypatch, 0.05)
    features, gold = rows(labels=labels)
    factors = [1.0, 2.5, 0.5][:labels] if weighed else []
    found = fit_labels(features, gold, labels, factors=factors, bias=bias)
    mean = features.mean(axis=0) if bias else np.zeros(7)
    scale = np.sqrt(((features - mean) ** 2).mean())
    x, y = torch.tensor((features - mean) / scale), torch.tensor(gold)
    weights = torch.tensor(factors, dtype=torch.float64)[y] if weighed else torch.ones(60, dtype=torch.float64)

    def objective(weight: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        losses = functional.cross_entropy(x @ weight.T + start, y, reduction="none")
        # of two labels scikit-learn holds the difference of their weights
        norm = (weight**2).sum() if labels > 2 else ((weight[1] - weight[0]) ** 2).sum()
        return (weights * losses).sum() / weights.sum() + 0.05 / 2 * norm

    weight = torch.tensor(found.weight * scale, requires_grad=True)
    start = torch.tensor(found.bias + found.weight @ mean, requires_grad=bias)
    reached = objective(weight, start)
    optimizer = torch.optim.LBFGS([weight, start] if bias else [weight], max_iter=500, tolerance_grad=1e-10)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = objective(weight, start)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert reached.item() == pytest.approx(objective(weight, start).item(), abs=1e-6)
    assert bias or not found.bias.any()


def test_numbers_are_the_ridge_of_the_normal_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    one_penalty(monkeypatch, 0.3)
    features, _ = rows()
    gold = 1000 + 40 * features[:, 2] + np.random.default_rng(1).normal(size=60)
    found = fit_numbers(features, gold)
    mean = features.mean(axis=0)
    scale = np.sqrt(((features - mean) ** 2).mean())
    x = (features - mean) / scale
    solved = np.linalg.solve(x.T @ x + 0.3 * 60 * np.eye(7), x.T @ (gold - gold.mean()))
    np.testing.assert_allclose(found.weight[0] * scale, solved, rtol=1e-8)
    np.testing.assert_allclose(found(features)[:, 0], gold.mean() + x @ solved, rtol=1e-8)
    assert not fit_numbers(features, gold, bias=False).bias.any()


def test_each_of_several_labels_is_told_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    one_penalty(monkeypatch, 0.05)
    features, gold = rows()
    table = np.stack([gold == 0, gold != 1, np.ones(60)], axis=1).astype(float)
    found = fit_several(features, table)
    for label in (0, 1):
        alone = fit_labels(features, table[:, label].astype(int), 2)
        np.testing.assert_allclose(found.weight[label], alone.weight[1] - alone.weight[0])
    assert not found.weight[2].any()  # it applies to all
    assert found.bias[2] == pytest.approx(np.log(61))
    heavy = fit_several(features, table, factors=[5.0, 1.0, 1.0])
    assert (heavy(features)[:, 0] > 0).sum() > (found(features)[:, 0] > 0).sum()


def test_the_penalty_follows_how_much_the_features_tell() -> None:
    features, gold = rows(400)
    noise = np.random.default_rng(2).permutation(gold)
    told, untold = fit_labels(features, gold, 3), fit_labels(features, noise, 3)
    assert np.linalg.norm(untold.weight * features.std(axis=0)) < 0.1 * np.linalg.norm(
        told.weight * features.std(axis=0)
    )


def test_a_label_without_rows_is_never_the_answer_and_odd_features_do_no_harm() -> None:
    features, gold = rows()
    features[:, 1] = 7.0  # never changes
    found = fit_labels(features, gold * 2, 6)  # of 0 to 5 only 0, 2, 4 have rows
    assert set(found(features).argmax(axis=1)) <= {0, 2, 4}
    assert np.isfinite(found.weight).all()
    alone = fit_labels(features[:1], gold[:1], 3)
    assert not alone.weight.any()
    assert np.isfinite(fit_numbers(features[:1], [3.0]).bias).all()


def test_a_head_in_another_order_gets_its_own_rows() -> None:
    features, gold = rows()
    x = [torch.tensor(row) for row in features]
    plain = Task(labels=("a", "b", "c")).fit_head(x, gold.tolist(), bias=True)
    turned = Task(labels=("a", "b", "c"), head=("c", "a", "b")).fit_head(x, gold.tolist(), bias=True)
    assert torch.equal(turned[0], plain[0][[2, 0, 1]])
    assert torch.equal(turned[1], plain[1][[2, 0, 1]])


def test_the_threshold_is_the_best_of_a_hundred() -> None:
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(3)
    gold = (draw.random((80, 3)) < 0.2).astype(float)
    logits = torch.tensor(gold * 1.5 - 2.5 + draw.normal(size=gold.shape))
    found = best_threshold(logits, gold.tolist())
    scores = {t: f1_score(gold, torch.sigmoid(logits).numpy() > t, average="micro") for t in np.arange(1, 100) / 100}
    assert f1_score(gold, torch.sigmoid(logits).numpy() > found, average="micro") == pytest.approx(max(scores.values()))
    assert found < 0.5
    assert best_threshold(torch.tensor([[9.0, -9.0]]), [[1.0, 0.0]]) == 0.5


def test_the_same_answer_to_all_is_the_best_one() -> None:
    assert constant_answer([1, 1, 0], SINGLE) == 1
    assert constant_answer([0, 1], SINGLE) == 0
    assert constant_answer([1.0, 5.0], REGRESSION) == 3.0
    table = [[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 1]]  # the first two: F1 10/13; the first alone 6/10
    assert constant_answer(table, MULTI) == [1, 1, 0]


def test_units_are_a_power_of_two() -> None:
    assert units_of([1000.0, 1006.0]) == (1003.0, 4.0)
    assert units_of([0.25, 0.75]) == (0.5, 0.25)
    assert units_of([3.0, 3.0]) == (3.0, 1.0)


@pytest.mark.filterwarnings("error")
def test_scikit_learns_warnings_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more labels than half the rows, and of a fit that ends before it converges."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    one_penalty(monkeypatch, 1e-9)
    features = rows()[0] * 1e3
    gold = np.arange(60) % 40
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        LogisticRegression(C=1e7, max_iter=2).fit(features, gold)
    assert ConvergenceWarning in {warning.category for warning in told}  # newer ones warn of the labels, too
    found = fit_labels(features, gold, 40)
    assert np.isfinite(found.weight).all()


@pytest.mark.parametrize("kind", ["labels", "several", "numbers"])
def test_the_fits_are_told_one_by_one(kind: str) -> None:
    features, gold = rows()
    told: list[tuple[int, int]] = []
    hear = lambda done, total: told.append((done, total))  # noqa: E731
    fits = 5 * len(probe.PENALTIES) + 1
    if kind == "several":
        fit_several(features, np.stack([gold == 0, np.ones(60), gold == 1], axis=1).astype(float), progress=hear)
        expected = [*range(1, fits + 1), *range(2 * fits + 1, 3 * fits + 1)]  # none of a label that all rows have
        assert told == [(done, 3 * fits) for done in expected]
        return
    fit_labels(features, gold, 3, progress=hear) if kind == "labels" else fit_numbers(
        features, gold * 1.0, progress=hear
    )
    assert told == [(done, fits) for done in range(1, fits + 1)]


def test_a_training_shows_them() -> None:
    from craft_cli.training.head import LastLayer, Prepared
    from craft_cli.training.head import probe as fit_head

    features, gold = rows()
    told: list[tuple[str, int, int]] = []

    class Rows:
        labels = gold.tolist()

    class Last(LastLayer):
        layer = torch.nn.Linear(7, 3)

        def __init__(self) -> None:
            pass

        def features(self, *arguments: Any) -> Any:
            return [torch.tensor(row) for row in features]

    prepared = Prepared.__new__(Prepared)
    prepared.train, prepared.task = Rows(), Task(labels=("a", "b", "c"))  # type: ignore[assignment]
    prepared.checkpoint = type("Base", (), {"name": "base"})()
    fit_head(prepared, Last(), 8, torch.device("cpu"), lambda *what: told.append(what))
    assert {what for what, _, _ in told} == {"fitting the head"}
    assert len(told) == 5 * len(probe.PENALTIES) + 3
    assert told[-1][1] == told[-1][2]
