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
            help="Run, adapter, checkpoint or hub id; several with --submission.",
            show_default="the latest run",
            autocompletion=completion.runs,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="validation, or test.")] = "validation",
    report: Annotated[
        bool, typer.Option("--report", help="Show precision, recall and F1 of each label, and the calibration error.")
    ] = False,
    confusion: Annotated[
        bool, typer.Option("--confusion", help="Show the confusion matrix: what was taken for what.")
    ] = False,
    worst: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Show the N most confident mistakes: where wrong labels are found first."
        ),
    ] = None,
    predictions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a row for each example (.jsonl or .csv).")
    ] = None,
    submission: Annotated[
        str | None, typer.Option(metavar="FILE", help="With --split test: the zip that the GLUE server takes.")
    ] = None,
    json: JsonFlag = False,
    **settings: Any,
) -> None:
    """Evaluate a run, an adapter or a checkpoint, on a task or on the data it was trained with."""
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
            "--submission needs --split test, and no --predictions, --report, --confusion or --worst: it has no labels"
        )
    if len(paths or []) > 1 and not submission:
        raise ConfigError("several runs are evaluated together for --submission only; name one")

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
    """What is said beside the metrics; a matrix that would be too large is no reason to lose them.

    Raises:
        ConfigError: there is no table of the kind asked for.
    """
    from craft_cli.tasks.metrics import MOST_CONFUSED

    if result.by_label is None and (report or confusion):
        raise ConfigError(f"{'--report' if report else '--confusion'}: a regression has no labels")
    notes = list(result.notes or ())
    if not confusion or result.confusion is not None:
        return notes
    if len(result.labels) <= MOST_CONFUSED:
        raise ConfigError("--confusion: there is a matrix only of one label a row; --report shows each label")
    return [
        *notes,
        f"--confusion: no matrix of {len(result.labels):,} labels, since at most {MOST_CONFUSED} can be shown; --report shows each",
    ]


def _show(result: Any, *, report: bool, confusion: bool) -> None:
    """Metrics, and the tables that were asked for."""
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
