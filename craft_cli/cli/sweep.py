"""`craft sweep`."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated, Any

import typer

from craft_cli.cli import completion
from craft_cli.cli.options import JsonFlag, asks_hub, reports_errors, with_settings
from craft_cli.config import GROUPS, RunConfig
from craft_cli.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SHARED = [name for name, group in RunConfig.groups().items() if group != GROUPS[-1] and name != "seed"]
"""Settings shared by all trials; the others concern a single run, or the sweep itself."""


SetsFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUES",
        help="Values to try: learning_rate=1e-3,3e-3; ranks=64,64,8/32,32,4; learning_rate=1e-4..1e-2 with --trials. "
        "Options of a method apply to its trials only.",
        show_default="the default space of the method",
    ),
]
SamplerFlag = Annotated[
    str | None, typer.Option(help="Sampler: grid, random or tpe.", show_default="grid; tpe with --trials or a range")
]
PrunerFlag = Annotated[
    str | None,
    typer.Option(
        help="Pruner that stops unpromising trials early: none, median or hyperband.",
        show_default="median; none for a grid",
    ),
]
TrialsFlag = Annotated[
    int | None,
    typer.Option(min=1, help="Number of settings to sample.", show_default="all combinations; 20 of a default space"),
]
StorageFlag = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Database shared by several machines.", show_default="SQLite in the folder"),
]
ResumeFlag = Annotated[
    bool, typer.Option("--resume", help="Resume or join the sweep in --output-dir, or the latest sweep.")
]
RetryFlag = Annotated[bool, typer.Option("--retry-failed", help="With --resume: retry the failed trials.")]


@reports_errors
@asks_hub
@with_settings(*_SHARED, "trust_remote_code")
def command(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name of a shipped recipe, or a YAML file; flags override it.", autocompletion=completion.recipes
        ),
    ] = None,
    sets: SetsFlag = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Seeds of each setting; its score is their mean.", show_default="one"),
    ] = None,
    trials: TrialsFlag = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Start no trial after this time: 90s, 30m, 2h, 1d.")
    ] = None,
    sampler: SamplerFlag = None,
    pruner: PrunerFlag = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Number of concurrent trials.", show_default="one per GPU, or one")
    ] = None,
    test_file: Annotated[
        str | None, typer.Option(help="Test file on which the best setting of each method is scored once.")
    ] = None,
    storage: StorageFlag = None,
    cache_dir: Annotated[
        str | None, typer.Option(help="Cache folder for factors.", show_default="~/.cache/craft")
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option(help="Folder of the sweep.", show_default="sweeps/TASK-MODEL-TIME")
    ] = None,
    resume: ResumeFlag = False,
    retry_failed: RetryFlag = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the trials, their parameters and the estimated time, without training."),
    ] = False,
    json: JsonFlag = False,
    **settings: Any,
) -> None:
    """Compare settings and methods over several seeds with Optuna, as a grid or sampled, with tables and plots."""
    from craft_cli.cli import console, sweep_console
    from craft_cli.config import load_recipe

    if dry_run and resume:
        raise ConfigError("--dry-run cannot be combined with --resume")
    trusted = bool(settings.pop("trust_remote_code"))
    asked: dict[str, Any] = {
        "settings": {name: value for name, value in settings.items() if value is not None},
        "recipe": load_recipe(recipe) if recipe else {},
        "seeds": None if seeds is None else _seeds(seeds),
        "timeout": None if timeout is None else _seconds(timeout),
    }
    with console.status("starting"):
        from craft_cli.api.sweep import SweepOptions, rehearse, sweep

        options = SweepOptions(
            **asked, sets=sets or [], trials=trials, sampler=sampler, pruner=pruner, jobs=jobs, test_file=test_file,
            storage=storage, cache_dir=cache_dir, trust_remote_code=trusted, output_dir=output_dir, resume=resume,
            retry_failed=retry_failed,
        )  # fmt: skip
    with sweep_console.SweepConsole() as listener:
        result: Any = (rehearse if dry_run else sweep)(options, listener)  # type: ignore[arg-type]  # a Listener, but not imported here
    if json:
        console.print_json(result if dry_run else asdict(result))
    elif dry_run:
        sweep_console.show_rehearsal(result)
    else:
        sweep_console.show(result)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--seeds: expected integers such as 1,2,3, not '{text}'") from None


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not match:
        raise ConfigError(f"--timeout: expected a number with s, m, h or d, such as 90s or 2h, not '{text}'")
    return float(match[1]) * _UNITS[match[2]]
