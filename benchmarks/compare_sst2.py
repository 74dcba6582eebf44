"""CRAFT against the head alone on SST-2 phrases, several seeds, with the real model of the quickstart.

    python benchmarks/compare_sst2.py DATA_DIR [--seeds 42,1,2] [--rows 8000] [--epochs 2] [--json FILE]

DATA_DIR holds train.jsonl and validation.jsonl in GLUE's columns. Prints the table that stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from craft_cli import RunConfig, train

ARMS: dict[str, dict[str, Any]] = {"head only": {"learning_rate": 0.0}, "CRAFT 64,64,6": {}}


def main() -> None:
    """Train every arm with every seed and print accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir")
    parser.add_argument("--seeds", default="42,1,2")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ranks", default="64,64,6")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]

    table: list[dict[str, Any]] = []
    for arm, changes in ARMS.items():
        reached, seconds, numbers = [], [], 0
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                settings = {
                    "model": arguments.model, "task": "sst2", "data_dir": arguments.data_dir, "ranks": arguments.ranks,
                    "max_train_samples": arguments.rows, "num_train_epochs": arguments.epochs, "seed": seed,
                    "output_dir": f"{folder}/run",
                }  # fmt: skip
                result = train(RunConfig.build(settings | changes))
            reached.append(result.metrics["accuracy"])
            seconds.append(result.seconds)
            numbers = result.parameters["head"] + (0 if changes else result.parameters["adapter"])
        table.append({"arm": arm, "trained": numbers, "accuracy": reached, "seconds": seconds})

    print(f"| trained | numbers | accuracy, seeds {arguments.seeds} | mean | seconds |\n|---|---|---|---|---|")
    for row in table:
        each = ", ".join(f"{value:.3f}" for value in row["accuracy"])
        mean, time = statistics.mean(row["accuracy"]), statistics.mean(row["seconds"])
        print(f"| {row['arm']} | {row['trained']:,} | {each} | {mean:.3f} | {time:.0f} |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
