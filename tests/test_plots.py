"""Plots: every picture is written, whatever the names in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from craft_cli.plots import curve_figure, scores, svg, training_curve

LINES = [{"step": 1, "loss": 0.7}, {"step": 1, "epoch": 1.0, "eval_loss": 0.6, "eval_accuracy": 0.5}]


@pytest.mark.parametrize("title", ["m$x_$1", "bert$\\frac$", "a$b$c"])
def test_names_are_no_formulas(title: str) -> None:
    training_curve(LINES, "accuracy", Path("curve.png"), title, {title: {"accuracy": 0.5}}, 1.0)
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    drawn = svg(curve_figure(LINES, "accuracy", title, {title: {"accuracy": 0.5}}, 1.0)).decode()
    assert title.replace("_", " ") in drawn


@pytest.mark.parametrize(
    "numbers",
    [[16456], [15360, 15966, 16456], [15360, 18432], [15966, 18432, 39915, 40368], [1000, 30000], [10, 11, 900]],
)
def test_the_axis_of_numbers_has_labels(numbers: list[int]) -> None:
    points = {"craft": [{"x": number, "mean": 0.7, "std": None, "chosen": False} for number in numbers]}
    scores(points, Path("scores.svg"), across="numbers", up="accuracy", title="sweep", lower_is_better=False)
    axis, _, _ = Path("scores.svg").read_text().partition('id="matplotlib.axis_2"')
    labels = [int(label.replace(",", "")) for label in re.findall(r"<!-- ([\d,]+) -->", axis)]
    assert any(0.8 * numbers[0] <= label <= 1.2 * numbers[-1] for label in labels)
    assert len(labels) >= min(len(set(numbers)), 2)
