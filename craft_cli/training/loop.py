"""The training loop, on Accelerate. It is independent of the method and the task type.

N processes with batch B and A accumulated batches compute what one process with batch N A B computes: the rows of an
update are fixed by seed and epoch (`data.batches`), and every loss is a sum divided by the weights of all rows of the
update. An interrupted training resumes from its newest checkpoint and computes exactly the same updates.
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

from craft_cli.data.batches import collate, length_sorted_batches, share_out
from craft_cli.data.tokens import Encoded
from craft_cli.tasks.generation import MATCHES, judged
from craft_cli.tasks.inference import in_order, predict_batches
from craft_cli.training.checkpoint import rng_state, save_checkpoint, untouched_rng
from craft_cli.training.distributed import average_gradients
from craft_cli.training.preparation import Measured
from craft_cli.training.samples import write_samples
from craft_cli.training.setup import Training


def run(training: Training) -> None:
    """Train to the end, until early stopping, or until a signal, which saves a checkpoint."""
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
    """Make one update on these rows, which are shared among the processes."""
    accelerator, optimizer = training.accelerator, training.optimizer
    training.model.train()
    loss = accumulate_gradients(training, rows)
    if training.sharded:  # FSDP does not average whole parameters
        average_gradients(training.trainable)
    norm = accelerator.clip_grad_norm_(training.trainable, training.config.max_grad_norm or math.inf)
    if accelerator.scaler is not None:  # skips an update that overflows, and continues with a smaller scale
        norm = None
    optimizer.step()
    rate = training.schedule.get_last_lr()[0]
    training.schedule.step()
    optimizer.zero_grad()
    training.step += 1
    # One exchange for the loss and for a signal on any process, so that all stop after the same update.
    of_gradient = loss.new_zeros(()) if norm is None else norm.to(loss)
    shared = accelerator.gather(torch.stack([loss, loss.new_tensor(training.stop.received), of_gradient])).view(-1, 3)
    loss_in_units = float(shared[:, 0].mean()) * training.prepared.task.units[1] ** 2
    training.journal.update(
        training.step,
        training.epoch,
        loss_in_units,
        rate,
        training.prepared.train.count(rows),
        float(shared[:, 2].sum()),
    )
    training.stopped = int(shared[:, 1].max())


def accumulate_gradients(training: Training, rows: Sequence[int]) -> Tensor:
    """Forward and backward on this process's batches; returns its part of the mean loss, times the number of processes."""
    accelerator, data = training.accelerator, training.prepared.train
    processes = accelerator.num_processes  # DDP averages over them
    weight = sum(data.weights[row] for row in rows)  # weight of the whole update; every process knows all rows
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
    """The summed loss of a batch; a process without rows contributes one row of weight zero."""
    prepared = training.prepared
    batch = collate(prepared.train, rows or [0], prepared.tokenizer).to(training.accelerator.device)
    loss = prepared.task.loss(training.model, batch)
    return loss if rows else loss * 0.0


def evaluate(training: Training) -> None:
    """Evaluate on the validation rows, and keep the adapter if it is the best so far; a signal cancels the evaluation."""
    with untouched_rng(training.accelerator.device):
        measured = measure(training)
        if measured:
            with training.stop.shielded():
                training.journal.evaluation(training.step, training.epoch, measured)
            training.saved = min(
                training.saved, training.step - 1
            )  # a checkpoint of this update does not include the evaluation


def measure(training: Training) -> Measured | None:
    """Evaluate all validation rows, on every process; None if a signal interrupts it."""
    scores = {}
    for name, encoded in training.prepared.validation.items():
        split_scores = everyones_scores(training, encoded)
        if split_scores is None:
            return None
        training.journal.check_scores(training.step, split_scores)
        scores[name] = split_scores
    measured = training.prepared.measure(scores, calibrate=training.config.calibrate)
    if not training.prepared.asked or training.stopped:
        return measured
    prompts, pattern = training.prepared.asked, training.config.answer_pattern
    share, answers = judged(write_samples(training), measured.gold[: len(prompts)], pattern)
    asked = [{"prompt": training.prepared.tokenizer.decode(prompt)} for prompt in prompts]
    samples = [prompt | answer for prompt, answer in zip(asked, answers, strict=True)]
    return replace(measured, metrics=measured.metrics | {MATCHES: share}, samples=samples)


def everyones_scores(training: Training, encoded: Encoded) -> list[Tensor] | None:
    """The scores of all rows, on every process, each computed once; None if a signal interrupts it."""
    accelerator, sharded, stop = training.accelerator, training.sharded, training.stop
    batches = length_sorted_batches(encoded, training.prepared.eval_batch)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    spare = []
    if sharded:  # every process must run the same number of forwards
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
    arrays = [
        [row.numpy() for row in batch] for batch in outputs[: len(mine)]
    ]  # pickling a view would send the whole tensor
    everyone = gather_object([(mine, arrays, stop.received)])
    training.stopped = max(training.stopped, *(received for _, _, received in everyone))
    if any(len(parts) < len(rows) for rows, parts, _ in everyone):
        return None
    ordered = in_order(
        [part for _, parts, _ in everyone for part in parts],
        [rows for batches, _, _ in everyone for rows in batches],
        len(encoded),
    )
    return [torch.from_numpy(row) for row in ordered]


def save(training: Training) -> None:
    """Save a checkpoint to resume from."""
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
            with training.last.multiplied(
                training.prepared.task.units[1]
            ):  # so that the checkpoint is an ordinary adapter folder
                save_checkpoint(training.run, record, training.adapter, training.optimizer, best, keep)
        training.saved = training.step
