"""The plan of a training, for its header."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate import Accelerator

from craft_cli.errors import listed
from craft_cli.training.distributed import held_here
from craft_cli.training.head import KEPT, MOST_LABELS, PROBE, RANDOM
from craft_cli.training.preparation import describe_tokens
from craft_cli.training.progress import Plan

if TYPE_CHECKING:
    from craft_cli.training.resume import Start
    from craft_cli.training.setup import Training


def _devices(accelerator: Accelerator) -> str:
    kind = "GPU" if accelerator.device.type == "cuda" else accelerator.device.type.upper()
    precision = "" if accelerator.mixed_precision == "no" else f", {accelerator.mixed_precision}"
    return f"{accelerator.num_processes} x {kind}{precision}"


def plan_of(training: Training, start: Start, *, auto: bool) -> Plan:
    """Build the plan of a training.

    Args:
        training: the training, set up.
        start: its starting point.
        auto: whether craft chose the number of epochs.
    """
    config, prepared, accelerator = training.config, training.prepared, training.accelerator
    update_size = training.update_size
    described = prepared.method.describe(prepared.method.settings(prepared.frozen, config.method_options))
    each, processes = prepared.train_batch, accelerator.num_processes
    effective = f"{update_size} = {each} per device"
    if processes > 1:
        effective += f" x {processes} processes"
    if config.gradient_accumulation_steps > 1:
        effective += f" x {config.gradient_accumulation_steps} accumulated"
    if update_size != each * processes * config.gradient_accumulation_steps:
        effective = f"{update_size}, as in the original run; at most {each} per device at once"
    notes = [*start.notes, *prepared.notes]
    headless = not prepared.task.trains_head
    if config.head_start != RANDOM and training.last.start == RANDOM:
        why = (
            "the head does not end in a linear layer"
            if training.last.name is None
            else f"more than {MOST_LABELS:,} labels"
        )
        notes.append(f"{why}, so no probe is fitted (--head-start random)")
    if training.last.start == KEPT and not headless:
        known = listed(prepared.task.answers, 3)
        notes.append(
            f"the base checkpoint's head is kept, because it already has {known}; --head-start probe fits a new one"
        )
    return Plan(
        model=prepared.checkpoint.name,
        task=prepared.task.name,
        labels=prepared.task.answers,
        train_examples=len(prepared.train.row_lengths),
        eval_examples=prepared.eval_examples,
        tokens=describe_tokens(config, prepared, update_size),
        method=described.title,
        targets=prepared.frozen.targets,
        sizes=described.settings + prepared.method.reduced(prepared.frozen, config.method_options),
        adapter_parameters=training.parameters["adapter"],
        head_parameters=training.parameters["head"],
        head_start=""
        if headless
        else {PROBE: ", fitted first", KEPT: ", the checkpoint's own"}.get(training.last.start, ""),
        devices=_devices(accelerator) + (held_here(training.model) if training.sharded else ""),
        effective_batch=effective,
        updates=training.timetable.total,
        evaluations=sum(map(training.timetable.evaluates, range(training.step + 1, training.timetable.total + 1))),
        length=_length(training, auto=auto),
        done=start.state.step if start.state else 0,
        memory=training.memory,
        output=str(training.run.path) if training.run else None,
        notes=notes,
        example=prepared.task.example(prepared.train, prepared.tokenizer) if config.dry_run else (),
    )


def _length(training: Training, *, auto: bool) -> str:
    """The number of updates, and the reason."""
    config, timetable = training.config, training.whole_timetable
    patience, epochs = config.early_stopping_patience or 0, config.num_train_epochs
    why = []
    if config.max_steps and timetable.epoch(timetable.total) < float(epochs):
        why.append(f"--max-steps, less than {epochs:g} epochs")
    elif auto:
        why.append(f"{epochs:g} epochs, from the number of rows")
    early = 0 < patience <= timetable.evaluations
    if early:
        misses = f"{patience} evaluations" if patience > 1 else "an evaluation"
        why.append(f"stops early after {misses} without improvement")
    return f"{timetable.total:,}{' at most' if early else ''}{': ' if why else ''}{'; '.join(why)}"
