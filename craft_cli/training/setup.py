"""What a training works with: made once, from the settings, before its loop."""

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
from craft_cli.tasks.base import OWN
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
    """A training and where it is.

    Attributes:
        config: all settings, completed by those of a resumed run.
        accelerator: of Accelerate.
        listener: receives events; on other processes than the main one it does nothing.
        prepared: rows, checkpoint, method and task.
        model: wrapped for its processes.
        adapter: on the model.
        last: the last layer of the head.
        optimizer: wrapped too.
        schedule: of the learning rate.
        trainable: every parameter that is trained.
        timetable: what happens at which update.
        journal: log and best adapter.
        run: the run folder; None in a dry run.
        recipe: the settings that repeat this run.
        update_size: rows of an update.
        data: checksum of the rows.
        parameters: `adapter` and `head`, numbers trained.
        sharded: whether FSDP shards the base.
        tracker_id: the same for all parts of a resumed run.
        resumed_at: updates made before this process; None where nothing is resumed.
        began: when the training began, by `time.perf_counter`; of a resumed one as if it had never stopped.
        step: updates made.
        saved: update of the newest checkpoint.
        stopped: number of the signal that stops it, or 0.
        stop: remembers signals.
        memory: what an update takes, estimated.
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
        """Of the run that a dry run stands for."""
        return Timetable(replace(self.config, dry_run=False), self.prepared.train.lengths, self.update_size)

    @property
    def evaluation_is_due(self) -> bool:
        """Whether this update is evaluated and has not been yet."""
        return not self.stopped and self.timetable.evaluates(self.step) and self.journal.evaluated < self.step

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether this update is saved and has not been yet; one that a signal stops at is always written."""
        due = self.timetable.saves(self.step) or (self.journal.out_of_patience and self.config.save_strategy != "no")
        return bool(self.stopped) or (due and self.saved < self.step)

    @property
    def is_over(self) -> bool:
        """Whether no update follows."""
        return bool(self.stopped) or self.step == self.timetable.total or self.journal.out_of_patience


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate, as the settings and whoever launched the processes say.

    Raises:
        ConfigError: what was asked for cannot be.
    """
    named = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()  # as `accelerate launch` says
    if named not in _PRECISIONS and not (config.bf16 or config.fp16):
        raise ConfigError(f"ACCELERATE_MIXED_PRECISION={named}: craft trains in {', '.join(_PRECISIONS)}; use --bf16")
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else named
    if precision == "fp16" and (config.use_cpu or not torch.cuda.is_available()):
        whence = "--fp16" if config.fp16 else "ACCELERATE_MIXED_PRECISION=fp16"
        raise ConfigError(f"{whence} needs a GPU; on the CPU use --bf16 or neither")
    fsdp_asked()  # refuses what Accelerate would trip over
    for name, engine in _ENGINES.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"{engine} is not supported: leave it out (several processes), or use FSDP with fsdp_version: 2"
            )
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=config.use_cpu or not torch.cuda.is_available(),
        log_with=trackers(config.report_to) or None,
        project_dir=".",  # the trackers' folder is known when the run is
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # the factors never change
    )
    accelerator.gradient_accumulation_steps = 1  # `accelerate launch` may say otherwise; the loop sums by itself
    return accelerator


def set_up(config: RunConfig, accelerator: Accelerator, listener: Listener, held: ExitStack, runs: Path) -> Training:
    """Everything up to the first update, or up to where a former training stopped.

    Args:
        config: as given.
        accelerator: of Accelerate.
        listener: receives events.
        held: keeps the run folder for this process.
        runs: folder of runs.

    Raises:
        CraftError: the configuration, the model, the data or the output cannot be used.
    """
    processes = accelerator.num_processes
    listener = listener if accelerator.is_main_process else Listener()
    config = _as_launched(config, accelerator)
    sharded = fsdp_asked()
    _check_devices(config, sharded)
    config = from_main(accelerator, lambda: within_budget(config, listener.preparing))
    start = from_main(accelerator, lambda: find_start(config, processes, held, runs))
    config, state = start.config, start.state
    with accelerator.main_process_first():  # the others then find the caches filled
        prepared = prepare(config, listener.preparing, start.frozen, start.base, start.held_out)
    config = prepared.config

    update_size = prepared.train_batch * config.gradient_accumulation_steps * processes
    if state:  # whatever the number of processes is now
        update_size = state.record["update_size"]
    length = config.num_train_epochs
    config = length_settled(config, len(prepared.train), update_size, own=prepared.task.name == OWN)

    set_seed(config.seed)
    listener.preparing("loading the model", 0, 1)
    model, adapter, fresh = build(config, prepared, accelerator.device)
    listener.preparing("loading the model", 1, 1)
    adapter.load_trained_state(start.trained)
    timetable = Timetable(config, prepared.train.lengths, update_size)
    # A wrong metric is refused before a former run makes room.
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
    if not config.dry_run:  # no sooner: what cannot begin leaves no run behind
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
    auto = length == AUTO and prepared.task.name == OWN
    training.memory = estimate(training, savings=config.dry_run)
    listener.started(plan_of(training, start, auto=auto))
    training.began = time.perf_counter()
    set_seed(config.seed + 1 + accelerator.process_index)  # again: imports draw too; dropout differs between processes
    _resume(training, start)
    training.updates = timetable.updates(after=training.step)
    return training


def _as_launched(config: RunConfig, accelerator: Accelerator) -> RunConfig:
    """The settings as they are, whoever launched the processes."""
    return replace(
        config,
        num_processes=accelerator.num_processes if accelerator.num_processes > 1 else None,
        bf16=accelerator.mixed_precision == "bf16",
        fp16=accelerator.mixed_precision == "fp16",
    )


def _check_devices(config: RunConfig, sharded: bool) -> None:
    if config.load_in_4bit or config.load_in_8bit:
        check_available()
    if sharded and (config.torch_compile or config.load_in_4bit or config.load_in_8bit):
        raise ConfigError("FSDP goes with neither --torch-compile nor --load-in-4bit nor --load-in-8bit; leave one out")


def _optimized(
    config: RunConfig, model: Any, adapter: ModelAdapter, accelerator: Accelerator, timetable: Timetable, sharded: bool
) -> tuple[Any, Any, Any, list[Tensor]]:
    """The model wrapped for its processes, its optimizer, the schedule, and what is trained."""
    optimizer = torch.optim.AdamW(_parameter_groups(config, adapter))
    schedule = get_linear_schedule_with_warmup(optimizer, int(config.warmup_ratio * timetable.total), timetable.total)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with warnings.catch_warnings():  # torch 2.13 renames the option, 2.6 does not know the new name
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        if sharded:
            return shard(model, accelerator), accelerator.prepare_optimizer(optimizer), schedule, trainable
        model, prepared = accelerator.prepare(model, optimizer)  # not the schedule: it counts updates
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
    """Give the head's last layer its start: computed once, the same on every process."""
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

    if sharded:  # every process has a part of the base
        own = fitted()
        last.start_from(from_main(accelerator, lambda: own))
    else:
        last.start_from(from_main(accelerator, fitted))


def _resume(training: Training, start: Start) -> None:
    """Put everything back as it was at the newest checkpoint, if there is one, and start the trackers."""
    state, accelerator = start.state, training.accelerator
    if state:
        training.step = training.saved = training.resumed_at = state.step
        training.began -= state.record["seconds"]
        training.tracker_id = state.record["tracker_id"]
        training.journal.restore(state.record["journal"], state.best, state.metrics)
        move(training.schedule, state.step)
    if training.run:
        start_trackers(accelerator, training.run, training.recipe, training.tracker_id, training.step)
    if state:  # last, so that nothing draws random numbers in between
        process, device = accelerator.process_index, accelerator.device
        state.restore(training.adapter, training.optimizer, accelerator.scaler, process, device)
        training.last.multiply(1 / training.prepared.task.units[1])


def _open_run(start: Start, prepared: Prepared, recipe: dict[str, Any], held: ExitStack, runs: Path) -> Path:
    """The run folder, held by this process from now on."""
    config = start.config
    if start.run and start.state:
        start.run.go_on(recipe)
        return start.run.path
    run = start.run
    if run is None:
        label = f"{prepared.task.name}-{Path(prepared.checkpoint.name).name}"
        run = new_run(config.output_dir, label, runs, overwrite=config.overwrite)
        held.enter_context(run.being_trained())
        if config.output_dir:  # another process may have trained there while this one prepared
            usable_output(config.output_dir, runs, overwrite=config.overwrite)
    run.start(recipe)
    return run.path


def _parameter_groups(config: RunConfig, adapter: ModelAdapter) -> list[dict[str, Any]]:
    """The adapter first, then the head; weight decay on matrices only."""
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
