"""Use-case: train an adapter and a head. One explicit loop on Accelerate, to be read from top to bottom.

N processes with batch B and A accumulated batches compute what one process with batch N A B computes: the rows of an
update are fixed by seed and epoch (`batches`), every loss is a sum divided by the weights of the whole update's rows.
A training that was cut goes on from its newest checkpoint (`training_state`) and computes what it would have computed.
"""

from __future__ import annotations

import contextlib
import secrets
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import gather_object, set_seed
from transformers import get_linear_schedule_with_warmup

from craft_cli.config import RunConfig
from craft_cli.data.batches import length_sorted_batches, share_out
from craft_cli.data.tokens import collate
from craft_cli.errors import ConfigError
from craft_cli.models.quantization import check_available
from craft_cli.tasks.inference import in_order, predict_batches
from craft_cli.training.checkpoint import data_checksum, rng_state, save_checkpoint, untouched_rng
from craft_cli.training.compile import refusal
from craft_cli.training.distributed import _from_main, average_gradients, fsdp_asked, held_here, shard
from craft_cli.training.journal import Journal, chosen_metric
from craft_cli.training.progress import Listener, TrainResult
from craft_cli.training.resume import check_state, find_start
from craft_cli.training.run import Run
from craft_cli.training.schedule import Timetable, _move
from craft_cli.training.setup import (
    Prepared,
    _accelerator,
    _devices,
    _open_run,
    _parameter_groups,
    _plan,
    build,
    prepare,
    resolved_recipe,
)
from craft_cli.training.signals import StopSignals, end_by
from craft_cli.training.trackers import finish_trackers, start_trackers


def train(config: RunConfig, listener: Listener | None = None) -> TrainResult:
    """Fine-tune a transformer for a task.

    Under `accelerate launch` or `torchrun` each process calls this and they join; only the main one writes and reports.

    Raises:
        CraftError: the configuration, the model or the data cannot be used, or the loss is no longer finite.
        KeyboardInterrupt: Ctrl-C, after the running update and a checkpoint.
        SystemExit: SIGTERM, likewise; the code is 143.
    """
    shared = is_initialized()
    try:
        with contextlib.ExitStack() as held:
            return _train(config, _accelerator(config), listener or Listener(), held)
    except Exception as error:
        refused = refusal(error) if config.torch_compile else None
        if refused is None:
            raise
        raise refused from error
    finally:
        if not shared:  # a second run in this interpreter may want another precision
            AcceleratorState._reset_state()


def _train(config: RunConfig, accelerator: Accelerator, listener: Listener, held: contextlib.ExitStack) -> TrainResult:
    main, device, processes = accelerator.is_main_process, accelerator.device, accelerator.num_processes
    config = replace(  # as it is, whoever launched it
        config,
        num_processes=processes if processes > 1 else None,
        bf16=accelerator.mixed_precision == "bf16",
        fp16=accelerator.mixed_precision == "fp16",
    )
    listener = listener if main else Listener()
    sharded = fsdp_asked()
    if config.load_in_4bit or config.load_in_8bit:
        check_available()
    if sharded and (config.torch_compile or config.load_in_4bit or config.load_in_8bit):
        raise ConfigError("FSDP goes with neither --torch-compile nor --load-in-4bit nor --load-in-8bit; leave one out")
    start = _from_main(accelerator, lambda: find_start(config, processes, held))
    config, state = start.config, start.state
    with accelerator.main_process_first():  # the others then find the caches filled
        prepared = prepare(config, listener.preparing, start.factors)

    set_seed(config.seed)
    model, adapter = build(config, prepared, device)
    adapter.load_trained_state(start.transforms)
    update_size = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    if state:  # whatever the number of processes is now
        update_size = state.record["update_size"]
    timetable = Timetable(config, prepared.train.lengths, update_size)
    metric = chosen_metric(config, prepared)  # a wrong one is refused before a former run makes room
    data = data_checksum([prepared.train, *prepared.validation.values()])
    check_state(start, timetable, data)
    recipe = resolved_recipe(config, prepared)
    parameters = {"adapter": adapter.count_parameters(), "head": adapter.count_head_parameters()}
    run = None
    if not config.dry_run:
        run = Run(_from_main(accelerator, lambda: _open_run(start, prepared, recipe, held)))

    optimizer = torch.optim.AdamW(_parameter_groups(config, adapter))
    schedule = get_linear_schedule_with_warmup(optimizer, int(config.warmup_ratio * timetable.total), timetable.total)
    with warnings.catch_warnings():  # torch 2.13 renames the option, 2.6 does not know the new name
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        if sharded:
            model, prepared_optimizer = shard(model, accelerator), accelerator.prepare_optimizer(optimizer)
        else:
            model, prepared_optimizer = accelerator.prepare(model, optimizer)  # not the schedule: it counts updates
    devices = _devices(accelerator) + (held_here(model) if sharded else "")
    listener.started(_plan(start, prepared, accelerator, parameters, update_size, timetable, devices, run))
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.manual_seed(config.seed + 1 + accelerator.process_index)  # dropout differs between processes
    journal = Journal(config, prepared, adapter, metric, run if main else None, listener, accelerator.log)
    step, spent, tracker_id = 0, 0.0, secrets.token_hex(8)
    if state:
        step, spent, tracker_id = state.step, state.record["seconds"], state.record["tracker_id"]
        journal.restore(state.record["journal"], state.best, state.metrics)
        _move(schedule, step)
    if run:
        start_trackers(accelerator, run, recipe, tracker_id, step)
    if state:  # last, so that nothing draws random numbers in between
        state.restore(adapter, prepared_optimizer, accelerator.scaler, accelerator.process_index, device)

    began, saved, stopped = time.perf_counter() - spent, step, 0
    updates = timetable.updates(after=step)

    def save() -> None:
        nonlocal saved
        rng = gather_object([rng_state(device)])
        if run and main:
            record = {
                "step": step, "settings": recipe, "update_size": update_size, "data": data,
                "seconds": time.perf_counter() - began, "journal": journal.record(), "rng": rng, "tracker_id": tracker_id,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            }  # fmt: skip
            save_checkpoint(run, record, adapter, prepared_optimizer, journal.best_state, config.save_total_limit)
        saved = step

    stop = StopSignals()
    try:
        with stop:
            while True:
                if not stopped and timetable.evaluates(step) and journal.evaluated < step:
                    with untouched_rng(device):
                        metrics, stopped = _evaluate(model, prepared, config, accelerator, listener, stop, sharded)
                        if metrics:
                            with stop.shielded():
                                journal.evaluation(step, timetable.epoch(step), metrics)
                            saved = min(saved, step - 1)  # a checkpoint of this update does not know of it
                if stopped:
                    listener.stopping()
                due = timetable.saves(step) or (journal.out_of_patience and config.save_strategy != "no")
                if stopped or (due and saved < step):
                    with stop.shielded():
                        save()
                if stopped or step == timetable.total or journal.out_of_patience:
                    break

                rows = next(updates)
                model.train()
                loss = torch.zeros((), device=device)
                size = config.per_device_train_batch_size
                weight = sum(prepared.train.weights[row] for row in rows)  # of all processes and batches
                batches = share_out(rows, size, process=accelerator.process_index, processes=processes)
                for number, batch in enumerate(batches, start=1):
                    with contextlib.nullcontext() if number == len(batches) else accelerator.no_sync(model):
                        with accelerator.autocast():
                            part = _batch_loss(model, prepared, batch, device)
                        part = part * (processes / weight if weight else 0.0)  # DDP takes the mean over processes
                        accelerator.backward(part)
                        loss += part.detach()
                if sharded:  # it leaves whole parameters alone
                    average_gradients(trainable)
                if config.max_grad_norm:
                    accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
                prepared_optimizer.step()
                rate = schedule.get_last_lr()[0]
                schedule.step()
                prepared_optimizer.zero_grad()
                step += 1
                # One exchange for the loss and for a signal on any process, so that all stop after the same update.
                told = accelerator.gather(torch.stack([loss, loss.new_tensor(stop.received)])).view(-1, 2)
                journal.update(step, timetable.epoch(step), float(told[:, 0].mean()), rate, len(rows))
                stopped = int(told[:, 1].max())
    except KeyboardInterrupt:  # the second one: at once
        listener.interrupted(step, run.path if run else None, resumable=saved > 0)
        raise

    if journal.out_of_patience and state and step == state.step:
        listener.noticed("patience was over before: nothing is left to train; --early-stopping-patience can be raised")
    if run and main and (stopped or config.eval_strategy == "no"):
        journal.keep_last(timetable.epoch(step))
    result = TrainResult(
        output=str(run.path) if run else None,
        metrics=journal.best,
        baseline=_baseline(prepared),
        epoch=journal.best_epoch,
        updates=step,
        seconds=time.perf_counter() - began,
        parameters=parameters,
        examples=prepared.eval_examples,
        stopped_early=step < timetable.total and journal.out_of_patience,
    )
    if config.dry_run:
        encoded = next(iter(prepared.validation.values()))
        batch = list(range(min(len(encoded), config.per_device_eval_batch_size)))
        predict_batches(accelerator.unwrap_model(model), prepared.task, encoded, [batch], prepared.tokenizer, device)
    elif stopped:
        listener.interrupted(step, run.path if run else None, resumable=True)
    elif run and main:
        run.write_results(asdict(result))
    problem = finish_trackers(accelerator)
    if problem:
        listener.noticed(problem)
    accelerator.wait_for_everyone()
    accelerator.free_memory(accelerator.unwrap_model(model), prepared_optimizer)
    del model  # DDP before its group
    accelerator.end_training()
    if stopped:
        raise end_by(stopped)
    return result


# -- before the loop ----------------------------------------------------------------------------------------------------


# -- in the loop --------------------------------------------------------------------------------------------------------


def _batch_loss(model: Any, prepared: Prepared, rows: Sequence[int], device: torch.device) -> torch.Tensor:
    """Sum of the rows' losses; a process without rows takes part with a row of weight zero."""
    batch = collate(prepared.train, rows or [0], prepared.tokenizer).to(device)
    loss = prepared.task.loss(model, batch)
    return loss if rows else loss * 0.0


def _evaluate(
    model: Any,
    prepared: Prepared,
    config: RunConfig,
    accelerator: Accelerator,
    listener: Listener,
    stop: StopSignals,
    sharded: bool,
) -> tuple[dict[str, float] | None, int]:
    """Metrics, on every process, each row computed once; None where a signal cut it. And the signal."""
    scores, stopped = {}, 0
    for name, encoded in prepared.validation.items():
        batches = length_sorted_batches(encoded, config.per_device_eval_batch_size)
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        spare = []
        if sharded:  # every process must run as many forwards, to the end
            spare = batches[:1] * (-(-len(batches) // accelerator.num_processes) - len(mine))
        with accelerator.autocast():
            outputs = predict_batches(
                accelerator.unwrap_model(model),
                prepared.task,
                encoded,
                mine + spare,
                prepared.tokenizer,
                accelerator.device,
                listener.evaluating,
                cancelled=lambda: stop.received and not sharded,
            )
        arrays = [[row.numpy() for row in batch] for batch in outputs[: len(mine)]]  # a view of a tensor travels whole
        everyone = gather_object([(mine, arrays, stop.received)])
        stopped = max(stopped, *(received for _, _, received in everyone))
        if any(len(parts) < len(rows) for rows, parts, _ in everyone):
            return None, stopped
        found = in_order(
            [part for _, parts, _ in everyone for part in parts],
            [rows for batches, _, _ in everyone for rows in batches],
            len(encoded),
        )
        scores[name] = [torch.from_numpy(row) for row in found]
    return prepared.measure(scores), stopped


def _baseline(prepared: Prepared) -> float:
    gold = next(iter(prepared.validation.values())).labels
    return prepared.task.baseline(prepared.train.labels or [], gold or [])
