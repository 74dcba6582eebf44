"""The training loop on Accelerate. It knows nothing of the method and nothing of the kind of work.

N processes with batch B and A accumulated batches compute what one process with batch N A B computes: the rows of an
update are fixed by seed and epoch (`data.batches`), every loss is a sum, divided by the weights of all rows of the update.
An interrupted training resumes from its newest checkpoint and computes what it would have computed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from torch import Tensor

from craft_cli.data.batches import collate, collate_packed, length_sorted_batches, share_out
from craft_cli.data.tokens import Encoded
from craft_cli.tasks.generation import MATCHES, judged
from craft_cli.tasks.inference import in_order, predict_batches
from craft_cli.training.checkpoint import rng_state, save_checkpoint, untouched_rng
from craft_cli.training.distributed import average_gradients
from craft_cli.training.preparation import Measured
from craft_cli.training.samples import write_samples
from craft_cli.training.setup import Training


def run(training: Training) -> None:
    """Train to the end, until patience is out, or until a signal comes; then a checkpoint holds all that was done."""
    with training.stop:
        while True:
            if training.evaluation_is_due:
                evaluate(training)
            if training.stopped:
                training.listener.stopping()
            if training.checkpoint_is_due:
                save(training)
            if training.is_over:
                return
            if training.step == 0:
                training.last.begin()
            update(training, next(training.updates))


def update(training: Training, rows: Sequence[int]) -> None:
    """One update on these rows, of which each process takes its share."""
    accelerator, optimizer = training.accelerator, training.optimizer
    training.model.train()
    loss = accumulate_gradients(training, rows)
    if training.sharded:  # it leaves whole parameters alone
        average_gradients(training.trainable)
    norm = accelerator.clip_grad_norm_(training.trainable, training.config.max_grad_norm or math.inf)
    if accelerator.scaler is not None:  # it leaves out an update that overflows, and goes on with a smaller scale
        norm = None
    optimizer.step()
    rate = training.schedule.get_last_lr()[0]
    training.schedule.step()
    optimizer.zero_grad()
    training.step += 1
    # One exchange for the loss and for a signal on any process, so that all stop after the same update.
    of_gradient = loss.new_zeros(()) if norm is None else norm.to(loss)
    told = accelerator.gather(torch.stack([loss, loss.new_tensor(training.stop.received), of_gradient])).view(-1, 3)
    loss_in_units = float(told[:, 0].mean()) * training.prepared.task.units[1] ** 2
    training.journal.update(training.step, training.epoch, loss_in_units, rate, len(rows), float(told[:, 2].sum()))
    training.stopped = int(told[:, 1].max())


def accumulate_gradients(training: Training, rows: Sequence[int]) -> Tensor:
    """Forward and backward on this process's batches; the part of the mean loss that it computed, times the processes."""
    accelerator, data = training.accelerator, training.prepared.train
    processes = accelerator.num_processes  # DDP takes the mean over them
    weight = sum(data.weights[row] for row in rows)  # of the whole update: every process knows all rows
    scale = processes / weight if weight else 0.0
    batches = share_out(rows, training.prepared.train_batch, process=accelerator.process_index, processes=processes)
    loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        with contextlib.nullcontext() if number == len(batches) else accelerator.no_sync(training.model):
            with accelerator.autocast():
                part = batch_loss(training, batch)
            part = part * scale
            accelerator.backward(part)
            loss += part.detach()
    return loss


def batch_loss(training: Training, rows: Sequence[int]) -> Tensor:
    """Sum of the rows' losses; a process without rows takes part with a row that counts nothing."""
    prepared = training.prepared
    together = collate_packed if training.config.packing else collate
    batch = together(prepared.train, rows or [0], prepared.tokenizer).to(training.accelerator.device)
    loss = prepared.task.loss(training.model, batch)
    return loss if rows else loss * 0.0


def evaluate(training: Training) -> None:
    """Measure on the validation rows, and keep the adapter where it is the best so far; a signal ends it without a result."""
    with untouched_rng(training.accelerator.device):
        measured = measure(training)
        if measured:
            with training.stop.shielded():
                training.journal.evaluation(training.step, training.epoch, measured)
            training.saved = min(training.saved, training.step - 1)  # a checkpoint of this update does not know of it


def measure(training: Training) -> Measured | None:
    """What all validation rows say, on every process; None where a signal came in between."""
    scores = {}
    for name, encoded in training.prepared.validation.items():
        found = everyones_scores(training, encoded)
        if found is None:
            return None
        training.journal.check_scores(training.step, found)
        scores[name] = found
    measured = training.prepared.measure(scores, calibrate=training.config.calibrate)
    if not training.prepared.asked or training.stopped:
        return measured
    share, samples = judged(
        write_samples(training), measured.gold[: len(training.prepared.asked)], training.config.answer_pattern
    )
    return replace(measured, metrics=measured.metrics | {MATCHES: share}, samples=samples)


def everyones_scores(training: Training, encoded: Encoded) -> list[Tensor] | None:
    """The scores of all rows, on every process, each computed once; None where a signal came in between."""
    accelerator, sharded, stop = training.accelerator, training.sharded, training.stop
    batches = length_sorted_batches(encoded, training.prepared.eval_batch)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    spare = []
    if sharded:  # every process must run as many forwards, to the end
        spare = batches[:1] * (-(-len(batches) // accelerator.num_processes) - len(mine))
    with accelerator.autocast():
        outputs = predict_batches(
            accelerator.unwrap_model(training.model),
            training.prepared.task,
            encoded,
            mine + spare,
            training.prepared.tokenizer,
            accelerator.device,
            training.listener.evaluating,
            cancelled=lambda: stop.received and not sharded,
        )
    arrays = [[row.numpy() for row in batch] for batch in outputs[: len(mine)]]  # a view of a tensor travels whole
    everyone = gather_object([(mine, arrays, stop.received)])
    training.stopped = max(training.stopped, *(received for _, _, received in everyone))
    if any(len(parts) < len(rows) for rows, parts, _ in everyone):
        return None
    found = in_order(
        [part for _, parts, _ in everyone for part in parts],
        [rows for batches, _, _ in everyone for rows in batches],
        len(encoded),
    )
    return [torch.from_numpy(row) for row in found]


def save(training: Training) -> None:
    """Write a checkpoint of all that is needed to go on from here."""
    accelerator = training.accelerator
    with training.stop.shielded():
        rng = gather_object([rng_state(accelerator.device)])
        if training.run and accelerator.is_main_process:
            training.journal.check_weights(training.step)
            record = {
                "step": training.step,
                "settings": training.recipe,
                "update_size": training.update_size,
                "data": training.data,
                "held_out": dict(training.prepared.rows["held_out"]),
                "seconds": time.perf_counter() - training.began,
                "journal": training.journal.record(),
                "rng": rng,
                "tracker_id": training.tracker_id,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            }
            keep, best = training.config.save_total_limit, training.journal.best_state
            with training.last.multiplied(training.prepared.task.units[1]):  # the folder is an adapter like any other
                save_checkpoint(training.run, record, training.adapter, training.optimizer, best, keep)
        training.saved = training.step
