"""`craft inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from craft_cli.cli import completion
from craft_cli.cli.options import JsonFlag, asks_hub, reports_errors, with_settings
from craft_cli.errors import ConfigError, figure

_BESIDE = 2
"""Maximum projections in one table of changes, so that it fits a terminal."""


@reports_errors
@asks_hub
@with_settings("trust_remote_code")
def command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="Model, factor file, run, adapter, sweep, or a folder of runs; several with --compare.",
            show_default="the latest run",
            autocompletion=completion.runs,
        ),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="OUT,IN,LAYERS", help="For a model: count the trained parameters.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="PART", help="Propose ranks that keep this share of the energy: 0.5.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Propose the best ranks within this many parameters: 50k.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare runs side by side.")] = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Plot the spectra to this file (png, svg, pdf).")
    ] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a self-contained HTML page.")] = None,
    json: JsonFlag = False,
    **permitted: Any,
) -> None:
    """Inspect a model, a factor file, a run, an adapter or a sweep; list or compare runs; propose ranks."""
    from craft_cli.cli import console

    asked = {
        "--ranks": ranks,
        "--energy/--budget": energy or budget,
        "--compare": compare,
        "--plot/--html": plot or (None if compare else html),
    }
    if sum(value is not None and value is not False for value in asked.values()) > 1:
        raise ConfigError(
            f"{' and '.join(name for name, value in asked.items() if value)} cannot be combined; choose one"
        )
    if len(paths or []) > 1 and not compare:
        raise ConfigError("several paths can be given only with --compare; pass one path")
    path, trusted = paths[0] if paths else None, bool(permitted["trust_remote_code"])
    if compare:
        return _compare(paths or [], html, json=json)
    if energy is not None or budget is not None:
        with console.status("reading") as progress:
            from craft_cli.api.advise import advise

            advice = advise(path, energy=energy, budget=budget, trust_remote_code=trusted, progress=progress)
        return console.print_json(asdict(advice)) if json else _advice(advice)
    if path and (Path(path).expanduser() / "sweep.json").is_file():
        return _sweep(Path(path).expanduser(), other=bool(ranks or plot or html), json=json)
    with console.status("reading"):
        from craft_cli.api.compare import list_runs

        runs = list_runs(Path(path).expanduser()) if path else []
    if runs and (ranks or plot):
        raise ConfigError(f"--ranks and --plot: {path} is a folder of runs; pass one of them")
    if runs:
        return _list(str(path), runs, html, json=json)
    with console.status("reading"):
        from craft_cli.api.inspect import inspect

        if html:
            from craft_cli.api.report import write_page

            result = write_page(path, html, trust_remote_code=trusted)
        if plot or not html:
            result = inspect(path, ranks=ranks, plot=plot, trust_remote_code=trusted)
    if json:
        console.print_json(
            {"kind": result.kind, "path": result.path, **result.facts, "projections": result.projections}
        )
    else:
        _show(result, plot, html)


def _compare(paths: Sequence[str], html: str | None, *, json: bool) -> None:
    from craft_cli.cli import console

    with console.status("reading"):
        from craft_cli.api.compare import compare

        compared = compare(paths)
        if html:
            from craft_cli.api.report import write_comparison

            write_comparison(compared, html)
    if json:
        console.print_json(asdict(compared))
    else:
        _comparison(compared)


def _show(result: Any, plot: str | None, html: str | None) -> None:
    """Print the facts, one row per projection, and the changes."""
    from craft_cli.cli import console

    console.facts({result.kind: result.path, **result.facts, "plot": plot, "page": html})
    console.out.print()
    columns, rows = _table(result.projections)
    console.table(columns, rows, drop=("in", "out", "layer") if "energy" in columns else ())
    if "energy" in columns:
        console.out.print(
            "energy: share of the squared norm kept; the same for a random tensor of this shape; and for each mode alone"
        )
    if any("change_by_layer" in row for row in result.projections):
        console.out.print()
        _changes(result.projections)


def _sweep(path: Path, *, other: bool, json: bool) -> None:
    from craft_cli.cli import console, sweep_console
    from craft_cli.sweeps.table import read_results

    if other:
        raise ConfigError(f"--ranks, --plot and --html: {path} is a sweep; pass one of its runs")
    results = read_results(path)
    if json:
        console.print_json({"kind": "sweep", **asdict(results)})
    else:
        sweep_console.show(results)


def _list(path: str, runs: Sequence[Any], html: str | None, *, json: bool) -> None:
    from craft_cli.cli import console

    if html:
        from craft_cli.api.report import write_runs

        write_runs(path, runs, html)
    if json:
        console.print_json({"kind": "runs", "path": path, "runs": [asdict(run) for run in runs]})
        return
    rows = []
    for run in runs:
        if run.problem:
            console.note(run.problem)
        score = "" if run.score is None else f"{run.metric} {figure(run.score)}"
        cells = [
            Path(run.run).name, score, run.state, (run.model or "").rpartition("/")[2], run.method, (run.parameters or {}).get("adapter"),
            None if run.learning_rate is None else f"{run.learning_rate:g}", run.epochs, run.task, run.date,
        ]  # fmt: skip
        rows.append(["" if cell is None else cell for cell in cells])
    console.table(
        ["run", "score", "state", "model", "method", "numbers", "rate", "epochs", "task", "date"],
        rows,
        drop=("task", "date", "epochs", "rate", "numbers", "model"),
    )


def _advice(advice: Any) -> None:
    from craft_cli.cli import console
    from craft_cli.cli.console import percent

    for row in advice.projections:
        console.table(
            [row["name"], "numbers", "layer", "random", "out", "random", "in", "random"],
            [
                [
                    f"{line['rank']:,}",
                    line["parameters"],
                    *(
                        "" if line[name] is None else percent(line[name])
                        for mode in ("layer", "out", "in")
                        for name in (mode, f"{mode}_random")
                    ),
                ]
                for line in row["curve"]
            ],
            drop=("random", "numbers"),
        )
        console.out.print()
    console.out.print("energy that each rank keeps alone, next to that of a random tensor of this shape")
    console.out.print()
    columns = ["at the proposed ranks", "L x out x in", "numbers", "energy", "random"]
    console.table(
        columns,
        [
            [row["name"], "x".join(map(str, row["shape"])), row["parameters"], percent(row["energy"]),
             percent(row["energy_random"])]
            for row in advice.projections
        ],
    )  # fmt: skip
    console.out.print()
    console.facts(
        {
            "base model": advice.base_model,
            "proposed": f"--ranks {advice.ranks}",
            "numbers": advice.parameters,
            "energy": f"{percent(advice.energy)} (of random tensors {percent(advice.energy_random)})",
        }
    )


def _comparison(compared: Any) -> None:
    from craft_cli.cli import console

    names = [str(number) for number in range(1, len(compared.runs) + 1)]
    console.facts({name: row["run"] for name, row in zip(names, compared.runs, strict=True)})
    console.out.print()
    shown = [[name, *("" if value is None else value for value in values)] for name, values in compared.table()]
    console.table(["", *names], shown)
    console.out.print()
    console.table(
        ["cosine of dW", *names],
        [
            [name, *("" if value is None else f"{value:.3f}" for value in row)]
            for name, row in zip(names, compared.cosine, strict=True)
        ],
    )


def _table(projections: Any) -> tuple[list[str], list[list[Any]]]:
    from craft_cli.cli.console import percent

    columns = ["projection", "L x out x in"]
    rows: list[list[Any]] = [[row["name"], "x".join(map(str, row["shape"]))] for row in projections]
    if all("ranks" in row for row in projections):
        columns += ["ranks"]
        for cells, row in zip(rows, projections, strict=True):
            cells.append(row["ranks"])
    if all("energy" in row for row in projections):
        columns += ["energy", "random", "layer", "out", "in"]
        for cells, row in zip(rows, projections, strict=True):
            cells += [
                percent(row["energy"]),
                percent(row["energy_random"]),
                *map(percent, row["energy_by_mode"].values()),
            ]
    else:
        columns += ["numbers"]
        for cells, row in zip(rows, projections, strict=True):
            cells.append(row["parameters"])
        if any("shared" in row for row in projections):
            columns += ["shared"]
            for cells, row in zip(rows, projections, strict=True):
                cells.append(row["shared"])
    return columns, rows


def _changes(projections: Any) -> None:
    from craft_cli.cli import console

    if all("k_norms" in row for row in projections):
        console.table(
            ["norm of K", "layer", "out", "in"],
            [[row["name"], *[f"{norm:.3f}" for norm in row["k_norms"].values()]] for row in projections],
        )
        console.out.print()
    layers = range(len(projections[0]["change_by_layer"]))
    for first in range(0, len(projections), _BESIDE):
        if first:
            console.out.print()
        columns: list[str] = []
        cells: list[list[str]] = [[] for _ in layers]
        for row in projections[first : first + _BESIDE]:
            columns += [row["name"], *(["directions"] if "effective_rank_by_layer" in row else [])]
            for layer in layers:
                cells[layer].append(f"{row['change_by_layer'][layer]:.3f}")
                if "effective_rank_by_layer" in row:
                    cells[layer].append(f"{row['effective_rank_by_layer'][layer]:.1f}")
        console.table(
            ["norm of dW in layer", *columns], [[str(layer), *row] for layer, row in zip(layers, cells, strict=True)]
        )
    if all("k_norms" in row for row in projections):
        console.out.print("K: how far each trained transform is from the identity; dW: the change of a layer's weight")
    if any("effective_rank_by_layer" in row for row in projections):
        console.out.print("directions: effective rank of dW, exp of the entropy of its singular values")
