"""Set up a training from its settings, before the loop."""

from __future__ import annotations

import os
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from craft_cli.config import AUTO, RunConfig
from craft_cli.errors import ConfigError
from craft_cli.methods.model_adapter import ModelAdapter
from craft_cli.models.quantization import check_available
from craft_cli.tasks.base import OWN, Task
from craft_cli.training.checkpoint import data_checksum
from craft_cli.training.distributed import from_main, fsdp_asked, shard
from craft_cli.training.head import FEW_ROWS, KEPT, MOST_ROWS, RANDOM, LastLayer, Probe, probe
from craft_cli.training.journal import Journal, chosen_metric
from craft_cli.training.memory import estimate
from craft_cli.training.plan import plan_of
from craft_cli.training.preparation import Prepared, build, prepare, resolved_recipe, within_budget
from craft_cli.training.progress import Listener, Memory
from craft_cli.training.resume import Start, check_state, find_start
from craft_cli.training.run import Run, new_run, usable_output
from craft_cli.training.schedule import Timetable, length_settled, move
from craft_cli.training.signals import StopSignals
from craft_cli.training.trackers import start_trackers, trackers

_PRECISIONS = ("no", "bf16", "fp16")
_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


@dataclass
class Training:
    """A training and its current state.

    Attributes:
        config: all settings, completed by those of a resumed run.
        accelerator: the Accelerator.
        listener: receives progress events; it does nothing except on the main process.
        prepared: rows, checkpoint, method and task.
        model: the model, wrapped for several processes.
        adapter: the adapter on the model.
        last: the last layer of the head.
        optimizer: the wrapped optimizer.
        schedule: the learning rate schedule.
        trainable: all trained parameters.
        timetable: when to evaluate and save.
        journal: log and best adapter.
        run: the run folder; None in a dry run.
        recipe: the settings that reproduce this run.
        update_size: rows per update.
        data: checksum of the rows.
        parameters: trained parameters of `adapter` and `head`.
        sharded: whether FSDP shards the base.
        tracker_id: the same for all parts of a resumed run.
        resumed_at: updates made before this process; None if the run is not resumed.
        began: `time.perf_counter` at the start, shifted by the duration before a resume.
        step: updates made.
        saved: update of the newest checkpoint.
        stopped: number of the signal that stops it, or 0.
        stop: records signals.
        memory: estimated memory of an update.
        updates: the rows of the updates to come.
    """

    config: RunConfig
    accelerator: Accelerator
    listener: Listener
    prepared: Prepared
    model: Any
    adapter: ModelAdapter
    last: LastLayer
    optimizer: Any
    schedule: Any
    trainable: list[Tensor]
    timetable: Timetable
    journal: Journal
    run: Run | None
    recipe: dict[str, Any]
    update_size: int
    data: str
    parameters: dict[str, int]
    sharded: bool
    tracker_id: str = field(default_factory=lambda: secrets.token_hex(8))
    resumed_at: int | None = None
    began: float = field(default_factory=time.perf_counter)
    step: int = 0
    saved: int = 0
    stopped: int = 0
    stop: StopSignals = field(default_factory=StopSignals)
    memory: Memory | None = None
    updates: Iterator[list[int]] = field(default_factory=lambda: iter([]))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return bool(self.accelerator.is_main_process)

    @property
    def run_folder(self) -> Path | None:
        """Path of the run, if there is one."""
        return self.run.path if self.run else None

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.timetable.epoch(self.step)

    @property
    def whole_timetable(self) -> Timetable:
        """Total updates of the run, also in a dry run."""
        return Timetable(replace(self.config, dry_run=False), self.prepared.train.lengths, self.update_size)

    @property
    def evaluation_is_due(self) -> bool:
        """Whether to evaluate this update now."""
        return not self.stopped and self.timetable.evaluates(self.step) and self.journal.evaluated < self.step

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether to save this update now; the update at a stop signal is always saved."""
        due = self.timetable.saves(self.step) or (self.journal.out_of_patience and self.config.save_strategy != "no")
        return bool(self.stopped) or (due and self.saved < self.step)

    @property
    def is_over(self) -> bool:
        """Whether this is the last update."""
        return bool(self.stopped) or self.step == self.timetable.total or self.journal.out_of_patience


def make_accelerator(config: RunConfig) -> Accelerator:
    """Create the Accelerator from the settings and the launcher's environment.

    Raises:
        ConfigError: the configuration is not supported.
    """
    named = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()  # set by `accelerate launch`
    if named not in _PRECISIONS and not (config.bf16 or config.fp16):
        raise ConfigError(f"ACCELERATE_MIXED_PRECISION={named}: craft trains in {', '.join(_PRECISIONS)}; use --bf16")
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else named
    if precision == "fp16" and (config.use_cpu or not torch.cuda.is_available()):
        whence = "--fp16" if config.fp16 else "ACCELERATE_MIXED_PRECISION=fp16"
        raise ConfigError(f"{whence} needs a GPU; on the CPU use --bf16 or neither")
    fsdp_asked(config)  # raises a clear error before Accelerate fails
    for name, engine in _ENGINES.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"{engine} is not supported: remove it (several processes), or use FSDP with fsdp_version: 2"
            )
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=config.use_cpu or not torch.cuda.is_available(),
        log_with=trackers(config.report_to) or None,
        project_dir=".",  # the trackers' folder is set once the run is known
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # the factors never change
    )
    accelerator.gradient_accumulation_steps = 1  # overrides `accelerate launch`, because the loop accumulates itself
    return accelerator


def _by_rows(task: Task) -> bool:
    """Whether the number of rows decides on the number of epochs: for the user's own data, except with language models."""
    return task.name == OWN and not task.generates


def set_up(config: RunConfig, accelerator: Accelerator, listener: Listener, held: ExitStack, runs: Path) -> Training:
    """Set up everything up to the first update, or up to the update to resume at.

    Args:
        config: the given settings.
        accelerator: the Accelerator.
        listener: receives progress events.
        held: exit stack that holds the lock of the run folder.
        runs: folder of runs.

    Raises:
        CraftError: the configuration, model, data or output folder is invalid.
    """
    processes = accelerator.num_processes
    listener = listener if accelerator.is_main_process else Listener()
    config = _as_launched(config, accelerator)
    sharded = fsdp_asked(config)
    _check_devices(config, sharded)
    config = from_main(accelerator, lambda: within_budget(config, listener.preparing))
    start = from_main(accelerator, lambda: find_start(config, processes, held, runs))
    config, state = start.config, start.state
    with accelerator.main_process_first():  # the other processes then use the caches
        prepared = prepare(config, listener.preparing, start.frozen, start.base, start.held_out)
    config = prepared.config

    update_size = prepared.train_batch * config.gradient_accumulation_steps * processes
    if state:  # for any number of processes
        update_size = state.record["update_size"]
    length = config.num_train_epochs
    config = length_settled(config, len(prepared.train), update_size, by_rows=_by_rows(prepared.task))

    set_seed(config.seed)
    listener.preparing("loading the model", 0, 1)
    model, adapter, fresh = build(config, prepared, accelerator.device)
    listener.preparing("loading the model", 1, 1)
    adapter.load_trained_state(start.trained)
    timetable = Timetable(config, prepared.train.lengths, update_size)
    # An invalid metric raises before a previous run is deleted.
    metric = chosen_metric(config, prepared.task, prepared.validation)
    data = data_checksum([prepared.train, *prepared.validation.values()])
    check_state(start, timetable, data)
    recipe = resolved_recipe(config, prepared)

    last = LastLayer(model, adapter.head, fresh)
    last.settle(config, prepared)
    model, optimizer, schedule, trainable = _optimized(config, model, adapter, accelerator, timetable, sharded)
    if state is None or state.step == 0:
        _start_head(config, prepared, last, accelerator, listener, sharded=sharded)
    run = None
    if not config.dry_run:  # not earlier, so that a failing set-up leaves no run behind
        run = Run(from_main(accelerator, lambda: _open_run(start, prepared, recipe, held, runs)), runs)
    writer = run if accelerator.is_main_process else None
    training = Training(
        config=config,
        accelerator=accelerator,
        listener=listener,
        prepared=prepared,
        model=model,
        adapter=adapter,
        optimizer=optimizer,
        schedule=schedule,
        trainable=trainable,
        timetable=timetable,
        journal=Journal(config, prepared, adapter, last, metric, writer, listener, accelerator.log),
        last=last,
        run=run,
        recipe=recipe,
        update_size=update_size,
        data=data,
        parameters={"adapter": adapter.count_parameters(), "head": adapter.count_head_parameters()},
        sharded=sharded,
    )
    auto = length == AUTO and _by_rows(prepared.task)
    training.memory = estimate(training, savings=config.dry_run)
    listener.started(plan_of(training, start, auto=auto))
    training.began = time.perf_counter()
    set_seed(config.seed + 1 + accelerator.process_index)  # again, since imports draw; dropout differs by process
    _resume(training, start)
    training.updates = timetable.updates(after=training.step)
    return training


def _as_launched(config: RunConfig, accelerator: Accelerator) -> RunConfig:
    """The settings with the launcher's choices filled in."""
    return replace(
        config,
        num_processes=accelerator.num_processes if accelerator.num_processes > 1 else None,
        bf16=accelerator.mixed_precision == "bf16",
        fp16=accelerator.mixed_precision == "fp16",
    )


def _check_devices(config: RunConfig, sharded: bool) -> None:
    if config.load_in_4bit or config.load_in_8bit:
        check_available()
    if config.fsdp and not sharded:
        raise ConfigError(
            "--fsdp shards the base over several processes, but there is only one: pass --num-processes N"
        )
    if sharded and (config.torch_compile or config.load_in_4bit or config.load_in_8bit):
        raise ConfigError("FSDP cannot be combined with --torch-compile, --load-in-4bit or --load-in-8bit; remove one")


def _optimized(
    config: RunConfig, model: Any, adapter: ModelAdapter, accelerator: Accelerator, timetable: Timetable, sharded: bool
) -> tuple[Any, Any, Any, list[Tensor]]:
    """Wrap the model for its processes, and create optimizer and schedule; also returns the trained parameters."""
    optimizer = torch.optim.AdamW(_parameter_groups(config, adapter))
    schedule = get_linear_schedule_with_warmup(optimizer, int(config.warmup_ratio * timetable.total), timetable.total)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with warnings.catch_warnings():  # torch 2.13 renames the option, 2.6 does not know the new name
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        if sharded:
            return shard(model, accelerator), accelerator.prepare_optimizer(optimizer), schedule, trainable
        model, prepared = accelerator.prepare(model, optimizer)  # not the schedule, which counts updates
        return model, prepared, schedule, trainable


def _start_head(
    config: RunConfig,
    prepared: Prepared,
    last: LastLayer,
    accelerator: Accelerator,
    listener: Listener,
    *,
    sharded: bool,
) -> None:
    """Initialize the head's last layer: computed once, the same on every process."""
    mean, scale = prepared.task.units
    if last.start == KEPT:
        last.multiply(1 / scale)
        return
    if last.start == RANDOM:
        last.draw(config.seed)
        last.start_at(mean / scale)
        return

    def fitted() -> Probe:
        with accelerator.autocast():
            size, most = prepared.eval_batch, FEW_ROWS if config.dry_run else MOST_ROWS
            return probe(prepared, last, size, accelerator.device, listener.preparing, most)

    if sharded:  # every process holds a part of the base
        own = fitted()
        last.start_from(from_main(accelerator, lambda: own))
    else:
        last.start_from(from_main(accelerator, fitted))


def _resume(training: Training, start: Start) -> None:
    """Restore everything from the newest checkpoint, if there is one, and start the trackers."""
    state, accelerator = start.state, training.accelerator
    if state:
        training.step = training.saved = training.resumed_at = state.step
        training.began -= state.record["seconds"]
        training.tracker_id = state.record["tracker_id"]
        training.journal.restore(state.record["journal"], state.best, state.metrics)
        move(training.schedule, state.step)
    if training.run:
        start_trackers(accelerator, training.run, training.recipe, training.tracker_id, training.step)
    if state:  # last, so that nothing changes the random state afterwards
        process, device = accelerator.process_index, accelerator.device
        state.restore(training.adapter, training.optimizer, accelerator.scaler, process, device)
        training.last.multiply(1 / training.prepared.task.units[1])


def _open_run(start: Start, prepared: Prepared, recipe: dict[str, Any], held: ExitStack, runs: Path) -> Path:
    """Create and lock the run folder."""
    config = start.config
    if start.run and start.state:
        start.run.go_on(recipe)
        return start.run.path
    run = start.run
    if run is None:
        label = f"{prepared.task.name}-{Path(prepared.checkpoint.name).name}"
        run = new_run(config.output_dir, label, runs, overwrite=config.overwrite)
        held.enter_context(run.being_trained())
        if config.output_dir:  # another process may have trained there during preparation
            usable_output(config.output_dir, runs, overwrite=config.overwrite)
    run.start(recipe)
    return run.path


def _parameter_groups(config: RunConfig, adapter: ModelAdapter) -> list[dict[str, Any]]:
    """Parameter groups: the adapter first, then the head; weight decay on matrices only."""
    head = dict(adapter.model.named_parameters())
    tensors = [head[name] for name in adapter.head]
    return [
        {"params": list(adapter.parameters()), "lr": config.adapter_rate, "weight_decay": config.weight_decay},
        {
            "params": [t for t in tensors if t.ndim > 1],
            "lr": config.head_learning_rate,
            "weight_decay": config.weight_decay,
        },
        {"params": [t for t in tensors if t.ndim <= 1], "lr": config.head_learning_rate, "weight_decay": 0.0},
    ]
