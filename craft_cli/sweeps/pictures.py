"""Plots of a sweep: scores against trained parameters, and against the learning rate."""

from __future__ import annotations

from pathlib import Path

from craft_cli.plots import scores
from craft_cli.sweeps.table import Results, Row

BY_NUMBERS, BY_RATE = "score_by_numbers.png", "score_by_rate.png"


def draw(folder: Path, results: Results) -> None:
    """Write the plots; the one of the rates only if several were tried."""
    rows = [row for row in results.rows if row.state == "complete" and row.numbers]
    rated = [row for row in rows if row.setting.get("learning_rate", 0) > 0]
    _draw(folder / BY_NUMBERS, results, rows, "trained parameters of the adapter")
    if len({row.setting["learning_rate"] for row in rated}) > 1:
        _draw(folder / BY_RATE, results, rated, "learning rate")


def _draw(path: Path, results: Results, rows: list[Row], across: str) -> None:
    if not rows:
        return
    rate = path.name == BY_RATE
    points = {
        method: [
            {
                "x": row.setting["learning_rate"] if rate else row.numbers,
                "mean": row.mean,
                "std": row.std,
                "chosen": row.chosen,
            }
            for row in rows
            if row.method == method
        ]
        for method in results.methods
    }
    seeds = len(results.seeds)
    over = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else f"seed {results.seeds[0]}"
    scores(
        {method: own for method, own in points.items() if own},
        path,
        across=across,
        up=f"validation {results.metric}",
        title=f"{Path(results.output).name}: {over}",
        lower_is_better=results.lower_is_better,
        envelope=rate and results.sampler == "grid",  # sampled methods have no rates in common
    )
