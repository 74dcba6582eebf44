"""Plots: every picture is written, whatever the names in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from craft_cli.plots import curve_figure, svg, training_curve

LINES = [{"step": 1, "loss": 0.7}, {"step": 1, "epoch": 1.0, "eval_loss": 0.6, "eval_accuracy": 0.5}]


@pytest.mark.parametrize("title", ["m$x_$1", "bert$\\frac$", "a$b$c"])
def test_names_are_no_formulas(title: str) -> None:
    training_curve(LINES, "accuracy", Path("curve.png"), title, {title: {"accuracy": 0.5}}, 1.0)
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    drawn = svg(curve_figure(LINES, "accuracy", title, {title: {"accuracy": 0.5}}, 1.0)).decode()
    assert title.replace("_", " ") in drawn
