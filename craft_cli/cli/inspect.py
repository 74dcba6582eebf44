"""`craft inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from craft_cli.cli.common import JsonFlag, reports_errors


@reports_errors
def command(
    path: Annotated[
        str | None,
        typer.Argument(
            help="Model, file of factors, run, adapter, or a folder of runs.", show_default="the latest run"
        ),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="OUT,IN,LAYERS", help="Of a model: count the numbers trained.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw the spectra (png, svg, pdf).")] = None,
    json: JsonFlag = False,
) -> None:
    """Look into a model, a file of factors, a run or an adapter; list the runs of a folder."""
    from craft_cli import console
    from craft_cli.errors import ConfigError

    with console.status("reading"):
        from craft_cli.inspection import inspect
        from craft_cli.listing import list_runs

        runs = list_runs(Path(path).expanduser()) if path else []
        if runs and (ranks or plot):
            raise ConfigError(f"--ranks and --plot: {path} is a folder of runs; name one of them")
        if not runs:
            found = inspect(path, ranks=ranks, plot=plot)
    if runs:
        _list(str(path), runs, json=json)
        return
    if json:
        content = asdict(found)
        console.print_json(
            {
                "kind": content["kind"],
                "path": content["path"],
                **content["facts"],
                "projections": content["projections"],
            }
        )
        return
    console.facts({found.kind: found.path, **found.facts, "plot": plot})
    console.out.print()
    columns, rows = _table(found.projections)
    console.table(columns, rows)
    if "energy" in columns:
        console.out.print("energy: kept of the squared norm; of a random tensor of that shape; of each mode by itself")
    if any("change_by_layer" in row for row in found.projections):
        console.out.print()
        _changes(found.projections)


def _list(path: str, runs: Sequence[Any], *, json: bool) -> None:
    from craft_cli import console

    if json:
        console.print_json({"kind": "runs", "path": path, "runs": [asdict(run) for run in runs]})
        return
    rows = []
    for run in runs:
        if run.problem:
            console.note(run.problem)
        best = dict(list((run.metrics or {}).items())[:1])
        rows.append([Path(run.run).name, run.task or "", run.ranks or "", console.show(best), run.state])
    console.table(["run", "task", "ranks", "best", "state"], rows)


def _table(projections: Any) -> tuple[list[str], list[list[Any]]]:
    from craft_cli.console import percent

    columns = ["projection", "L x out x in", "ranks"]
    rows: list[list[Any]] = [[row["name"], "x".join(map(str, row["shape"])), row["ranks"]] for row in projections]
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
    return columns, rows


def _changes(projections: Any) -> None:
    from craft_cli import console

    console.table(
        ["norm of K", "layer", "out", "in"],
        [[row["name"], *[f"{norm:.3f}" for norm in row["k_norms"].values()]] for row in projections],
    )
    console.out.print()
    layers = range(len(projections[0]["change_by_layer"]))
    console.table(
        ["norm of dW in layer", *[row["name"] for row in projections]],
        [[str(layer), *[f"{row['change_by_layer'][layer]:.3f}" for row in projections]] for layer in layers],
    )
