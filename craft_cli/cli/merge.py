"""`craft merge`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from craft_cli.cli.common import JsonFlag, reports_errors


@reports_errors
def command(
    path: Annotated[str | None, typer.Argument(help="Run or adapter.", show_default="the latest run")] = None,
    output_dir: Annotated[
        str | None,
        typer.Option("--output-dir", "--output", "-o", help="Folder to write.", show_default="merged, in the run"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False,
    json: JsonFlag = False,
) -> None:
    """Fold an adapter into dense weights: a plain Hugging Face checkpoint for any tool."""
    from craft_cli import console

    with console.status("starting") as progress:
        from craft_cli.merging import merge

        result = merge(path, output_dir, overwrite=overwrite, progress=progress)
    if json:
        console.print_json(asdict(result))
        return
    console.facts(
        {
            "merged": result.output,
            "files": ", ".join(result.files),
            "weights": f"{result.tensors_changed} changed, {result.dtype}",
            "verified": f"logits differ by {result.difference:.1e} of the largest (allowed {result.tolerance:.0e})",
        }
    )
