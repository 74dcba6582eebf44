"""What a training starts from: nothing, a run that was cut, or the transforms of another run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from craft_cli.config import GROUPS, RunConfig, flag, free_settings, parse_settings
from craft_cli.errors import ConfigError, FileError
from craft_cli.factors import Factors
from craft_cli.ranks import Ranks
from craft_cli.runs import RUNS, Run, check_output, find_adapter
from craft_cli.saved import read_adapter
from craft_cli.tasks import task_named
from craft_cli.training_state import TrainingState, newest_state

_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_PATHS = ("data_dir", "train_file", "validation_file", "init_from")


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Attributes:
        config: the settings; of a resumed run completed by what it was started with.
        run: the run to go on with.
        state: its newest whole checkpoint.
        factors: the basis to train in; decomposed or taken from the cache without.
        transforms: K of another run, by their names in an adapter's file.
        notes: what the user should know.
    """

    config: RunConfig
    run: Run | None = None
    state: TrainingState | None = None
    factors: Factors | None = None
    transforms: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_start(config: RunConfig, processes: int, held: ExitStack) -> Start:
    """Look at what there is.

    Args:
        config: as given.
        processes: that will train.
        held: keeps a run that goes on from being trained twice.

    Raises:
        ConfigError: the run to resume was trained with other settings, or the other run's transforms do not fit.
        FileError: the output folder is taken, or something in it cannot be read.
    """
    start = _resumed(config, processes, held) if config.resume else Start(config)
    if start.run is None and config.output_dir and not config.dry_run:
        check_output(config.output_dir, overwrite=config.overwrite)
    if start.state is None and start.config.init_from:
        factors, transforms = _other_run(start.config, start.config.init_from)
        start = replace(start, factors=factors, transforms=transforms)
    return start


def _resumed(config: RunConfig, processes: int, held: ExitStack) -> Start:
    named = Path(config.output_dir).expanduser() if config.output_dir else RUNS / "latest"
    run = Run(named if config.output_dir else Path(os.path.relpath(named.resolve())))
    if not run.is_run():
        where = run.path if config.output_dir else RUNS
        return Start(config, notes=(f"nothing to resume in {where}: starting from the beginning",))
    held.enter_context(run.being_trained())
    state, notes = newest_state(run)
    update_size = state.record["update_size"] if state else None
    config = continued(config, run, update_size, processes)
    if state is None:
        notes.append(f"{run.path} has no checkpoint yet: starting from the beginning")
        return Start(config, run, notes=tuple(notes))
    return Start(config, run, state, state.factors, notes=tuple(notes))


def continued(config: RunConfig, run: Run, update_size: int | None, processes: int) -> RunConfig:
    """The settings of a resumed run: those given, where they compute the same, and its own where none are given.

    Args:
        config: as given.
        run: the run to go on with.
        update_size: rows of one update so far. Another batch size that, with accumulation and processes, makes the same
            is no change, nor is another number of processes.
        processes: that will train.

    Raises:
        ConfigError: settings differ that change what is computed.
    """
    former = parse_settings(run.recipe())
    differing: list[str] = []
    own: dict[str, Any] = {}
    for name, group in RunConfig.groups().items():
        if name in free_settings() or group == GROUPS[-1]:
            continue
        now, then = getattr(config, name), former.get(name)
        if now is None or name == "revision":  # its recipe knows the very commit
            own[name] = then
        elif _comparable(name, now) != _comparable(name, then):
            differing.append(f"{flag(name)} was {_shown(then)}, is {_shown(now)}")
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if batch * processes == update_size:
        differing = [line for line in differing if not line.startswith(tuple(map(flag, _BATCH)))]
    if differing:
        raise ConfigError(
            f"--resume: {run.path} cannot go on with other settings: {', '.join(differing)}; "
            "give the former ones, or choose another --output-dir"
        )
    return replace(config, **own)


def _comparable(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _PATHS or (name == "model" and Path(value).expanduser().is_dir()):
        return str(Path(value).expanduser().resolve())
    if name == "task":
        return task_named(value).name
    return value


def _shown(value: Any) -> str:
    return "not given" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _other_run(config: RunConfig, path: str) -> tuple[Factors, dict[str, Tensor]]:
    """Factors and transforms of a run or adapter, in the projections and at the ranks of these settings."""
    folder = find_adapter(Path(path).expanduser())
    if folder is None:
        raise FileError(f"--init-from: {path} is no run and no adapter")
    saved = read_adapter(folder, config.cache_dir)
    factors = saved.factors
    if factors.targets != config.targets:
        raise ConfigError(
            f"--init-from: {path} adapts {','.join(factors.targets)}; give --targets {','.join(factors.targets)}"
        )
    for target, decomposition in factors.decompositions.items():
        if config.ranks.lowered(decomposition.shape) != factors.ranks(target):
            ranks = Ranks(*map(max, *(factors.ranks(name) for name in factors.targets), (0, 0, 0)))
            raise ConfigError(f"--init-from: {path} has the ranks {factors.ranks(target)}; give --ranks {ranks}")
    return factors, {
        f"transform.{target}.{mode}": k for target, modes in saved.transforms.items() for mode, k in modes.items()
    }
