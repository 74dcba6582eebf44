"""Stands in for `craft train` in tests of sweeps: the same flags, files, signals and endings, but no model and no torch.

Its scores are a function of the recipe. A model called code is refused without
--trust-remote-code. A learning rate of 7 makes the loss nan, 8 kills the process, 9 needs too much memory.
A line of the file named by PRETEND_LOG tells of each start: the run, and the update that it goes on from.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

EVERY = 4
"""Evaluate every this many updates."""


def score(recipe: dict[str, Any], step: int) -> float:
    """It rises to its end; it is highest at a rate of 1e-2, grows with the rank and depends a little on the seed."""
    fitting = 0.3 * abs(math.log10(recipe["learning_rate"]) + 2)
    size = 0.01 * (recipe.get("rank", 0) or int(str(recipe.get("ranks", "0")).split(",")[0]))
    return round(min(step, 12) / 12 * max(0.9 - fitting + size, 0.1) + 0.001 * recipe["seed"], 6)


def measured(recipe: dict[str, Any], step: int) -> dict[str, float]:
    return {"accuracy": score(recipe, step), "loss": 2 - score(recipe, step)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe")
    parser.add_argument("--output-dir")
    parser.add_argument("--cache-dir")
    for name in ("resume", "overwrite", "json", "dry-run", "trust-remote-code"):
        parser.add_argument(f"--{name}", action="store_true")
    asked = parser.parse_args()
    recipe = yaml.safe_load(Path(asked.recipe).read_text())
    if recipe["model"].endswith("code") and not asked.trust_remote_code:
        sys.exit("error: it needs Python code of its own")
    rate, last = recipe["learning_rate"], recipe["max_steps"]
    numbers = {"adapter": 100 * (recipe.get("rank") or 1), "head": 50}
    if asked.dry_run:
        print(json.dumps({"parameters": numbers, "estimate": 2.0}))
        return

    run = Path(asked.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    state, metrics = run / "checkpoints", run / "metrics.jsonl"
    steps = [int(path.name[5:]) for path in state.glob("step-*")] if asked.resume else []
    step = max(steps, default=0)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with open(os.environ["PRETEND_LOG"], "a") as log:
        log.write(f"{run.name} {step} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")

    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    lines = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= step] if steps else []
    metrics.write_text("".join(f"{line}\n" for line in lines))
    while True:
        if step % EVERY == 0 and not (lines and json.loads(lines[-1])["step"] == step):
            lines.append(
                json.dumps({"step": step} | {f"eval_{name}": value for name, value in measured(recipe, step).items()})
            )
            with open(metrics, "a") as file:
                file.write(f"{lines[-1]}\n")
        if stopped or os.getppid() != int(os.environ["CRAFT_LAUNCHER_PID"]) or step % EVERY == 0:
            (state / f"step-{step}").mkdir(parents=True, exist_ok=True)
        if stopped or os.getppid() != int(os.environ["CRAFT_LAUNCHER_PID"]):
            sys.exit(143)
        if step == last:
            break
        time.sleep(float(os.environ.get("PRETEND_SECONDS", "0")))
        step += 1
        if rate == 7:
            sys.exit(f"error: the loss is nan at update {step}: start again with a lower --learning-rate")
        if rate == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        if rate == 9:
            sys.exit("error: unexpected OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB")
    results = {
        "metric": "accuracy",
        "metrics": measured(recipe, step),
        "parameters": numbers,
        "epoch": 1.0,
        "updates": step,
        "seconds": 1.5,
    }
    (run / "all_results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
