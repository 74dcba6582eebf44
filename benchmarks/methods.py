"""The methods beside each other at equal numbers, each at the best of its rates: sweeps of craft.

    python benchmarks/methods.py --data-dir DIR --json FILE --work FOLDER [--data sst2,mrpc] [--methods A,B] [--sizes 16k,41k]
        [--seeds 2,3,4] [--rows 1000] [--epochs 4] [--batch 32] [--jobs 2] [--model demo] [--bf16]
        [--choose loss] [--table] [--plot FILE]

For each data set, size and method a sweep over rates with seed 1 chooses the rate, and each run its update, by the loss (or
`--choose accuracy`) on a fifth of the training rows, held out; where the best rate lies at an edge, the next one is tried
too, twice at most. Runs of other seeds at that rate are then scored on GLUE's validation rows, which nothing was chosen on.
Training rows are a seeded, stratified draw of DIR's, as in own_data.py. All runs have the same rows in the same order, the
same head and start, and `--epochs` epochs. Sizes are about 16,500 and 41,000 numbers in the adapter of the demo model, and
LoRA r=8, the reference, with 73,728. `base` is about 41,000 numbers in an adapter of RoBERTa-base's shape, for
`--model MODEL_FOLDER --sizes base`; the name of the folder stands in the table.

FOLDER keeps the sweeps, and FILE every finished cell: called again, only what is missing is run. `--table` prints what there is.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
from own_data import DATA, rows_of

import craft_cli as craft
from craft_cli.api.sweep import SweepOptions, sweep
from craft_cli.data.sources import DataSource
from craft_cli.plots import scores
from craft_cli.training.run import Run

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "16k": {
        "craft": {"ranks": "64,64,6"}, "lora": {"rank": 2}, "pissa": {"rank": 2}, "lora-xs": {"rank": 37},
        "lotr": {"rank": 16}, "superlora": {"rank": 6},
    },
    "41k": {
        "craft": {"ranks": "100,100,6"}, "lora": {"rank": 4}, "pissa": {"rank": 4}, "lora-xs": {"rank": 58},
        "lotr": {"rank": 34}, "superlora": {"rank": 15},
    },
    "reference": {"lora": {"rank": 8}},
    "base": {
        "craft": {"ranks": "100,100,12"}, "lora": {"rank": 1}, "pissa": {"rank": 1}, "lora-xs": {"rank": 41},
        "lotr": {"rank": 20}, "superlora": {"rank": 5},
    },
}  # fmt: skip
RATES = {
    "craft": (1e-3, 3e-3, 1e-2, 3e-2), "lora": (3e-4, 1e-3, 3e-3, 1e-2), "pissa": (1e-4, 3e-4, 1e-3, 3e-3),
    "lora-xs": (1e-3, 3e-3, 1e-2, 3e-2), "lotr": (3e-4, 1e-3, 3e-3, 1e-2), "superlora": (1e-3, 3e-3, 1e-2, 3e-2),
}  # fmt: skip
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
BEYOND = 2
"""Rates tried beyond an edge of the grid."""


def main() -> None:
    """Run the missing cells and print the tables."""
    given = measure.arguments(
        __doc__,
        data_dir={"type": Path}, work={"type": Path}, data={"default": "sst2,mrpc"}, methods={}, model={"default": "demo"},
        sizes={"default": "16k,reference,41k"}, seeds={"default": "2,3,4"}, rows={"type": int, "default": 1000},
        epochs={"type": float, "default": 4.0}, batch={"type": int, "default": 32},
        jobs={"type": int, "default": 1}, bf16={"action": "store_true"},
        choose={"default": "loss", "choices": ("loss", "accuracy")}, table={"action": "store_true"}, plot={},
    )  # fmt: skip
    done = json.loads(given.json.read_text())["results"] if given.json and given.json.exists() else []
    about = {"model": Path(given.model).name, "rows": given.rows}
    about |= {name: getattr(given, name) for name in ("epochs", "batch", "bf16", "choose")}
    cells = [
        about | {"data": data, "size": size, "method": method}
        for data in given.data.split(",")
        for size in given.sizes.split(",")
        for method in SIZES[size]
        if not given.methods or method in given.methods.split(",")
    ]
    for cell in [] if given.table else cells:
        if not any(all(row[name] == value for name, value in cell.items()) for row in done):
            done = [*done, run(cell, given)]
            if given.json:
                measure.write(given.json, done)
    tables(done, given)


def run(cell: dict[str, Any], given: Any) -> dict[str, Any]:
    """A cell: its rate, and its scores on the test rows."""
    folder = given.work / f"{cell['model']}-{cell['data']}-{cell['rows']}"
    files = {part: folder / f"{part}.jsonl" for part in ("train", "test")}
    if not files["test"].exists():
        _write_rows(cell, files, given.data_dir)
    options = SIZES[cell["size"]][cell["method"]]
    recipe = {
        "model": given.model, "train_file": str(files["train"]), "validation_share": 0.2, "method": cell["method"],
        "num_train_epochs": given.epochs, "per_device_train_batch_size": given.batch, "bf16": given.bf16, "use_cpu": True,
        "metric_for_best_model": given.choose, **options,
    }  # fmt: skip
    name = f"{cell['size']}-{cell['method']}"
    by_rate: dict[float, float] = {}
    rates: Sequence[float] = RATES[cell["method"]]
    for _ in range(1 + BEYOND):
        by_rate |= _held_out(folder / f"{name}-{rates[0]:g}", recipe, rates, (1,), given.jobs)
        best = (min if given.choose == "loss" else max)(by_rate, key=lambda rate: by_rate[rate])
        edge = {min(by_rate): -1, max(by_rate): 1}.get(best)
        if edge is None:
            break
        rates = (LADDER[LADDER.index(best) + edge],)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    last = folder / f"{name}-best"
    _held_out(last, recipe, (best,), seeds, given.jobs)
    runs = [Run(path) for path in sorted((last / "runs").iterdir()) if path.is_dir() and not path.is_symlink()]
    if len(runs) != len(seeds):
        raise SystemExit(f"{last / 'runs'} holds {len(runs)} runs, not one for each of the seeds {seeds}")
    found = [
        craft.evaluate(run.path, source=DataSource(validation_file=str(files["test"])), use_cpu=True).metrics
        for run in runs
    ]
    results = [run.results() for run in runs]
    result = cell | {
        "rate": best, "by_rate": {f"{rate:g}": score for rate, score in sorted(by_rate.items())}, "seeds": seeds,
        "numbers": results[0]["parameters"]["adapter"], "metrics": {metric: [one[metric] for one in found] for metric in found[0]},
        "validation": [one["metrics"]["loss"] for one in results],
        "seconds": statistics.mean(one["seconds"] for one in results),
    }  # fmt: skip
    print(time.strftime("%H:%M:%S"), json.dumps(result), file=sys.stderr, flush=True)
    return result


def _held_out(
    folder: Path, recipe: dict[str, Any], rates: Sequence[float], seeds: Sequence[int], jobs: int
) -> dict[float, float]:
    """The score on the held-out rows at each rate, of a sweep that goes on where it stopped."""
    found = sweep(
        SweepOptions(
            recipe=recipe, sets=[f"learning_rate={','.join(f'{rate:g}' for rate in rates)}"], seeds=seeds, jobs=jobs,
            output_dir=str(folder), resume=folder.exists(),
        )
    )  # fmt: skip
    return {row.setting["learning_rate"]: row.mean for row in found.rows if row.mean is not None}


def _write_rows(cell: dict[str, Any], files: dict[str, Path], data_dir: Path) -> None:
    task = DATA[cell["data"]]
    for part, rows in zip(("train", "test"), rows_of(cell["data"], str(cell["rows"]), 0, data_dir), strict=True):
        lines = [dict(zip(task.columns, texts, strict=True)) | {"label": gold} for texts, gold in rows]
        files[part].parent.mkdir(parents=True, exist_ok=True)
        files[part].write_text("".join(json.dumps(line) + "\n" for line in lines))


def tables(done: Sequence[dict[str, Any]], given: Any) -> None:
    """For each model and data set a table, and a picture of the first metric against the numbers trained."""
    for model, data in dict.fromkeys((row["model"], row["data"]) for row in done):
        mine = [row for row in done if (row["model"], row["data"]) == (model, data)]
        first = "accuracy"
        precision = "bf16" if mine[0]["bf16"] else "float32"
        about = f"{model}, {data}, {mine[0]['rows']:,} rows, {precision}, chosen by {mine[0]['choose']}"
        print(f"\n{about}, {first} on the test rows, seeds {mine[0]['seeds']}:\n")
        measure.table(
            ("size", "method", "numbers", "rate", first, "macro F1", "held-out loss", "seconds"),
            [
                (
                    row["size"], row["method"], f"{row['numbers']:,}", f"{row['rate']:g}", _spread(row["metrics"][first], 100, 1),
                    _spread(row["metrics"]["f1_macro"], 100, 1), _spread(row["validation"], 1, 3), f"{row['seconds']:.0f}",
                )
                for row in mine
            ],
        )  # fmt: skip
        if given.plot:
            points: dict[str, list[dict[str, Any]]] = {}
            for row in mine:
                values = row["metrics"][first]
                std = statistics.stdev(values) if len(values) > 1 else None
                point = {"x": row["numbers"], "mean": statistics.mean(values), "std": std, "chosen": ""}
                points.setdefault(row["method"], []).append(point)
            path = Path(given.plot).with_stem(f"{Path(given.plot).stem}_{model}_{data}")
            title = f"{model}, {data}, {mine[0]['rows']:,} rows: mean and standard deviation of {len(mine[0]['seeds'])} seeds"
            scores(points, path, across="numbers trained in the adapter", up=f"test {first}", title=title,
                   lower_is_better=False, envelope=False)  # fmt: skip


def _spread(values: Sequence[float], factor: float, digits: int) -> str:
    std = f" ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * statistics.mean(values):.{digits}f}{std}"


if __name__ == "__main__":
    main()
