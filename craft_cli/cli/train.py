"""`craft train`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from craft_cli.cli import completion
from craft_cli.cli.options import JsonFlag, asks_hub, reports_errors, with_settings
from craft_cli.errors import ConfigError, in_bytes

EXAMPLES = """craft train --model demo --task opinions
craft train --model roberta-base --train-file tickets.csv --dry-run"""
_MOST_LABELS = 20
_DATA = ("task", "data_dir", "train_file", "dataset_name")


@reports_errors
@asks_hub
@with_settings()
def command(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name of a shipped recipe, or a YAML file; flags override it.", autocompletion=completion.recipes
        ),
    ] = None,
    json: JsonFlag = False,
    **settings: Any,
) -> None:
    """Fine-tune a transformer for texts or words with labels, or a language model on chats: a small adapter, and the head."""
    from craft_cli.cli import console
    from craft_cli.config import RunConfig, load_recipe

    given = load_recipe(recipe) if recipe else {}
    asked = given | {name: value for name, value in settings.items() if value is not None}
    former: dict[str, Any] = {}
    if asked.get("resume") or asked.get("init_from"):
        from craft_cli.training.find import nothing_to_resume, resumed_run
        from craft_cli.training.resume import inherited_settings

        former = inherited_settings(asked)
        if asked.get("resume") and not former and not any(asked.get(name) for name in _DATA):
            run = resumed_run(asked.get("output_dir"))
            raise ConfigError(nothing_to_resume(run))
    config = RunConfig.build(settings, given, former)

    with console.status("importing torch and transformers"):
        from craft_cli.training.launch import is_main_process, launch, processes_to_start

        processes = processes_to_start(config)
        if not processes:
            from craft_cli.api.train import train
    if processes:
        raise SystemExit(launch(processes, sys.argv[1:]))

    from craft_cli.cli.training_console import TrainingConsole

    with TrainingConsole() as listener:
        result = train(config, listener)  # type: ignore[arg-type]  # a Listener, but not imported here
    if not is_main_process():
        return
    if json:
        console.print_json(asdict(result))
        return
    if result.output is None:
        _dry_run(console, result)
        return
    evaluated = {}
    if result.metrics:
        if 1 < len(result.tables.get("by_label", ())) <= _MOST_LABELS:
            console.out.print()
            console.label_table(result.tables["by_label"], result.tables.get("confusion"))
            console.out.print()
        when = f"after epoch {result.epoch:g}" if result.epoch else "at the start"
        evaluated = {"best": f"{console.show(result.metrics)} {when}"}
        evaluated |= {name: console.show(metrics) for name, metrics in reversed(list(result.baselines.items()))}
    early = ", stopped early" if result.stopped_early else ""
    console.facts(
        {
            **evaluated,
            "time": f"{result.updates:,} updates in {result.seconds:.0f} s{early}",
            "adapter": f"{result.output}/adapter",
            "curve": f"{result.output}/training_curve.png" if result.metrics else None,
            "next": f"{'craft chat' if result.generates else 'craft eval'}, craft merge, craft inspect",
        }
    )
    for line in result.remarks:
        console.note(line)


def _dry_run(console: Any, result: Any) -> None:
    """Print the time and memory of a training, and what other flags would save."""
    memory = result.memory
    console.facts(
        {
            "dry run": "passed: data, model, factors, one update, one evaluation batch",
            "updates": result.planned,
            "time": f"about {console.duration(result.estimate)}, estimated from that update and batch",
            "memory": memory and f"about {in_bytes(memory.peak)} at the peak, estimated for the longest batch",
            "used": f"{in_bytes(result.peak)} at most so far",
        }
    )
    if memory and memory.savings:
        console.out.print()
        rows = [[name, in_bytes(size), in_bytes(memory.peak - size)] for name, size in memory.savings.items()]
        console.table(["with", "less memory", "peak"], rows)
