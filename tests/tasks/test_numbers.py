"""Numbers to learn: of any size, far from zero, all the same; and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import failure, invoke, opinions, write_rows
from helpers import Remember, numbers, own_config
from rich.console import Console

import craft_cli as craft
from craft_cli.data.sources import Split
from craft_cli.errors import DataError, figure
from craft_cli.tasks.labels import NUMBER, REGRESSION, check_numbers
from craft_cli.tasks.problems import units_of
from craft_cli.tasks.sequence_classification import SequenceClassification as Task

Make = Callable[..., Path]
METRICS = ("rmse",)
TASK = Task("own", ("text",), NUMBER, METRICS, REGRESSION, label_column="score")


def data(**changes: float) -> Path:
    for split, count, seed in (("train", 45, 1), ("validation", 23, 2)):
        numbers(Path("data") / f"{split}.jsonl", count, seed, **changes)
    return Path("data")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.0, "1"), (0.66857, "0.6686"), (3.14159, "3.142"), (-0.25, "-0.2500"), (2.1e-9, "2.1e-09"),
        (12345.6, "12,346"), (1700000012.0, "1,700,000,012"), (-3e15, "-3e+15"), (float("nan"), "nan"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_a_number_of_any_size_can_be_read(value: float, text: str) -> None:
    assert figure(value) == text


def test_answers_have_the_digits_that_a_model_computes_with() -> None:
    scores = [torch.tensor([1.23456789e-8]), torch.tensor([1700000128.0])]
    split = Split([("a",), ("b",)], [1e-8, 1700000012.0], "rows")
    rows = list(TASK.records(scores, split))
    assert [row["prediction"] for row in rows] == [1.234568e-8, 1.7e9]
    assert [row["scores"]["score"] for row in rows] == [1.234568e-8, 1.7e9]
    assert [row["label"] for row in rows] == [1e-8, 1700000012.0]
    errors = [row["error"] for _, row in TASK.mistakes(scores, split)]
    assert errors == pytest.approx([2.34568e-9, 116.0], rel=1e-4)
    probable = next(Task("own", labels=("a", "b")).records([torch.tensor([0.0, 20.0])], Split([("a",)], None, "rows")))
    assert probable["scores"] == {"a": 0.0, "b": 1.0}


def test_tiny_and_huge_metrics_are_shown_everywhere(pico: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from craft_cli.cli import console, training_console

    told = StringIO()
    monkeypatch.setattr(console, "err", Console(file=told, width=200, highlight=False))
    with training_console.TrainingConsole() as listener:
        listener.evaluated(0, 0.0, {"mae": 2.1e-9, "loss": 123456.7}, best=True)
    assert "mae 2.1e-09  loss 123,457" in told.getvalue()
    craft.train(own_config(pico(), data(times=2.0**-27), max_steps=2, problem_type="regression"))
    found = craft.evaluate("out", worst=1)
    text = invoke("eval", "out", "--worst", "1").stdout
    for value in (found.metrics["rmse"], found.metrics["loss"], (found.worst or [{}])[0]["prediction"]):
        assert 0 < abs(value) < 1e-4
        assert f"{value:.4g}" in text
    assert f"| {found.metrics['rmse']:.4g} |" in Path("out/adapter/README.md").read_text()
    assert f"{found.metrics['rmse']:.4g}" in invoke("inspect", "--compare", "out", "out").stdout
    answers = invoke("predict", "out", "--input", "data/validation.jsonl").stdout.splitlines()
    assert all(json.loads(line)["prediction"] for line in answers)


@pytest.mark.parametrize("mean", [0.0, 1.7e9])
def test_the_loss_is_the_squared_error_far_from_zero_too(mean: float) -> None:
    gold = [mean + 7 * number for number in range(20)]
    found = TASK.measure([torch.tensor([mean])] * 20, gold)
    assert found["loss"] == pytest.approx(found["rmse"] ** 2)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean([(mean - value) ** 2 for value in gold])), rel=1e-9)


def test_numbers_far_from_zero_are_named_before_the_training(pico: Make) -> None:
    def said(**changes: float) -> list[str]:
        heard = Remember()
        craft.train(own_config(pico(), data(**changes), problem_type="regression", dry_run=True), heard)
        assert heard.plan is not None
        return [line for line in heard.plan.notes if "subtract a constant" in line]

    assert said(plus=1000.0) == []
    (line,) = said(plus=1.7e9)
    assert line.startswith("the numbers in 'score' have a mean of 1.7e+09 and a spread of only 0.5")


@pytest.mark.parametrize("gold", [[0.1] * 10, [0.3, 0.1 + 0.2], [-7.0]])
def test_one_number_alone_is_refused(gold: list[float]) -> None:
    with pytest.raises(DataError, match="has only one number"):
        check_numbers(gold, "score")


@pytest.mark.parametrize("gold", [[1e200, 2e200], [1e-60, 2e-60]])
def test_numbers_beyond_float32_are_refused(gold: list[float]) -> None:
    with pytest.raises(DataError, match=r"float32 cannot represent; use another unit"):
        check_numbers(gold, "score")


def test_a_constant_target_is_refused_before_the_work(pico: Make) -> None:
    rows = [{"text": row["sentence"], "score": 0.1} for row in opinions(12, 1)]
    write_rows(Path("data/train.jsonl"), rows)
    said = failure("train", "--model", str(pico()), "--data-dir", "data", "--use-cpu")
    assert "column 'score' has only one number (0.1) in the training rows; choose another with --label-column" in said


def test_rounding_alone_makes_no_unit() -> None:
    gold = [0.1] * 12
    assert np.std(gold) > 0
    assert units_of(gold)[1] == 1.0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--calibrate",), "--calibrate: a regression predicts numbers, not probabilities"),
        (("--threshold", "0.3"), "--threshold is only for multi-label tasks"),
    ],
)
def test_a_setting_without_effect_on_numbers_is_refused(flags: Any, told: str, pico: Make) -> None:
    said = failure("train", "--model", str(pico()), "--data-dir", str(data()), "--use-cpu", *flags)
    assert told in said


def test_a_threshold_for_one_label_a_row_is_refused(pico: Make, data_dir: Path) -> None:
    given = ("--model", str(pico()), "--use-cpu", "--threshold", "0.3")
    assert "--threshold is only for multi-label" in failure(
        "train", *given, "--task", "sst2", "--data-dir", str(data_dir)
    )
    Path("words.conll").write_text("a O\nfilm B-x\n\nthe O\n")
    assert "a word has one tag" in failure(
        "train", *given, "--train-file", "words.conll", "--validation-file", "words.conll"
    )


def test_weights_are_advised_where_they_would_change_something() -> None:
    missed = {"by_label": {"a": {"support": 3, "f1": 0.0}, "b": {"support": 3, "f1": 0.9}}}
    task = Task("own", labels=("a", "b"))
    even, uneven = ([0] * 5 + [1] * 6, [0] * 2 + [1] * 9)
    assert ["--class-weights" in line for line in task.remarks(missed, even, weighted=False)] == [False]
    assert ["--class-weights" in line for line in task.remarks(missed, uneven, weighted=False)] == [True]
    several = Task("own", labels=("a", "b"), problem_type="multi_label_classification")
    rare = [[1.0, 0.0], [0.0, 1.0], *[[0.0, 0.0]] * 8]  # alike, and all of them rare
    assert ["--class-weights" in line for line in several.remarks(missed, rare, weighted=False)] == [True]
