"""`craft decompose`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from craft_cli.cli.options import JsonFlag, asks_hub, reports_errors, with_settings
from craft_cli.config import ALL_LINEAR, TARGETS, RunConfig, parse_settings


@reports_errors
@asks_hub
@with_settings("trust_remote_code")
def command(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, 'demo' or 'demo-llm'.")],
    targets: Annotated[
        str, typer.Option(help=f"Projections to decompose: {','.join(TARGETS)}, or {ALL_LINEAR}.")
    ] = ",".join(RunConfig.targets),
    ranks: Annotated[
        str, typer.Option(metavar="OUT,IN,LAYERS", help="Ranks to keep; smaller ranks reuse the same factors.")
    ] = ",".join(map(str, RunConfig.ranks)),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    cache_dir: Annotated[
        str | None, typer.Option(help="Cache folder for factors.", show_default="~/.cache/craft")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device for the computation, such as cuda.", show_default="cpu")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Decompose again even if the factors are cached.")] = False,
    json: JsonFlag = False,
    **permitted: Any,
) -> None:
    """Decompose the attention projections of a model once (HOSVD), and cache the factors."""
    from craft_cli.cli import console
    from craft_cli.methods.craft.decomposition import decompose_weights
    from craft_cli.methods.craft.ranks import Ranks
    from craft_cli.models.stacks import find_checkpoint, read_weights

    names = parse_settings({"targets": targets})["targets"]
    wanted = Ranks.parse(ranks)
    with console.status(f"resolving {model}"):
        checkpoint = find_checkpoint(model, names, revision, trust_remote_code=bool(permitted["trust_remote_code"]))
    with console.bars() as progress:
        weights = read_weights(checkpoint, names)
        done = decompose_weights(weights, wanted, cache_dir=cache_dir, device=device, force=force, progress=progress)
    factors = done.factors
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "shape": list(decomposition.shape),
            "ranks": list(factors.ranks(name)),
            "energy": decomposition.energy,
            "parameters": factors.ranks(name).count_parameters(),
            "seconds": done.seconds.get(name),
        }
        for name, decomposition in factors.decompositions.items()
    ]
    for line in done.notes:
        console.note(line)
    if json:
        console.print_json(
            {
                "model": factors.model,
                "revision": factors.revision,
                "factors": str(factors.path),
                "cached": done.cached,
                "parameters": {"adapter": sum(row["parameters"] for row in rows)},
                "projections": rows,
                "notes": list(done.notes),
            }
        )
        return
    console.table(
        ["projection", "L x out x in", "ranks", "energy kept", "numbers", "seconds"],
        [
            [
                row["name"],
                "x".join(map(str, row["shape"])),
                row["ranks"],
                console.percent(row["energy"]),
                row["parameters"],
                "cached" if row["seconds"] is None else f"{row['seconds']:.2f}",
            ]
            for row in rows
        ],
        drop=("seconds",),
    )
    if any(row["ranks"] != list(wanted) for row in rows):
        console.out.print(f"ranks {wanted} reduced to the dimensions of the stacks")
    console.facts({"factors": factors.path})
