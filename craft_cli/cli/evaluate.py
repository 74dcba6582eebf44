"""`craft eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from craft_cli.cli.common import JsonFlag, reports_errors, with_settings


@reports_errors
@with_settings(
    "task", "data_dir", "validation_file", "text_columns", "label_column",
    "max_eval_samples", "max_seq_length", "per_device_eval_batch_size", "use_cpu",
)  # fmt: skip
def command(
    path: Annotated[
        str | None, typer.Argument(help="Run, adapter, checkpoint or hub id.", show_default="the latest run")
    ] = None,
    json: JsonFlag = False,
    **settings: Any,
) -> None:
    """Evaluate a run, an adapter or a checkpoint, on a task or on the data it was trained with."""
    from craft_cli import console
    from craft_cli.config import parse_settings
    from craft_cli.data import DataSource

    given = parse_settings({name: value for name, value in settings.items() if value is not None})
    source = DataSource(**{name: given.pop(name) for name in list(given) if name in DataSource.__dataclass_fields__})
    with console.status("starting"):
        from craft_cli.evaluation import evaluate
    with console.bars() as progress:
        result = evaluate(
            path, source=source, progress=lambda done, total: progress("evaluating", done, total), **given
        )
    if json:
        console.print_json(asdict(result))
        return
    console.facts({"evaluated": result.subject, "on": result.data, "examples": result.examples})
    console.table(["metric", "value"], [[name, f"{value:.4f}"] for name, value in result.metrics.items()])
