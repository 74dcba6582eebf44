"""The README's figure, from what the other benchmarks wrote.

python benchmarks/training_step.py --json benchmarks/results/training_step.json
python benchmarks/decompose.py --json benchmarks/results/decompose.json
python benchmarks/end_to_end.py --data-dir DIR --json benchmarks/results/end_to_end.json
python benchmarks/figure.py benchmarks/results benchmarks/speed.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"CRAFT": "#1b6ca8", "LoRA": "#d98c2b", "full": "#9a9a9a", "floor": "#444444"}


def colour(name: str) -> str:
    return next((value for key, value in COLOURS.items() if name.lower().startswith(key.lower())), "#9a9a9a")


def steps(panel: Axes, rows: list[dict[str, Any]], value: str, title: str) -> None:
    """Ratio to the floor of CRAFT and LoRA for each batch size; full fine-tuning is off the scale and written down."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    arms = [name for name in dict.fromkeys(row["arm"] for row in rows) if name not in ("floor", "full")]
    for number, arm in enumerate(arms):
        values = [row[value] for row in rows if row["arm"] == arm]
        places = [place + (number - (len(arms) - 1) / 2) * 0.36 for place in range(len(batches))]
        bars = panel.bar(places, [(value - 1) * 100 for value in values], 0.34, color=colour(arm), label=arm)
        panel.bar_label(bars, [f"{(value - 1) * 100:+.1f}" for value in values], fontsize=8, padding=2)
    full = {row["batch"]: row[value] for row in rows if row["arm"] == "full"}
    panel.set_xticks(
        range(len(batches)), [f"{batch}\nfull {(full[batch] - 1) * 100:+.0f}" for batch in batches], fontsize=8
    )
    panel.axhline(0, color=COLOURS["floor"], linewidth=1)
    panel.margins(y=0.18)
    panel.set_ylabel("% above the floor")
    panel.set_title(title, fontsize=10)
    panel.legend(frameon=False, fontsize=8)


def across(panel: Axes, names: list[str], values: list[float], labels: list[str], title: str) -> None:
    bars = panel.barh(names, values, color=[colour(name) for name in names])
    panel.bar_label(bars, labels, fontsize=8, padding=3)
    panel.invert_yaxis()
    panel.set_xlim(0, max(values) * 1.6)
    panel.tick_params(labelsize=8)
    panel.set_xlabel("seconds")
    panel.set_title(title, fontsize=10)


def main() -> None:
    """Draw four panels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("file")
    given = parser.parse_args()
    read = {name: json.loads((given.results / f"{name}.json").read_text()) for name in ("training_step", "decompose")}
    ended = json.loads((given.results / "end_to_end.json").read_text())["results"]

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    (time, memory), (hosvd, whole) = figure.subplots(2, 2)
    rows = read["training_step"]["results"]["steps"]
    steps(time, rows, "ratio", "Time of a training step, by batch")
    steps(memory, rows, "peak_ratio", "Peak memory of a training step, by batch")

    peers = sorted(read["decompose"]["results"]["peers"], key=lambda row: row["seconds"])
    names = [row["by"].replace("craft", "CRAFT") for row in peers]
    seconds = [row["seconds"] for row in peers]
    across(hosvd, names, seconds, [f"{value:.1f} s" for value in seconds], "HOSVD, four stacks of 12x768x768, float64")

    setting = ended[-1]["setting"]
    mine = [row for row in ended if row["setting"] == setting]
    arms = list(dict.fromkeys(row["arm"] for row in mine))
    times = [statistics.median(row["total"] for row in mine if row["arm"] == arm) for arm in arms]
    best = [statistics.mean(max(row["accuracy"]) for row in mine if row["arm"] == arm) for arm in arms]
    labels = [f"{value:.0f} s, accuracy {reached:.3f}" for value, reached in zip(times, best, strict=True)]
    across(whole, [arm.replace("craft", "CRAFT") for arm in arms], times, labels, f"{setting}, from call to result")
    machine = read["training_step"]["machine"]
    figure.suptitle(f"{machine['gpu'] or str(machine['cores']) + ' CPU cores'}, torch {machine['torch'].split('+')[0]}")
    figure.savefig(given.file, dpi=110)


if __name__ == "__main__":
    main()
