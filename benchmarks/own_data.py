"""A user's own data: craft with no flag but the data, against what the user would do instead.

    python benchmarks/own_data.py --data-dir DIR --json FILE [--methods A,B] [--data A,B] [--rows 200,1000,5000,all]
        [--seeds 0,1,2] [--model DIR|demo] [--setfit-python FILE] [--name NAME --options "--ranks 64,64,6"] [--table]

A cell is a data set, a number of training rows, a seed and a method. FILE keeps every finished cell at once; called again,
only the missing ones are run, and several calls can fill one file. `--table` runs nothing and prints what there is and what
is missing; `--name` runs craft with other flags under a name of its own. craft is the one that Python finds.

Data: sst2, cola, mrpc and stsb of DIR (train.jsonl, validation.jsonl in GLUE's columns), cut to the rows by a seeded,
stratified draw; GLUE's validation rows (at most 1,000, one draw for all) are the *test* rows here. Training rows whose texts
are among them are left out. `tickets` are made up (`tickets.py`), `opinions` are craft's sample; they are taken whole.
All methods get the same training rows and no others: what they choose, they choose on rows split off these, and the test rows
are answered once, at the end, by the one that was chosen. Rates of the Trainer are chosen once per task, with seed 0 and 1,000
rows (or the whole of tickets and opinions). `peers.py` has the methods; each runs in a fresh process.

`seconds` are those of the whole job up to the trained model, from a cold start, without the test rows.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import peers
from tickets import KINDS, tickets

CRAFT = {"craft": "", "craft-41k": "--ranks 100,100,6"}
"""craft's arms and their flags; MiniLM has 6 layers, so these ranks train 2 (100^2 + 100^2 + 6^2) = 40,072 numbers."""

RATES = {"lora-8": (1e-4, 3e-4, 1e-3, 3e-3), "lora-1": (1e-4, 3e-4, 1e-3, 3e-3), "full": (1e-5, 3e-5, 1e-4)}
RANKS = {"lora-8": 8, "lora-1": 1}
ONE_SEED = ("setfit", "full")
NOT_LARGE = ("setfit", "full", "lora-1")
"""Not run at 5,000 rows."""

TEST_ROWS = 1000


@dataclass(frozen=True)
class Task:
    """A data set: its columns, the names of its labels (the positive one of two last; none are numbers), its metrics."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    sizes: tuple[str, ...] = ("200", "1000", "5000")


DATA = {
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",)),
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": Task(("sentence1", "sentence2"), (), ("pearson",)),
    "tickets": Task(("text",), tuple(sorted(KINDS)), ("accuracy", "macro_f1"), ("all",)),
    "opinions": Task(("text",), ("negative", "positive"), ("accuracy",), ("all",)),
}

EPOCHS = {"200": 10, "1000": 6, "all": 6, "5000": 3}
"""Of the Trainer, by rows; the best one is kept."""

Row = tuple[tuple[str, ...], Any]
"""Texts and gold."""


def main() -> None:
    """Run the missing cells and print the tables."""
    arguments = measure.arguments(
        __doc__,
        data_dir={"type": Path}, methods={}, data={}, rows={"default": "200,1000,5000,all"}, seeds={"default": "0,1,2"},
        model={"default": "demo"}, setfit_python={}, name={}, options={"default": ""}, table={"action": "store_true"},
    )  # fmt: skip
    if arguments.name:
        CRAFT[arguments.name] = arguments.options
        arguments.methods = arguments.methods or arguments.name
    methods = arguments.methods.split(",") if arguments.methods else list_methods(arguments.small)
    here = [name for name in DATA if arguments.data_dir or name in ("tickets", "opinions")]
    data = arguments.data.split(",") if arguments.data else ["tickets"] if arguments.small else here
    study = Study(arguments)
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.small else None]
    wanted = list(cells(methods, data, arguments.rows.split(","), seeds))
    if not arguments.table:
        for cell in wanted:
            study.need(**cell)
    tables(study.done(), [cell for cell in wanted if not study.find(**cell)])


def list_methods(small: bool) -> list[str]:
    """All methods, or those that take seconds."""
    return [*peers.PEERS, *CRAFT] if not small else ["constant", "tfidf", "embeddings", "lora-8", "craft"]


def cells(methods: Sequence[str], data: Sequence[str], sizes: Sequence[str], seeds: Sequence[int]) -> Iterator[Any]:
    """The cells of the study in the order in which they are run; seeds and sizes that a method does not take are left out."""
    for method in methods:
        for size in sizes:
            for name in data:
                task = DATA[name]
                if size not in task.sizes or (method == "setfit" and not task.labels):
                    continue
                if (method == "embeddings-pair" and len(task.columns) == 1) or (size == "5000" and method in NOT_LARGE):
                    continue
                one = size == "5000" or method in ONE_SEED
                for seed in seeds[:1] if one else seeds:
                    yield {"data": name, "size": size, "seed": seed, "method": method}


class Study:
    """The cells that are done, in a file, and how one is run."""

    def __init__(self, arguments: Any) -> None:
        self.given = arguments
        self.found: list[dict[str, Any]] = []

    def done(self) -> list[dict[str, Any]]:
        """All finished cells, those that another process has added too."""
        file: Path | None = self.given.json
        if file and file.exists() and not self.given.small:
            self.found = json.loads(file.read_text())["results"]
        return self.found

    def find(self, **cell: Any) -> dict[str, Any] | None:
        """A finished cell."""
        return next((row for row in self.done() if all(row[name] == value for name, value in cell.items())), None)

    def need(self, **cell: Any) -> dict[str, Any]:
        """A cell, run if it is not there; first the one that chooses its rate."""
        there = self.find(**cell)
        if there:
            return there
        method, rates = cell["method"], RATES.get(cell["method"], ())
        chooser = cell | {"seed": 0, "size": "all" if cell["size"] == "all" else "1000"}
        if rates and cell != chooser:
            rates = (self.need(**chooser)["rate"],)
        train, test = rows_of(cell["data"], cell["size"], cell["seed"], self.given.data_dir)
        if self.given.small:
            train, test, rates = train[:60], test[:40], rates[:2]
        task = DATA[cell["data"]]
        if method in CRAFT:
            found = run_craft(task, train, test, self.given.model, cell["seed"], self.flags(method))
        else:
            found = self.run_peer(method, peers.Job(
                model=base_model(self.given.model), texts=[texts for texts, _ in train], gold=[gold for _, gold in train],
                test=[texts for texts, _ in test], labels=task.labels, metrics=task.metrics, seed=cell["seed"], rates=rates,
                epochs=1 if self.given.small else EPOCHS[cell["size"]], rank=RANKS.get(method, 0),
            ))  # fmt: skip
        gold, answers = [gold for _, gold in test], found.pop("found")
        metrics = peers.score(task.metrics, task.labels, gold, answers)
        result = cell | {"rows": len(train), "test_rows": len(test), "metrics": metrics} | found
        self.keep(result)
        print(time.strftime("%H:%M:%S"), json.dumps(result), file=sys.stderr, flush=True)
        return result

    def flags(self, method: str) -> str:
        """The flags beside data, model and seed."""
        return CRAFT[method] + (" --num-train-epochs 1" if self.given.small else "")

    def run_peer(self, method: str, job: peers.Job) -> dict[str, Any]:
        """In a fresh process."""
        apart = (self.given.setfit_python or sys.executable,) if method == "setfit" else ()
        memory, found = measure.peak_memory(peers.PEERS[method], job, *apart)
        return found | {"memory": memory}

    def keep(self, result: dict[str, Any]) -> None:
        """Add a cell to the file, whoever else writes to it."""
        if not self.given.json:
            self.found.append(result)
            return
        folder = os.open(self.given.json.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self.found = [*self.done(), result]
            part = self.given.json.with_suffix(".part")
            measure.write(part, self.found)
            part.replace(self.given.json)
        finally:
            os.close(folder)


def base_model(name: str) -> str:
    """The folder of the base model."""
    from craft_cli.models.hub import resolve

    return str(resolve(name).folder)


# -- data ----------------------------------------------------------------------------------------------------------------


def rows_of(name: str, size: str, seed: int, folder: Path | None) -> tuple[list[Row], list[Row]]:
    """Training and test rows of a cell, which depend on nothing else."""
    if name == "tickets":
        made: list[Row] = [((text,), label) for text, label in tickets(1200, seed=0)]
        others: list[Row] = [((text,), label) for text, label in tickets(1000, seed=0, test=True)]
        known = {texts for texts, _ in made}
        return made, [row for row in others if row[0] not in known][:800]
    task = DATA[name]
    if name == "opinions":
        found = importlib.util.find_spec("craft_cli")
        assert found
        assert found.origin
        place = Path(found.origin).parent / "samples" / name
    else:
        if folder is None:
            raise SystemExit(f"{name} needs --data-dir")
        place = folder / name
    pool, test_rows = (read(place / f"{part}.jsonl", task) for part in ("train", "validation"))
    test_rows = random.Random(0).sample(test_rows, TEST_ROWS) if len(test_rows) > TEST_ROWS else test_rows
    if size == "all":
        return pool, test_rows
    seen = {texts for texts, _ in test_rows}
    return draw([row for row in pool if row[0] not in seen], int(size), seed, stratify=bool(task.labels)), test_rows


def read(file: Path, task: Task) -> list[Row]:
    """Rows of a file, labels by their names."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        cells = json.loads(line)
        gold = cells["label"]
        if task.labels and isinstance(gold, int):
            gold = task.labels[gold]
        found.append((tuple(cells[column] for column in task.columns), gold))
    return found


def draw(pool: list[Row], rows: int, seed: int, *, stratify: bool) -> list[Row]:
    """As many rows at random, labels in the shares of the pool; all, where there are no more."""
    from sklearn.model_selection import train_test_split

    if rows >= len(pool):
        return pool
    gold = [label for _, label in pool] if stratify else None
    return train_test_split(pool, train_size=rows, random_state=seed, stratify=gold)[0]


# -- craft ---------------------------------------------------------------------------------------------------------------


def run_craft(task: Task, train: list[Row], test: list[Row], model: str, seed: int, flags: str) -> dict[str, Any]:
    """`craft train` on a file of the user's own, and `craft predict` for the test rows."""
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("train", train), ("test", test)):
            lines = [dict(zip(task.columns, texts, strict=True)) for texts, _ in rows]
            if name == "train":
                lines = [line | {"label": gold} for line, (_, gold) in zip(lines, rows, strict=True)]
            Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        began = time.perf_counter()
        trained = json.loads(_craft(
            folder, "train", "--train-file", "train.jsonl", "--model", model, "--seed", str(seed), "--output-dir", "run",
            "--cache-dir", "cache", "--json", *flags.split(),
        ))  # fmt: skip
        seconds = time.perf_counter() - began
        _craft(folder, "predict", "run", "--input", "test.jsonl", "--output", "found.jsonl")
        answers = [json.loads(line)["prediction"] for line in Path(folder, "found.jsonl").read_text().splitlines()]
    kept = ("epoch", "updates", "baseline", "baselines", "stopped_early")
    return {
        "found": answers, "seconds": seconds, "numbers": sum(trained["parameters"].values()),
        "validation": trained["metrics"], "options": flags, "version": version(),
    } | {name: trained[name] for name in kept if name in trained}  # fmt: skip


def _craft(folder: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "craft_cli", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def version() -> str:
    """The version of craft, and its commit where it is a checkout."""
    import craft_cli

    asked = ["git", "-C", str(Path(craft_cli.__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return f"{craft_cli.__version__} {found}".strip()


# -- tables --------------------------------------------------------------------------------------------------------------


def tables(done: Sequence[dict[str, Any]], missing: Sequence[dict[str, Any]]) -> None:
    """A table for each size: 100 times mean and standard deviation over the seeds, and means over the tasks.

    A task's score in these is the mean of its metrics, as GLUE's. A mean stands only where every task is there.
    """
    methods = list(dict.fromkeys([*peers.PEERS, *(row["method"] for row in done)]))
    for size in ("200", "1000", "5000", "all"):
        tasks = [name for name, task in DATA.items() if any(r["data"] == name and r["size"] == size for r in done)]
        if not tasks:
            continue
        columns = [(name, metric) for name in tasks for metric in DATA[name].metrics]
        with_labels = [name for name in tasks if DATA[name].labels]
        lines = []
        for method in methods:
            mine = [row for row in done if row["size"] == size and row["method"] == method]
            if mine:
                shown = [
                    _cell([row["metrics"][metric] for row in mine if row["data"] == name]) for name, metric in columns
                ]
                means = [_mean(mine, names) for names in (tasks, with_labels)]
                seconds = f"{statistics.mean(row['seconds'] for row in mine):.0f}"
                numbers = f"{statistics.median(row['numbers'] for row in mine):,.0f}"
                lines.append([method, *shown, *means, seconds, numbers])
        rows = max(row["rows"] for row in done if row["size"] == size)
        print(f"\n{'Whole data sets' if size == 'all' else f'{rows:,} rows'}, test rows {_test_rows(done, tasks)}:\n")
        header = [f"{name} {metric.replace('_correlation', '')}" for name, metric in columns]
        measure.table(["method", *header, "mean", "mean without regression", "seconds", "numbers"], lines)
    if missing:
        print("\nMissing:")
        for method in dict.fromkeys(cell["method"] for cell in missing):
            names = [
                f"{cell['data']} {cell['size']} seed {cell['seed']}" for cell in missing if cell["method"] == method
            ]
            print(f"- {method}: {', '.join(names)}")


def _test_rows(done: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    return ", ".join(f"{name} {next(row['test_rows'] for row in done if row['data'] == name):,}" for name in tasks)


def _cell(values: Sequence[float]) -> str:
    """Mean ± standard deviation and how many there are, unless three."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{100 * values[0]:.1f} (1)"
    count = "" if len(values) == 3 else f" ({len(values)})"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}{count}"


def _mean(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Over tasks, of the means over seeds of the means over metrics."""
    scores = [[statistics.mean(row["metrics"].values()) for row in rows if row["data"] == name] for name in names]
    return f"{100 * statistics.mean(map(statistics.mean, scores)):.1f}" if scores and all(scores) else "-"


if __name__ == "__main__":
    main()
