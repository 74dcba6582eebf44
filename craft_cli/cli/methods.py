"""`craft methods`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from craft_cli.cli.options import JsonFlag, asks_hub, reports_errors, with_settings
from craft_cli.config import RunConfig, parse_settings


@reports_errors
@asks_hub
@with_settings("trust_remote_code")
def command(
    model: Annotated[
        str | None, typer.Option(help="Count the numbers each trains: hub id, folder, 'demo' or 'demo-llm'.")
    ] = None,
    targets: Annotated[str, typer.Option(metavar="NAMES", help="Projections to adapt.")] = ",".join(RunConfig.targets),
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS", help="With --model: show the settings within this many parameters, such as 16k."
        ),
    ] = None,
    json: JsonFlag = False,
    **permitted: Any,
) -> None:
    """List the methods of `craft train --method`, with their papers and trained parameters."""
    from craft_cli.cli import console

    with console.status("reading") as progress:
        from craft_cli.api.methods import list_methods

        names = parse_settings({"targets": targets})["targets"]
        trusted = bool(permitted["trust_remote_code"])
        entries = list_methods(model, targets=names, budget=budget, trust_remote_code=trusted, progress=progress)
    if json:
        console.print_json([asdict(method) for method in entries])
        return
    console.facts({method.name: f"{method.idea} ({method.paper})" for method in entries}, rename=False)
    if model is None:
        return
    console.out.print()
    columns = ["method", "rank", "numbers"]
    rows = [[method.name, method.size, method.parameters or 0] for method in entries]
    if budget:
        columns += [f"within {budget}", "numbers"]
        for row, method in zip(rows, entries, strict=True):
            row += [method.budget_size or "-", "" if method.budget_parameters is None else method.budget_parameters]
    console.table(columns, rows)
    for method in entries:
        if method.problem:
            console.note(method.problem)
