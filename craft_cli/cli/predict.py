"""`craft predict`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from craft_cli.cli import completion
from craft_cli.cli.options import Seed, Stop, Temperature, TopP, asks_hub, generation_of, reports_errors, with_settings


@reports_errors
@asks_hub
@with_settings(
    "text_columns", "max_seq_length", "max_new_tokens", "per_device_eval_batch_size", "use_cpu", "trust_remote_code",
    "allow_other_base",
)  # fmt: skip
def command(
    path: Annotated[
        str | None,
        typer.Argument(
            help="Run, adapter, base checkpoint or hub id.",
            show_default="the latest run",
            autocompletion=completion.runs,
        ),
    ] = None,
    input: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help="Input file: jsonl, csv, tsv, parquet, conll or txt; - reads lines from stdin.",
        ),
    ] = "-",
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Output file.", show_default="stdout")
    ] = None,
    keep_columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Input columns to copy to each prediction, such as id,text.",
            show_default="row, the row number",
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option("--format", help="Output format: jsonl or csv.", show_default="from the file name, or jsonl"),
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    **settings: Any,
) -> None:
    """Predict labels and scores for texts, one row per text; language models generate answers."""
    from craft_cli.cli import console
    from craft_cli.config import parse_settings
    from craft_cli.config.names import split_names

    given = parse_settings({name: value for name, value in settings.items() if value is not None})
    given["generation"] = generation_of(given.pop("max_new_tokens", None), temperature, top_p, seed, stop)
    by_hand = input == "-" and sys.stdin and sys.stdin.isatty()
    on_screen = not output and sys.stdout and sys.stdout.isatty()
    with ExitStack() as spinning:
        progress = spinning.enter_context(console.status("starting"))
        from craft_cli.api.predict import predict_file

        def ready() -> None:
            if by_hand or on_screen:  # typing, or the answers, already show progress
                spinning.close()
            if by_hand:
                console.note("type one text per line; end with Ctrl-D")

        def done(rows: int) -> None:
            if not (by_hand or on_screen):
                progress(f"{rows:,} rows predicted")

        rows = predict_file(
            path,
            input=input,
            output=output,
            output_format=output_format,
            keep_columns=split_names(keep_columns or ""),
            ready=ready,
            progress=done,
            noticed=console.note,
            **given,
        )
    if output:
        console.facts({"predicted": rows, "output": output})
