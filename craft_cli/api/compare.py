"""Compare runs side by side, including the similarity of their weight updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from craft_cli.config import RunConfig
from craft_cli.errors import ConfigError, CraftError, FileError, figure
from craft_cli.methods import method_named
from craft_cli.methods.adapter_folder import CONFIG_FILE, SavedAdapter, read_adapter, read_record
from craft_cli.methods.base import inners
from craft_cli.tasks.metrics import lower_is_better
from craft_cli.training.find import runs_below
from craft_cli.training.run import Run, find_adapter


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        runs: one mapping per run: `run`, `base_model`, `task`, `method`, `targets`, `ranks`, `parameters`, `metrics`, `epoch`, `updates`,
            `seconds` and `change` (the norm of dW over all its projections); None if it is not recorded.
        cosine: cosine of the updates dW of each pair of runs, over all projections and layers; None if the shapes differ.
    """

    runs: Sequence[Mapping[str, Any]]
    cosine: Sequence[Sequence[float | None]]

    def table(self) -> list[tuple[str, list[Any]]]:
        """The comparison as lines: a name, and the formatted value of each run; None if there is none."""
        metrics = dict.fromkeys(name for row in self.runs for name in row["metrics"] or {})

        def column(name: str, shown: Callable[[Any], Any] = lambda value: value) -> list[Any]:
            return [None if row[name] is None else shown(row[name]) for row in self.runs]

        return [
            ("base model", column("base_model", lambda name: name.rstrip("/").rpartition("/")[2])),
            ("task", column("task")),
            ("method", column("method")),
            ("targets", column("targets", ",".join)),
            ("ranks", column("ranks")),
            ("parameters in the adapter", column("parameters", lambda numbers: f"{numbers['adapter']:,}")),
            ("parameters in the head", column("parameters", lambda numbers: f"{numbers['head']:,}")),
            *(
                (name, [figure(it[name]) if name in (it := row["metrics"] or {}) else None for row in self.runs])
                for name in metrics
            ),
            ("best epoch", column("epoch")),
            ("updates", column("updates", "{:,}".format)),
            ("seconds", column("seconds", "{:.0f}".format)),
            ("norm of dW", column("change", "{:.3f}".format)),
        ]


def compare(paths: Sequence[str | Path]) -> Comparison:
    """Compare runs or adapters side by side.

    The cosine of two updates is <dW, dW'> / (||dW|| ||dW'||). A projection adapted by only one of them counts as unchanged
    in the other.

    Args:
        paths: two or more runs or adapters.

    Raises:
        ConfigError: fewer than two paths are given.
        FileError: a path is missing, damaged, or neither a run nor an adapter.
    """
    if len(paths) < 2:
        raise ConfigError("--compare requires at least two runs: craft inspect --compare RUN RUN")
    adapters, rows = [], []
    for path in map(Path, paths):
        folder = find_adapter(path.expanduser())
        if folder is None:
            raise FileError(f"{path} is neither a run nor an adapter; pass the folder of one")
        adapters.append(read_adapter(folder))
        rows.append(_row(path, folder, adapters[-1]))
    products = [[_inner(one, other) for other in adapters] for one in adapters]
    norms = [(products[i][i] or 0.0) ** 0.5 for i in range(len(adapters))]
    cosine: list[list[float | None]] = []
    for i, row in enumerate(products):
        scales = [norms[i] * norm for norm in norms]
        cosine.append(
            [None if value is None or not scale else value / scale for value, scale in zip(row, scales, strict=True)]
        )
    return Comparison([row | {"change": norm} for row, norm in zip(rows, norms, strict=True)], cosine)


def _row(path: Path, folder: Path, saved: SavedAdapter) -> dict[str, Any]:
    record, results = saved.record, Run(path).results() if path != folder else {}
    training = record.get("training", {})
    return {
        "run": str(path),
        "base_model": record["base_model"]["model"],
        "task": training.get("task"),
        "method": saved.method.describe(record).title,
        "targets": list(saved.frozen.targets),
        "ranks": saved.method.describe(record).size,
        "parameters": record["parameters"],
        "metrics": training.get("metrics"),
        "epoch": training.get("epoch"),
        "updates": results.get("updates"),
        "seconds": results.get("seconds"),
    }


def _inner(one: SavedAdapter, other: SavedAdapter) -> float | None:
    """<dW, dW'> over all layers of the projections that both adapt; None if their shapes differ."""
    total = 0.0
    for target in set(one.frozen.targets) & set(other.frozen.targets):
        if tuple(one.frozen.shapes[target]) != tuple(other.frozen.shapes[target]):
            return None
        total += sum(inners(zip(one.chains(target), other.chains(target), strict=True)))
    return total


@dataclass(frozen=True)
class Listed:
    """A run in a list of runs.

    Attributes:
        run: the run folder.
        state: `finished`, `running`, `interrupted at step N` or `damaged`.
        score: best value of the metric that chooses the adapter; None before the first evaluation.
        metric: name of that metric.
        task: the task setting.
        model: the model setting.
        method: the method setting.
        ranks: OUT,IN,LAYERS, or the rank.
        parameters: trained parameters of adapter and head; None before the first evaluation.
        learning_rate: learning rate of the adapter.
        epochs: epochs trained so far.
        date: when the run ended, or wrote its last line.
        metrics: metrics of the best evaluation so far; empty before the first.
        step: the last logged update.
        problem: description of the damage.
    """

    run: str
    state: str
    score: float | None = None
    metric: str | None = None
    task: str | None = None
    model: str | None = None
    method: str | None = None
    ranks: str | None = None
    parameters: Mapping[str, int] | None = None
    learning_rate: float | None = None
    epochs: float | None = None
    date: str | None = None
    metrics: Mapping[str, float] | None = None
    step: int = 0
    problem: str | None = None


def list_runs(folder: Path) -> list[Listed]:
    """The runs directly in a folder, by metric and score; runs without a score come last. Empty if there are none."""
    return sorted(map(_listed, runs_below(folder)), key=_place)


def _place(run: Listed) -> tuple[bool, str, float]:
    if run.score is None:
        return True, "", 0.0
    return False, run.metric or "", run.score if lower_is_better(run.metric or "") else -run.score


def _listed(run: Run) -> Listed:
    try:
        recipe, results, lines = run.recipe(), run.results(), run.metrics()
        method = method_named(recipe.get("method", RunConfig.method))
        record = read_record(run.adapter) if (run.adapter / CONFIG_FILE).is_file() else {}
        metrics = results.get("metrics") or record.get("training", {}).get("metrics") or {}
        chosen = results.get("metric") or recipe.get("metric_for_best_model")
        metric = chosen if chosen in metrics else next(iter(metrics), None)
        known = [file for file in (run.metrics_file, run.path / "recipe.yaml") if file.is_file()]
        return Listed(
            str(run.path),
            run.state(),
            score=metrics[metric] if metric else None,
            metric=metric,
            task=recipe.get("task") or "own",
            model=recipe.get("model"),
            method=method.name,
            ranks=method.describe(asdict(method.Options()) | recipe).size,
            parameters=record.get("parameters"),
            learning_rate=recipe.get("learning_rate"),
            epochs=max((line["epoch"] for line in lines if isinstance(line.get("epoch"), (int, float))), default=None),
            date=datetime.fromtimestamp(known[0].stat().st_mtime).isoformat(" ", "minutes"),
            metrics=metrics,
            step=max((line["step"] for line in lines), default=0),
        )
    except CraftError as error:
        return Listed(str(run.path), "damaged", problem=str(error))
