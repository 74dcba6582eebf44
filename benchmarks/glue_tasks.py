"""CRAFT with the default settings on GLUE tasks of several kinds, with the real model of the quickstart.

    python benchmarks/glue_tasks.py DATA_DIR [--tasks mrpc,cola,stsb] [--seed 42] [--json FILE]

DATA_DIR holds a folder for each task with train.jsonl and validation.jsonl in GLUE's columns. Prints the table that
stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from craft_cli import RunConfig, train


def main() -> None:
    """Train on every task and print its metrics beside those of a constant answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir")
    parser.add_argument("--tasks", default="mrpc,cola,stsb")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--max-train-samples", type=int)
    parser.add_argument("--json")
    arguments = parser.parse_args()

    table: list[dict[str, Any]] = []
    for task in arguments.tasks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "model": arguments.model, "task": task, "data_dir": f"{arguments.data_dir}/{task}",
                "max_train_samples": arguments.max_train_samples, "seed": arguments.seed, "output_dir": f"{folder}/run",
            }  # fmt: skip
            result = train(RunConfig.build(settings))
        metrics = {name: value for name, value in result.metrics.items() if name != "loss"}
        table.append(
            {
                "task": task,
                "metrics": metrics,
                "baseline": next(iter(result.baselines["same_answer"].values())),
                "seconds": result.seconds,
            }
        )
        print(f"{task}: {metrics}", flush=True)

    print("| task | metrics, best epoch of 3 | first metric for always the same answer | seconds |\n|---|---|---|---|")
    for row in table:
        each = ", ".join(f"{name} {value:.3f}" for name, value in row["metrics"].items())
        print(f"| {row['task']} | {each} | {row['baseline']:.3f} | {row['seconds']:.0f} |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
