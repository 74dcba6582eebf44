"""The starting point of a training: the base model, an interrupted run, or another run's adapter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from craft_cli.config import (
    ALL_LINEAR,
    GROUPS,
    METHOD_OPTIONS,
    RunConfig,
    flag,
    free_settings,
    option_names,
    parse_settings,
)
from craft_cli.config.names import join_names
from craft_cli.data.sources import DataSource
from craft_cli.errors import ConfigError, FileError
from craft_cli.files import MARKER, RUN, check_inputs, check_place
from craft_cli.methods.adapter_folder import SavedAdapter, read_adapter, read_record
from craft_cli.methods.frozen import Frozen
from craft_cli.models.families import targets_of
from craft_cli.models.hub import resolve
from craft_cli.models.identity import Base
from craft_cli.tasks.glue import task_named
from craft_cli.training.checkpoint import TrainingState, newest_state
from craft_cli.training.find import resumed_run
from craft_cli.training.run import RUNS, Run, find_adapter, usable_output
from craft_cli.training.schedule import Timetable

_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_DATA = ("data_dir", "train_file", "validation_file")


@dataclass(frozen=True)
class Start:
    """The starting point of a training.

    Attributes:
        config: the settings; those of a resumed run are completed from its checkpoint.
        run: the run to resume.
        state: its newest intact checkpoint.
        frozen: frozen tensors of the previous run. Default: prepared, or read from the cache.
        base: base of the previous run.
        trained: trained parameters of another run, by their names in an adapter file.
        held_out: held-out marks of the previous run, see `data.holdout`.
        notes: notes for the user.
    """

    config: RunConfig
    run: Run | None = None
    state: TrainingState | None = None
    frozen: Frozen | None = None
    base: Base | None = None
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    held_out: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


def find_start(config: RunConfig, processes: int, held: ExitStack, runs: Path = RUNS) -> Start:
    """Find the starting point.

    Args:
        config: the given settings.
        processes: number of training processes.
        held: exit stack that holds the lock of a resumed run.
        runs: folder of runs.

    Raises:
        ConfigError: the run to resume has different settings, or the other run's adapter does not fit.
        FileError: the output folder is not empty, or cannot be read.
    """
    start = _resumed(config, processes, held, runs) if config.resume else Start(config)
    output = start.run.path if start.run else Path(config.output_dir).expanduser() if config.output_dir else None
    if output:  # also for a run resumed with its own recipe
        sources = (start.config.data_dir, start.config.train_file, start.config.validation_file, start.config.init_from)
        check_inputs("--output-dir", output, [Path(path).expanduser() for path in sources if path])
    if start.run is None and config.output_dir and not config.dry_run:
        usable_output(config.output_dir, runs, overwrite=config.overwrite)
    if start.state is None and start.config.init_from:
        other = _other_run(start.config, start.config.init_from)
        held_out = _held_out(start.config, other.record.get("training", {}).get("data", {}))
        start = replace(start, frozen=other.frozen, base=other.base, trained=other.trained, held_out=held_out)
    return start


def _resumed(config: RunConfig, processes: int, held: ExitStack, runs: Path) -> Start:
    run = resumed_run(config.output_dir, runs)
    if run.is_run() and not run.is_ours():
        raise FileError(
            f"--resume: {run.path} has a recipe.yaml but no {MARKER}: it is not a run of craft, or the file was lost in copying; "
            f"start a new run with `craft train --recipe {run.path / 'recipe.yaml'} --output-dir` and another folder"
        )
    if not run.is_run():
        where = run.path if config.output_dir else runs
        return Start(config, notes=(f"nothing to resume in {where}, starting from the beginning",))
    check_place(run.path, RUN, overwrite=True)
    run.check_room()
    held.enter_context(run.being_trained())
    state, notes = newest_state(run)
    config = continued(config, run, state, processes)
    if state is None and (notes or run.results() or (run.adapter.is_dir() and config.save_strategy == "no")):
        why = "; ".join(notes) or ("it is finished" if run.results() else "it was trained with --save-strategy no")
        raise FileError(
            f"--resume: {run.path} has no checkpoint to resume from ({why}); choose another --output-dir, or pass --overwrite "
            "to start over in this folder"
        )
    if state is None:
        notes.append(f"{run.path} has no checkpoint yet, starting from the beginning")
        return Start(config, run, notes=tuple(notes))
    held_out = state.record["held_out"]
    return Start(config, run, state, state.frozen, state.base, held_out=held_out, notes=tuple(notes))


def continued(config: RunConfig, run: Run, state: TrainingState | None, processes: int) -> RunConfig:
    """The settings of a resumed run: the given ones, completed by its own.

    Args:
        config: the given settings.
        run: the run to resume.
        state: its newest checkpoint, which stores the settings (recipe.yaml may have been edited). A different batch size,
            accumulation or number of processes is accepted if an update has the same number of rows. Moved data is
            accepted too, because its rows are compared.
        processes: number of training processes.

    Raises:
        ConfigError: a setting that affects the result differs.
    """
    defaults = {field.name: field.default for field in fields(RunConfig)}
    former = defaults | parse_settings(state.record["settings"] if state else run.recipe())
    differing: list[str] = []
    own: dict[str, Any] = {}
    others = {name for method in METHOD_OPTIONS for name in option_names(method)} - set(option_names(config.method))
    for name, group in RunConfig.groups().items():
        if name in free_settings() or name in others or group == GROUPS[-1]:
            continue
        now, then = getattr(config, name), former.get(name)
        if now is None or name == "revision":  # the checkpoint stores the exact commit
            own[name] = then
        elif state and name in _DATA:
            continue
        elif comparable(name, now) != comparable(name, then):
            differing.append(f"{flag(name)} was {_shown(then)}, is {_shown(now)}")
    each: Any = config.per_device_train_batch_size or former["per_device_train_batch_size"]
    batch = each * config.gradient_accumulation_steps
    if state and batch * processes == state.record["update_size"]:
        differing = [line for line in differing if not line.startswith(tuple(map(flag, _BATCH)))]
    if config.eval_strategy == "no" and state and state.record["journal"]["best"]:
        differing.append(f"{flag('eval_strategy')} was {former['eval_strategy']}, is no")
    if differing:
        raise ConfigError(
            f"--resume: {run.path} has different settings: {', '.join(differing)}; "
            "use the original settings, or choose another --output-dir"
        )
    return replace(config, **own)


def check_state(start: Start, timetable: Timetable, data: str) -> None:
    """Refuse to resume with different rows, or beyond the last update.

    Args:
        start: starting point of the training.
        timetable: timetable of the training.
        data: checksum of the training and validation rows.

    Raises:
        ConfigError: the checkpoint does not match.
    """
    if not (start.state and start.run):
        return
    if start.state.record["data"] != data:
        raise ConfigError(
            f"--resume: the training or validation rows of {start.run.path} have changed; "
            "use the original data, or choose another --output-dir"
        )
    if start.state.step > timetable.total:
        raise ConfigError(
            f"--resume: {start.run.path} has already made {start.state.step:,} updates, but --num-train-epochs or "
            f"--max-steps end it at {timetable.total:,}; increase them"
        )


def comparable(name: str, value: Any) -> Any:
    """Normalize a setting for comparison: absolute paths, canonical task names."""
    if value is None:
        return None
    if name in _DATA or (name in ("model", "init_from") and Path(value).expanduser().is_dir()):
        return str(Path(value).expanduser().resolve())
    if name == "task":
        return task_named(value).name
    return value


def _shown(value: Any) -> str:
    return "not given" if value is None else join_names(map(str, value)) if isinstance(value, tuple) else str(value)


def _other_run(config: RunConfig, path: str) -> SavedAdapter:
    """Read the adapter of another run, and check that method, projections and options match the settings."""
    folder = adapter_to_start_from(path)
    saved = read_adapter(folder, config.cache_dir, make=True, trusted=config.trust_remote_code)
    if saved.method.name != config.method:
        raise ConfigError(f"--init-from: {path} was trained by {saved.method.name}; pass --method {saved.method.name}")
    targets = config.targets
    if targets == (ALL_LINEAR,):
        base = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
        targets = targets_of(base.config(), targets)
    if saved.frozen.targets != targets:
        theirs = ",".join(saved.frozen.targets)
        raise ConfigError(f"--init-from: {path} adapts {theirs}; pass --targets {theirs}")
    problem = saved.method.unlike(saved.frozen, saved.options, config.method_options)
    if problem:
        raise ConfigError(f"--init-from: {path} {problem}")
    return saved


def _held_out(config: RunConfig, record: Mapping[str, Any]) -> Mapping[str, str] | None:
    """The held-out marks of the other run, if it used the same rows, so that held-out rows stay held out.

    Args:
        config: settings of this run.
        record: data record of the other run.
    """
    mine, former = DataSource.of(config).resolved(), DataSource.of(record).resolved()
    given = [name for name in ("text_columns", "label_column") if getattr(mine, name)]
    names = ("data_dir", "train_file", "dataset_name", "dataset_config_name", "train_split", *given)
    return former.held_out if all(getattr(mine, name) == getattr(former, name) for name in names) else None


def inherited_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings inherited from a previous run; given settings override them.

    Args:
        settings: the given settings; `resume` and `output_dir`, or `init_from`, name the run.

    Raises:
        FileError: `init_from` is neither a run nor an adapter.
        ConfigError: the recipe of the run is damaged.
    """
    if settings.get("resume"):
        run = resumed_run(settings.get("output_dir"))
        if run.is_run():
            return run.recipe()
    if settings.get("init_from"):
        recipe = read_record(adapter_to_start_from(settings["init_from"])).get("training", {}).get("recipe", {})
        method = str(recipe.get("method", RunConfig.method))
        kept = ("model", "revision", "method", "targets", *option_names(method, start=False))
        return {name: recipe[name] for name in kept if name in recipe}
    return {}


def adapter_to_start_from(path: str) -> Path:
    """The adapter folder given by `--init-from`.

    Raises:
        FileError: the path is neither a run nor an adapter.
    """
    folder = find_adapter(Path(path).expanduser())
    if folder is None:
        raise FileError(f"--init-from: {path} is neither a run nor an adapter; pass the folder of one")
    return folder
