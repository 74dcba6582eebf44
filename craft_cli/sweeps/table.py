"""The results of a sweep: one row per setting, one per run, the best settings, and notes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from craft_cli.data.writers import csv_line
from craft_cli.errors import FileError
from craft_cli.files import read_json, write_bytes, write_json
from craft_cli.sweeps.plan import PLAN_FILE, Plan
from craft_cli.sweeps.studies import Tried
from craft_cli.tasks.metrics import lower_is_better

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Row:
    """The results of one setting.

    Attributes:
        trial: name of the trial, which its run folders start with.
        method: value of `--method`.
        state: `complete`, `failed`, `pruned`, `running` or `waiting`.
        setting: its settings.
        numbers: trained parameters of the adapter.
        mean: mean of the metric over the finished seeds; for a pruned setting, its best evaluation.
        std: standard deviation over these seeds (with n - 1); None for a single seed.
        n: number of finished seeds.
        seconds: mean seconds per run.
        chosen: `best`, `best of METHOD`, or empty.
        test: `mean`, `std` and `n` on the test rows, for chosen settings.
        reason: why it failed or was pruned.
    """

    trial: str
    method: str
    state: str
    setting: Mapping[str, Any]
    numbers: int | None = None
    mean: float | None = None
    std: float | None = None
    n: int = 0
    seconds: float | None = None
    chosen: str = ""
    test: Mapping[str, Any] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Results:
    """The results of a sweep so far.

    Attributes:
        output: folder of the sweep.
        metric: metric on the validation rows that chooses the best setting.
        lower_is_better: whether lower values of the metric are better.
        sampler: `grid`, `random` or `tpe`.
        pruner: `none`, `median` or `hyperband`.
        methods: compared methods.
        varied: settings that differ, without the method.
        seeds: seeds of each setting.
        rows: one entry per setting, the best first, those without a score at the end.
        runs: one entry per run.
        notes: notes for the user.
        test_file: file of the test rows.
    """

    output: str
    metric: str
    lower_is_better: bool
    sampler: str
    pruner: str
    methods: Sequence[str]
    varied: Sequence[str]
    seeds: Sequence[int]
    rows: Sequence[Row]
    runs: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = field(default_factory=list)
    test_file: str | None = None

    @property
    def best(self) -> Row | None:
        """The best setting; None until one is complete."""
        return next((row for row in self.rows if row.chosen == "best"), None)

    @property
    def done(self) -> int:
        """Settings that are complete, failed or pruned."""
        return sum(row.state not in ("running", "waiting") for row in self.rows)


def collect(output: str, plan: Plan, trials: Sequence[Tried], tests: Mapping[str, Mapping[str, Any]]) -> Results:
    """Build the tables.

    Args:
        output: folder of the sweep.
        plan: plan of the sweep.
        trials: all trials.
        tests: test results of each method's chosen setting, from `test_record`.
    """
    lower = lower_is_better(plan.metric)
    sign = 1 if lower else -1
    rows = sorted(
        map(_row, trials),
        key=lambda row: (row.state != "complete", row.mean is None, sign * (row.mean or 0), row.numbers or 0),
    )
    seen: set[str] = set()
    marked = []
    for row in rows:
        if row.state == "complete" and row.method not in seen:
            row = _with(row, chosen=f"best of {row.method}" if seen else "best")
            seen.add(row.method)
            if tests.get(row.method, {}).get("trial") == row.trial:
                row = _with(row, test=_spread(tests[row.method]["scores"].values()))
        marked.append(row)
    runs = [{"trial": trial.name, "method": trial.method, "setting": dict(trial.setting), **run}
            for trial in trials for run in trial.runs]  # fmt: skip
    files = [test["file"] for test in tests.values() if test]
    return Results(
        output=output,
        metric=plan.metric,
        lower_is_better=lower,
        sampler=plan.sampler,
        pruner=plan.pruner,
        methods=plan.methods,
        varied=plan.varied,
        seeds=list(plan.seeds),
        rows=marked,
        runs=runs,
        notes=_notes(plan, marked),
        test_file=files[0] if files else None,
    )


def _row(trial: Tried) -> Row:
    finished = [run for run in trial.runs if run["state"] == "finished"]
    scored = finished or [run for run in trial.runs if run["score"] is not None]
    spread = _spread(run["score"] for run in scored) if scored else {}
    return Row(
        trial.name,
        trial.method,
        trial.state,
        trial.setting,
        numbers=finished[0]["parameters"]["adapter"] if finished else None,
        mean=spread.get("mean"),
        std=spread.get("std"),
        n=len(finished),
        seconds=fmean(run["seconds"] for run in finished) if finished else None,
        reason=next((run["reason"] for run in trial.runs if run["reason"]), ""),
    )


def _with(row: Row, **changes: Any) -> Row:
    return Row(**{**vars(row), **changes})


def _spread(scores: Iterable[float]) -> dict[str, Any]:
    scores = list(scores)
    return {"mean": fmean(scores), "std": stdev(scores) if len(scores) > 1 else None, "n": len(scores)}


def _notes(plan: Plan, rows: Sequence[Row]) -> list[str]:
    notes = []
    rate = "learning_rate"
    if len(rows) > 1 and rate not in plan.varied and (len(plan.methods) > 1 or plan.varied):
        notes.append(
            "all settings use one learning rate, but fair comparisons tune the rate of each (arXiv 2602.04998); "
            "add --set learning_rate=..."
        )
    for row in rows:
        if row.chosen and rate in row.setting and plan.sampler == "grid":
            tried = sorted({other.setting[rate] for other in rows if other.method == row.method})
            levels = {other.mean for other in rows if other.method == row.method and other.n}
            if len(tried) > 1 and len(levels) > 1 and row.setting[rate] in (tried[0], tried[-1]):
                edge = "lowest" if row.setting[rate] == tried[0] else "highest"
                notes.append(
                    f"the best rate of {row.method}, {row.setting[rate]:g}, is the {edge} tried; extend the range"
                )
    failed = sum(row.state == "failed" for row in rows)
    if failed:
        notes.append(
            f"{failed} of {len(rows)} settings failed; their rows give the reason, and the logs are next to their runs; "
            "--resume --retry-failed tries them again"
        )
    return notes


# -- files -----------------------------------------------------------------------------------------------------------------


def write_tables(folder: Path, results: Results) -> None:
    """Write trials.csv (one row per run), table.csv (one row per setting) and results.json."""
    names = list(dict.fromkeys(name for row in results.rows for name in row.setting))
    metrics = list(dict.fromkeys(name for run in results.runs for name in run.get("metrics", {})))
    table = [
        {
            **{name: getattr(row, name) for name in ("trial", "method", "state", "numbers")},
            **{name: row.setting.get(name) for name in names},
            f"{results.metric}_mean": row.mean,
            f"{results.metric}_std": row.std,
            **{name: getattr(row, name) for name in ("n", "seconds", "chosen", "reason")},
            **{f"test_{name}": (row.test or {}).get(name) for name in ("mean", "std", "n")},
        }
        for row in results.rows
    ]
    trials = [
        {
            **{name: run[name] for name in ("trial", "seed", "method", "state")},
            **{name: run["setting"].get(name) for name in names},
            "score": run["score"],
            **{name: run.get("metrics", {}).get(name) for name in metrics},
            **{f"numbers_{part}": run.get("parameters", {}).get(part) for part in ("adapter", "head")},
            **{name: run.get(name) for name in ("epoch", "updates", "seconds", "reason", "run")},
        }
        for run in results.runs
    ]
    _write_csv(folder / "table.csv", table)
    _write_csv(folder / "trials.csv", trials)
    write_json(folder / RESULTS_FILE, json.loads(json.dumps(asdict(results))))


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [csv_line(rows[0]), *(csv_line(row.values()) for row in rows)] if rows else []
    write_bytes(path, "".join(lines).encode())


def is_sweep(folder: Path) -> bool:
    """Whether a folder contains a sweep."""
    return (folder / PLAN_FILE).is_file()


def read_results(folder: Path) -> Results:
    """Read the results in a sweep's folder.

    Raises:
        FileError: there are no results yet, or they are damaged.
    """
    if not (folder / RESULTS_FILE).is_file():
        raise FileError(f"{folder}: none of its trials has ended yet")
    content = read_json(folder / RESULTS_FILE)
    try:
        results = Results(**{**content, "rows": [Row(**row) for row in content["rows"]]})
        if any(row.mean is not None and not math.isfinite(row.mean) for row in results.rows):
            raise ValueError("a score is not finite")
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{folder / RESULTS_FILE} is damaged: {error}") from error
    return results
