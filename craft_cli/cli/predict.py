"""`craft predict`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from craft_cli.cli.options import reports_errors, with_settings


@reports_errors
@with_settings(
    "text_columns", "max_seq_length", "per_device_eval_batch_size", "use_cpu", "trust_remote_code", "allow_other_base"
)
def command(
    path: Annotated[
        str | None, typer.Argument(help="Run, adapter, checkpoint or hub id.", show_default="the latest run")
    ] = None,
    input: Annotated[
        str,
        typer.Option(
            "--input", "-i", metavar="FILE", help="Texts: jsonl, csv, tsv, parquet, conll, txt; - reads lines."
        ),
    ] = "-",
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="File to write.", show_default="stdout")
    ] = None,
    output_format: Annotated[
        str | None, typer.Option("--format", help="jsonl or csv.", show_default="as FILE ends, else jsonl")
    ] = None,
    **settings: Any,
) -> None:
    """Predict for texts without labels: a row for each, with its answer and scores."""
    from craft_cli.cli import console
    from craft_cli.config import parse_settings

    given = parse_settings({name: value for name, value in settings.items() if value is not None})
    if input == "-" and sys.stdin and sys.stdin.isatty():
        console.note("reading texts from the keyboard, a line each; end with Ctrl-D")
    with console.status("starting") as progress:
        from craft_cli.api.predict import predict_file

        if not output:  # the rows themselves show that it goes on
            progress("predicting")
        rows = predict_file(
            path,
            input=input,
            output=output,
            output_format=output_format,
            progress=lambda done: progress(f"{done:,} rows predicted"),
            noticed=console.note,
            **given,
        )
    if output:
        console.facts({"predicted": rows, "output": output})
