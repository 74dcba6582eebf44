"""Output of a sweep: a line per trial and a progress bar, the table, and the dry run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_cli.cli import console
from craft_cli.cli.console import Bars, duration, err, out

if TYPE_CHECKING:
    from craft_cli.sweeps.table import Results


class SweepConsole:
    """Displays a sweep: its header, a line per trial, and a bar with the best result so far and the time left."""

    def __init__(self) -> None:
        self._bars = Bars()

    def __enter__(self) -> SweepConsole:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def started(self, results: Results, trials: int | None, jobs: int) -> None:
        many = "until the time limit" if trials is None else f"{trials:,}"
        rows = {
            "methods": ", ".join(results.methods),
            "varied": ", ".join(results.varied) or "only the method",
            "trials": f"{many} of a {results.sampler}" if results.sampler == "grid" else f"{many} by {results.sampler}",
            "seeds": ",".join(map(str, results.seeds)),
            "chosen by": f"{results.metric}, the {'lowest' if results.lower_is_better else 'highest'} mean",
            "pruning": None if results.pruner == "none" else results.pruner,
            "at once": f"{jobs}",
            "sweep": results.output,
        }
        console.header("craft sweep", {name: value for name, value in rows.items() if value is not None})
        if results.done:
            console.say(f"resuming after {results.done:,} trials")
        self._bars.show("trials", results.done, trials, _best(results))

    def tried(self, done: int, total: int) -> None:
        self._bars.show("trials", done, total, ["one real step per trial"])

    def ended(self, results: Results, trial: str, trials: int | None, seconds_left: float | None) -> None:
        row = next(row for row in results.rows if row.trial == trial)
        score = (
            f"{results.metric} {spread(row.mean, row.std)}" if row.state == "complete" else f"{row.state}: {row.reason}"
        )
        parts = [
            *(f"{name} {setting(value)}" for name, value in row.setting.items() if name in results.varied),
            score,
            *([f"{row.numbers:,} parameters"] if row.numbers is not None else []),
            *([f"{row.seconds:.0f} s"] if row.seconds is not None else []),
            *(["best so far"] if row.chosen == "best" else []),
        ]
        console.line(err, row.trial, parts)
        left = "" if seconds_left is None else f"{duration(seconds_left)} left"
        self._bars.show("trials", results.done, trials, _best(results), left)

    def noticed(self, what: str) -> None:
        console.note(what)

    def stopping(self) -> None:
        console.say("stopping: the running trials are saving their checkpoints")

    def interrupted(self, output: Path) -> None:
        self._bars.stop()
        console.say(f"interrupted; the tables are in {output}")
        console.say(f"resume with  craft sweep --resume --output-dir {shlex.quote(str(output))}")


def _best(results: Results) -> list[str]:
    best = results.best
    return [f"best {results.metric} {best.mean:.4f}", f"({best.trial})"] if best and best.mean is not None else []


def spread(mean: float | None, std: float | None) -> str:
    """Format a mean, with its standard deviation if there is one."""
    if mean is None:
        return ""
    return f"{mean:.4f}" if std is None else f"{mean:.4f} \N{PLUS-MINUS SIGN} {std:.4f}"


def setting(value: Any) -> str:
    """Format the value of a setting as for --set."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def show(results: Any) -> None:
    """Print the table of a sweep, the chosen settings, and notes."""
    tested = any(row.test for row in results.rows)
    columns = ["trial", "numbers", *results.varied, results.metric, "n", "seconds", *(["test"] if tested else [])]
    rows = [
        [
            row.trial,
            row.numbers if row.numbers is not None else "",
            *(setting(row.setting[name]) if name in row.setting else "" for name in results.varied),
            spread(row.mean, row.std) if row.state == "complete" else row.state,
            row.n,
            "" if row.seconds is None else f"{row.seconds:.0f}",
            *([spread(row.test["mean"], row.test["std"]) if row.test else ""] if tested else []),
        ]
        for row in results.rows
    ]
    console.table(columns, rows, drop=("seconds", "n", "numbers"))
    seeds = f"over the seeds {','.join(map(str, results.seeds))}" if len(results.seeds) > 1 else "one seed"
    below = [f"{results.metric} on the validation rows, used for selection; {seeds}"]
    if tested:
        below.append(f"test: the best setting of each method on {results.test_file}, not used for selection")
    below += [f"{row.trial}: {row.reason}" for row in results.rows if row.reason and row.state != "complete"]
    for line in below:
        out.print(console.show(line), markup=False)
    out.print()
    best = results.best
    output = Path(results.output)
    console.facts(
        {
            "best": best and f"{best.trial}, {results.metric} {spread(best.mean, best.std)}",
            "repeat": best and console.Verbatim(f"craft train --recipe {shlex.quote(str(output / 'best.yaml'))}"),
            "tables": f"{output}/table.csv, trials.csv, results.json",
            "pictures": ", ".join(str(path) for path in sorted(output.glob("score_by_*.png"))) or None,
        }
    )
    for note in results.notes:
        console.note(note)


def show_rehearsal(rehearsed: Any) -> None:
    """Print the planned trials, their parameters and the estimated time."""
    names = list(dict.fromkeys(name for row in rehearsed["rows"] for name in row["setting"]))
    refused = [row for row in rehearsed["rows"] if row["reason"]]
    console.table(
        ["method", "numbers", *names, "seconds per run"],
        [
            [
                row["method"],
                "" if row["numbers"] is None else row["numbers"],
                *(setting(row["setting"][name]) if name in row["setting"] else "" for name in names),
                "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            ]
            for row in rehearsed["rows"]
        ],
    )
    for line in dict.fromkeys(f"{row['method']}: {row['reason']}" for row in refused):
        out.print(console.show(line), markup=False)
    out.print()
    if rehearsed["sampler"] != "grid":
        for method, space in rehearsed["spaces"].items():
            console.facts({f"space of {method}": ", ".join(f"{name} {values}" for name, values in space.items())})
    seeds = len(rehearsed["seeds"])
    console.facts(
        {
            "trials": f"{rehearsed['trials'] or 'until the time limit'}, {seeds} seed{'s' if seeds > 1 else ''} per trial, "
            f"{rehearsed['jobs']} at once, {rehearsed['sampler']}",
            "chosen by": rehearsed["metric"],
            "time": rehearsed["seconds"]
            and f"about {duration(rehearsed['seconds'])}, estimated from one real step per trial",
            "dry run": "nothing was written",
        }
    )
