"""`craft eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from craft_cli.cli import completion
from craft_cli.cli.options import JsonFlag, asks_hub, reports_errors, with_settings
from craft_cli.errors import ConfigError


@reports_errors
@asks_hub
@with_settings(
    "task", "data_dir", "validation_file", "dataset_name", "dataset_config_name", "validation_split", "text_columns",
    "label_column", "problem_type", "label_separator", "max_eval_samples", "max_seq_length", "per_device_eval_batch_size",
    "eval_generate", "answer_pattern", "max_new_tokens", "use_cpu", "trust_remote_code", "allow_other_base",
)  # fmt: skip
def command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="Run, adapter, base checkpoint or hub id; several with --submission.",
            show_default="the latest run",
            autocompletion=completion.runs,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate: validation or test.")] = "validation",
    report: Annotated[
        bool, typer.Option("--report", help="Print precision, recall and F1 of each label, and the calibration error.")
    ] = False,
    confusion: Annotated[bool, typer.Option("--confusion", help="Print the confusion matrix.")] = False,
    worst: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Print the N most confident mistakes; often these are labeling errors."),
    ] = None,
    predictions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write one row per example to this file (.jsonl or .csv).")
    ] = None,
    submission: Annotated[
        str | None, typer.Option(metavar="FILE", help="With --split test: write the zip for the GLUE server.")
    ] = None,
    json: JsonFlag = False,
    **settings: Any,
) -> None:
    """Evaluate a run, an adapter or a checkpoint on a task, on your files, or on its own validation data."""
    from craft_cli.cli import console
    from craft_cli.config import parse_settings
    from craft_cli.data.sources import DataSource

    given = parse_settings({name: value for name, value in settings.items() if value is not None})
    given["source"] = DataSource(
        **{name: given.pop(name) for name in list(given) if name in DataSource.__dataclass_fields__}
    )
    if split not in ("validation", "test"):
        raise ConfigError(f"--split: expected validation or test, not '{split}'")
    if submission and (split != "test" or predictions or report or confusion or worst):
        raise ConfigError(
            "--submission requires --split test, and cannot be combined with --predictions, --report, --confusion or --worst"
        )
    if len(paths or []) > 1 and not submission:
        raise ConfigError("several runs can be given only with --submission; pass one run")

    with console.status("starting"):
        from craft_cli.api.evaluate import evaluate
        from craft_cli.api.submit import submit
    with console.bars() as progress:
        given["progress"] = lambda done, total: progress("evaluating", done, total)
        if submission:
            written = submit(paths or [None], submission, **given)
        else:
            result = evaluate(
                paths[0] if paths else None, split=split, predictions=predictions, worst=worst or 0, **given
            )
    if submission:
        if json:
            console.print_json(asdict(written))
        else:
            console.facts(asdict(written))
        return
    for note in _notes(result, report=report, confusion=confusion):
        console.note(note)
    if json:
        content = asdict(result)
        console.print_json({name: value for name, value in content.items() if value is not None})
        return
    _show(result, report=report, confusion=confusion and result.confusion is not None)


def _notes(result: Any, *, report: bool, confusion: bool) -> list[str]:
    """Notes about the requested tables. A matrix that is too large is a note, so that the metrics are not lost.

    Raises:
        ConfigError: the requested table does not exist for this task.
    """
    from craft_cli.tasks.metrics import MOST_CONFUSED

    if result.by_label is None and (report or confusion):
        raise ConfigError(f"{'--report' if report else '--confusion'}: a regression has no labels; remove it")
    notes = list(result.notes or ())
    if not confusion or result.confusion is not None:
        return notes
    if len(result.labels) <= MOST_CONFUSED:
        raise ConfigError("--confusion requires a single-label classification task; use --report")
    return [
        *notes,
        f"--confusion: too many labels for a matrix ({len(result.labels):,}, at most {MOST_CONFUSED}); use --report",
    ]


def _show(result: Any, *, report: bool, confusion: bool) -> None:
    """Print metrics and the requested tables."""
    from craft_cli.cli import console

    console.facts(
        {
            "evaluated": result.subject,
            "on": result.data,
            "examples": result.examples,
            "predictions": result.predictions,
        }
    )
    console.table(["metric", "value"], list(result.metrics.items()))
    if report:
        console.out.print()
        console.label_table(result.by_label, result.confusion)
        if result.ece is not None:
            console.out.print()
            console.facts({"expected calibration error": f"{result.ece:.4f}"})
    if confusion:
        console.out.print()
        console.table(
            ["gold (down), predicted", *result.labels],
            [[label, *row] for label, row in zip(result.labels, result.confusion, strict=True)],
        )
    if result.worst is not None:
        console.out.print()
        console.mistakes_table(result.worst)
