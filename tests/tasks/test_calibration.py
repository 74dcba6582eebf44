"""Calibration against dense formulas, cases by hand and scalings that are known."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from craft_cli.tasks.calibration import COLDEST, HOTTEST, expected_calibration_error, forecast_error, temperature
from craft_cli.tasks.labels import MULTI, NUMBER, REGRESSION
from craft_cli.tasks.sequence_classification import SequenceClassification
from craft_cli.tasks.token_classification import TokenClassification


def dense(probabilities: list[float], right: list[bool]) -> float:
    """The formula as Guo et al. write it: bins (m - 1 / M, m / M], |accuracy - confidence| by their part of the rows."""
    total = 0.0
    for m in range(1, 16):
        inside = [n for n, p in enumerate(probabilities) if (m - 1) / 15 < p <= m / 15]
        if inside:
            accuracy = sum(right[n] for n in inside) / len(inside)
            confidence = sum(probabilities[n] for n in inside) / len(inside)
            total += len(inside) / len(probabilities) * abs(accuracy - confidence)
    return total


def drawn(rows: int, labels: int, *, several: bool = False) -> tuple[Tensor, Tensor]:
    """Logits, and gold that comes true as often as they say."""
    generator = torch.Generator().manual_seed(labels)
    logits = torch.randn(rows, labels, generator=generator, dtype=torch.float64) * 2
    if several:
        return logits, (torch.rand(rows, labels, generator=generator) < torch.sigmoid(logits)).float()
    return logits, torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]


def test_the_error_of_a_case_by_hand() -> None:
    # 0.9 twice, right once: |0.5 - 0.9|; 0.7 once, right: |1 - 0.7|; 0.95 is of another bin and wrong.
    values = torch.tensor([0.9, 0.9, 0.7, 0.95])
    right = torch.tensor([True, False, True, False])
    assert expected_calibration_error(values, right) == pytest.approx((2 * 0.4 + 0.3 + 0.95) / 4)
    assert expected_calibration_error(values, right, bins=1) == pytest.approx(abs(3.45 - 2) / 4)
    assert expected_calibration_error(torch.tensor([0.0, 1.0]), torch.tensor([0, 1])) == 0.0
    assert expected_calibration_error(torch.tensor([]), torch.tensor([])) is None


def test_a_probability_between_two_bins_belongs_to_the_lower() -> None:
    values = torch.tensor([0.5, 0.6, 0.4], dtype=torch.float64)
    right = torch.tensor([0.0, 1.0, 1.0])
    # (0, 0.5]: 0.4 and 0.5, half of them true; (0.5, 1]: 0.6, true.
    assert expected_calibration_error(values, right, bins=2) == pytest.approx((2 * 0.05 + 0.4) / 3)


@pytest.mark.parametrize("labels", [2, 5])
def test_the_error_of_labels_is_that_of_the_dense_formula(labels: int) -> None:
    logits, gold = drawn(400, labels)
    values, right = [], []
    for row, number in zip((3 * logits).tolist(), gold.tolist(), strict=True):
        parts = [math.exp(value - max(row)) for value in row]
        values.append(max(parts) / sum(parts))
        right.append(row.index(max(row)) == number)
    expected = dense(values, right)
    assert expected > 0.05
    assert forecast_error(3 * logits, gold) == pytest.approx(expected)
    assert (forecast_error(logits, gold) or 0) < expected / 2


def test_the_error_of_several_labels_pools_the_forecasts_of_each() -> None:
    logits, gold = drawn(300, 3, several=True)
    values = [1 / (1 + math.exp(-3 * value)) for row in logits.tolist() for value in row]
    expected = dense(values, [bool(it) for row in gold.tolist() for it in row])
    assert expected > 0.05
    assert forecast_error(3 * logits, gold) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("several", [False, True])
def test_a_known_temperature_is_found(scale: float, several: bool) -> None:
    logits, gold = drawn(20_000, 4, several=several)
    found = temperature((scale * logits).float(), gold)
    assert found == pytest.approx(scale, rel=0.03)
    assert temperature(scale * logits / found, gold) == pytest.approx(1, abs=1e-4)  # nothing is left to correct
    error = forecast_error(scale * logits / found, gold)
    assert error is not None
    assert error < 0.01


def test_no_temperature_of_a_fine_grid_has_a_smaller_loss() -> None:
    logits, gold = drawn(60, 3)
    loss = lambda t: float(functional.cross_entropy(2 * logits / t, gold))  # noqa: E731
    found = temperature(2 * logits, gold)
    best = min((COLDEST * (HOTTEST / COLDEST) ** (step / 5000) for step in range(5001)), key=loss)
    assert found == pytest.approx(best, rel=2e-3)
    assert loss(found) <= loss(best)


@pytest.mark.parametrize("gold", [[0, 1, 0], [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
def test_rows_that_cannot_tell_leave_the_temperature_alone(gold: Any) -> None:
    right = torch.tensor([[2.0, -1.0], [-3.0, 0.1], [0.2, -0.1]])
    truth = torch.tensor(gold)
    assert temperature(right, truth) == 1.0  # nothing wrong: the colder the better
    assert temperature(right, torch.zeros_like(truth)) == 1.0  # one outcome
    assert temperature(torch.full((3, 2), torch.nan), truth) == 1.0
    assert temperature(right[:0], truth[:0]) == 1.0
    assert temperature(-right, truth) == pytest.approx(HOTTEST, rel=1e-3)  # always wrong: the less sure the better


# -- tasks --------------------------------------------------------------------------------------------------------------


def test_a_task_measures_and_corrects_what_it_answers() -> None:
    logits, gold = drawn(500, 3)
    single = SequenceClassification("own", labels=("a", "b", "c"))
    scores, labels = list((3 * logits).float()), gold.tolist()
    assert single.calibration(scores, labels) == pytest.approx(forecast_error(3 * logits, gold), abs=1e-5)
    assert single.temperature(scores, labels) == pytest.approx(temperature(3 * logits, gold), rel=1e-4)
    assert single.tables(scores, labels)["ece"] == single.calibration(scores, labels)
    logits, gold = drawn(500, 3, several=True)
    several = SequenceClassification("own", labels=("a", "b", "c"), problem_type=MULTI)
    scores, labels = list((3 * logits).float()), gold.tolist()
    assert several.calibration(scores, labels) == pytest.approx(forecast_error(3 * logits, gold), abs=1e-5)
    assert several.temperature(scores, labels) == pytest.approx(temperature(3 * logits, gold), rel=1e-4)
    real = SequenceClassification("own", labels=NUMBER, problem_type=REGRESSION)
    scores = list(torch.tensor([[1.0], [2.0]]))
    assert (real.calibration(scores, [1.5, 2.0]), real.temperature(scores, [1.5, 2.0])) == (None, 1.0)
    assert real.tables(scores, [1.5, 2.0]) == {}


def test_words_are_forecast_where_they_have_a_token() -> None:
    draw = random.Random(0)
    logits, gold = drawn(200, 3)
    task = TokenClassification(labels=("O", "B-x", "I-x"))
    scores, labels, start = [], [], 0
    while start < len(gold):
        end = start + draw.randint(1, 6)
        unseen = torch.full((1, 3), -torch.inf)  # a word beyond the length, of each sentence
        scores.append(torch.cat([logits[start:end], unseen]))
        labels.append([*gold[start:end].tolist(), 1])
        start = end
    assert task.calibration(scores, labels) == pytest.approx(forecast_error(logits, gold))
    assert task.tables(scores, labels)["ece"] == task.calibration(scores, labels)
    assert task.temperature(scores, labels) == pytest.approx(temperature(logits, gold))
    assert task.calibration([torch.zeros(0, 3)], [[]]) is None
    assert task.temperature([torch.zeros(0, 3)], [[]]) == 1.0
