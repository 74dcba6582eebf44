"""Use-case: train an adapter and a head. One explicit loop on Accelerate, to be read from top to bottom.

N processes with batch B and A accumulated batches compute what one process with batch N A B computes: the rows of an
update are fixed by seed and epoch (`batches`), every loss is a sum over rows divided by the rows of the whole update.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from transformers import get_linear_schedule_with_warmup

from craft_cli.attached import ModelAdapter
from craft_cli.batches import plan_epoch, share_out
from craft_cli.cards import model_card
from craft_cli.config import RunConfig
from craft_cli.errors import ConfigError, CraftError
from craft_cli.inference import in_order, length_sorted_batches, predict_batches
from craft_cli.launch import ctrl_c_waits
from craft_cli.objectives import balanced_weights, constant_metric, summed_loss
from craft_cli.plots import training_curve
from craft_cli.preparation import Prepared, build, data_record, describe_tokens, prepare, resolved_recipe
from craft_cli.runs import Run, check_output, start_run
from craft_cli.tokens import Encoded, collate


@dataclass(frozen=True)
class Plan:
    """What is about to happen, for the header of a run."""

    model: str
    task: str
    labels: tuple[str, ...]
    train_examples: int
    eval_examples: int
    tokens: str
    targets: tuple[str, ...]
    ranks: str
    adapter_parameters: int
    head_parameters: int
    devices: str
    effective_batch: str
    updates: int
    output: str | None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TrainResult:
    """What a run reached.

    Attributes:
        output: the run folder; None for a dry run.
        metrics: of the best evaluation.
        baseline: the first metric for always answering the same: the most frequent label or the mean of the training rows.
        epoch: of the best evaluation.
        updates: made in all.
        seconds: of the loop, evaluations included.
        parameters: `adapter` and `head`, numbers trained.
        examples: rows of each evaluation.
    """

    output: str | None
    metrics: Mapping[str, float]
    baseline: float
    epoch: float
    updates: int
    seconds: float
    parameters: Mapping[str, int]
    examples: int


class Listener:
    """Hears of a run's progress; the console shows it. Only the main process speaks."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """Something before the loop goes on: rows tokenised, layers decomposed."""

    def started(self, plan: Plan) -> None:
        """The loop begins."""

    def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
        """An update was made; `examples` in this update."""

    def evaluating(self, done: int, total: int) -> None:
        """Rows of the running evaluation."""

    def evaluated(self, step: int, epoch: float, metrics: Mapping[str, float], *, best: bool) -> None:
        """An evaluation is complete."""

    def interrupted(self, adapter: Path | None) -> None:
        """Ctrl-C: where the best adapter so far lies."""


def train(config: RunConfig, listener: Listener | None = None) -> TrainResult:
    """Fine-tune a sequence classifier.

    Under `accelerate launch` or `torchrun` each process calls this and they join; only the main one writes and reports.

    Raises:
        CraftError: the configuration, the model or the data cannot be used, or the loss is no longer finite.
        KeyboardInterrupt: after the best adapter so far is safe.
    """
    shared = is_initialized()
    try:
        return _train(config, _accelerator(config), listener or Listener())
    finally:
        if not shared:  # a second run in this interpreter may want another precision
            AcceleratorState._reset_state()


def _train(config: RunConfig, accelerator: Accelerator, listener: Listener) -> TrainResult:
    listener = listener if accelerator.is_main_process else Listener()
    if config.output_dir and not config.dry_run:  # before hours of preparation; taken when the loop begins
        check_output(config.output_dir, overwrite=config.overwrite)
    with accelerator.main_process_first():  # the others then find the caches filled
        prepared = prepare(config, listener.preparing)

    set_seed(config.seed)
    model, adapter = build(config, prepared)
    update_size = config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    updates_per_epoch = math.ceil(len(prepared.train) / update_size)
    total = math.ceil(config.num_train_epochs * updates_per_epoch)
    total = 1 if config.dry_run else min(total, config.max_steps or total)
    parameters = {"adapter": adapter.count_parameters(), "head": adapter.count_head_parameters()}
    run = None if config.dry_run else _open_run(config, prepared, accelerator)
    listener.started(_plan(config, prepared, accelerator, parameters, update_size, total, run))

    optimizer = torch.optim.AdamW(_parameter_groups(config, adapter))
    schedule = get_linear_schedule_with_warmup(optimizer, int(config.warmup_ratio * total), total)
    with warnings.catch_warnings():  # torch 2.13 renames the option, 2.6 does not know the new name
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        model, optimizer = accelerator.prepare(model, optimizer)  # not the schedule: it counts updates, not processes
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.manual_seed(config.seed + 1 + accelerator.process_index)  # dropout differs between processes
    weights = None
    if config.class_weights:
        weights = torch.tensor(balanced_weights(prepared.train.labels or [], prepared.task), device=accelerator.device)
    log = _Log(config, prepared, adapter, run if accelerator.is_main_process else None, listener)

    step, began = 0, time.perf_counter()
    try:
        for epoch in range(math.ceil(total / updates_per_epoch)):
            model.train()
            for update in plan_epoch(prepared.train.lengths, update_size, seed=config.seed, epoch=epoch):
                loss = torch.zeros((), device=accelerator.device)
                batches = share_out(
                    update,
                    config.per_device_train_batch_size,
                    process=accelerator.process_index,
                    processes=accelerator.num_processes,
                )
                for number, rows in enumerate(batches, start=1):
                    with contextlib.nullcontext() if number == len(batches) else accelerator.no_sync(model):
                        part = _batch_loss(model, prepared, rows, accelerator.device, weights)
                        part = part * (accelerator.num_processes / len(update))  # DDP takes the mean over processes
                        accelerator.backward(part)
                        loss += part.detach()
                if config.max_grad_norm:
                    accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
                optimizer.step()
                rate = schedule.get_last_lr()[0]
                schedule.step()
                optimizer.zero_grad()
                step += 1
                log.update(step, step / updates_per_epoch, accelerator.reduce(loss, "mean"), rate, len(update))
                if step == total:
                    break
            if config.dry_run:
                break
            logits = {
                name: _evaluate(model, encoded, config, prepared.tokenizer, accelerator, listener)
                for name, encoded in prepared.validation.items()
            }
            with ctrl_c_waits():
                log.evaluation(step, step / updates_per_epoch, prepared.measure(logits, config.threshold))
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            log.keep_anything(step, step / updates_per_epoch)
        raise
    if config.dry_run:
        encoded = next(iter(prepared.validation.values()))
        rows = list(range(min(len(encoded), config.per_device_eval_batch_size)))
        predict_batches(accelerator.unwrap_model(model), encoded, [rows], prepared.tokenizer, accelerator.device)
    seconds = time.perf_counter() - began
    result = TrainResult(
        output=str(run.path) if run else None,
        metrics=log.best,
        baseline=_baseline(prepared),
        epoch=log.best_epoch,
        updates=step,
        seconds=seconds,
        parameters=parameters,
        examples=prepared.eval_examples,
    )
    if run and accelerator.is_main_process:
        run.write_results(asdict(result))
    accelerator.wait_for_everyone()
    model, optimizer = accelerator.free_memory(accelerator.unwrap_model(model), optimizer)  # DDP before its group
    accelerator.end_training()
    return result


# -- before the loop ----------------------------------------------------------------------------------------------------


def _accelerator(config: RunConfig) -> Accelerator:
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else None  # None: as `accelerate launch` says
    if config.fp16 and (config.use_cpu or not torch.cuda.is_available()):
        raise ConfigError("--fp16 needs a GPU; on the CPU use --bf16 or neither")
    return Accelerator(
        mixed_precision=precision,
        cpu=config.use_cpu or not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # the factors never change
    )


def _parameter_groups(config: RunConfig, adapter: ModelAdapter) -> list[dict[str, Any]]:
    """Transforms first, then the head; weight decay on matrices only."""
    head = dict(adapter.model.named_parameters())
    tensors = [head[name] for name in adapter.head]
    return [
        {"params": list(adapter.parameters()), "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {
            "params": [t for t in tensors if t.ndim > 1],
            "lr": config.head_learning_rate,
            "weight_decay": config.weight_decay,
        },
        {"params": [t for t in tensors if t.ndim <= 1], "lr": config.head_learning_rate, "weight_decay": 0.0},
    ]


def _open_run(config: RunConfig, prepared: Prepared, accelerator: Accelerator) -> Run:
    """The run folder, made by the main process and known to all."""
    made: list[Any] = [None]
    if accelerator.is_main_process:
        label = f"{prepared.task.name}-{Path(prepared.checkpoint.name).name}"
        try:
            run = start_run(config.output_dir, label, overwrite=config.overwrite)
            run.write_recipe(resolved_recipe(config, prepared))
            made = [run.path]
        except CraftError as error:
            made = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(made)
    if isinstance(made[0], CraftError):
        raise made[0]
    return Run(made[0])


def _plan(
    config: RunConfig,
    prepared: Prepared,
    accelerator: Accelerator,
    parameters: Mapping[str, int],
    update_size: int,
    total: int,
    run: Run | None,
) -> Plan:
    factors = prepared.decomposition.factors
    kind = "GPU" if accelerator.device.type == "cuda" else accelerator.device.type.upper()
    effective = f"{update_size} = {config.per_device_train_batch_size} a device"
    if accelerator.num_processes > 1:
        effective += f" x {accelerator.num_processes} processes"
    if config.gradient_accumulation_steps > 1:
        effective += f" x {config.gradient_accumulation_steps} accumulated"
    return Plan(
        model=prepared.checkpoint.name,
        task=prepared.task.name,
        labels=prepared.labels,
        train_examples=len(prepared.train),
        eval_examples=prepared.eval_examples,
        tokens=describe_tokens(config, prepared, update_size),
        targets=factors.targets,
        ranks=" | ".join(dict.fromkeys(str(factors.ranks(target)) for target in factors.targets)),
        adapter_parameters=parameters["adapter"],
        head_parameters=parameters["head"],
        devices=f"{accelerator.num_processes} x {kind}"
        + ("" if accelerator.mixed_precision == "no" else f", {accelerator.mixed_precision}"),
        effective_batch=effective,
        updates=total,
        output=str(run.path) if run else None,
        notes=prepared.notes,
    )


# -- in the loop --------------------------------------------------------------------------------------------------------


def _batch_loss(
    model: Any, prepared: Prepared, rows: Sequence[int], device: torch.device, weights: torch.Tensor | None
) -> torch.Tensor:
    """Sum of the rows' losses; a process without rows takes part with a row of weight zero."""
    inputs, gold = collate(prepared.train, rows or [0], prepared.tokenizer)
    assert gold is not None
    logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
    loss = summed_loss(prepared.in_task_order(logits), gold.to(device), prepared.task.problem_type, weights)
    return loss if rows else loss * 0.0


def _evaluate(
    model: Any, encoded: Encoded, config: RunConfig, tokenizer: Any, accelerator: Accelerator, listener: Listener
) -> torch.Tensor:
    """Logits (examples, labels) of all rows in their order, on every process; each row is computed once."""
    batches = length_sorted_batches(encoded, config.per_device_eval_batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    with accelerator.autocast():
        outputs = predict_batches(
            accelerator.unwrap_model(model), encoded, mine, tokenizer, accelerator.device, listener.evaluating
        )
    everyone = gather_object(list(zip(mine, outputs, strict=True)))
    return in_order([logits for _, logits in everyone], [rows for rows, _ in everyone], len(encoded))


def _baseline(prepared: Prepared) -> float:
    gold = next(iter(prepared.validation.values())).labels
    return constant_metric(prepared.train.labels or [], gold or [], prepared.task)


_TOO_FAST = ": lower --learning-rate or --head-learning-rate (the best adapter so far is kept)"


class _Log:
    """What the run folder is told: metrics.jsonl, the curve, the best adapter."""

    def __init__(
        self, config: RunConfig, prepared: Prepared, adapter: ModelAdapter, run: Run | None, listener: Listener
    ) -> None:
        self.config, self.prepared, self.adapter, self.run, self.listener = config, prepared, adapter, run, listener
        self.best: dict[str, float] = {}
        self.best_epoch = 0.0
        self._lines: list[dict[str, Any]] = []

    def update(self, step: int, epoch: float, loss: torch.Tensor, rate: float, examples: int) -> None:
        value = float(loss)
        if not math.isfinite(value):
            raise CraftError(f"the loss is {value} at update {step}{_TOO_FAST}")
        self.listener.updated(step, value, rate, examples)
        if step % self.config.logging_steps == 0 or step == 1:
            self._append({"step": step, "epoch": round(epoch, 6), "loss": value, "learning_rate": rate})

    def evaluation(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        name = self.prepared.task.metrics[0]
        if not math.isfinite(metrics["loss"]):
            raise CraftError(f"the validation loss is {metrics['loss']} after update {step}{_TOO_FAST}")
        better = not self.best or metrics[name] > self.best[name]
        if better:
            self.best, self.best_epoch = dict(metrics), epoch
            self._save()
        self._append(
            {"step": step, "epoch": round(epoch, 6)} | {f"eval_{key}": value for key, value in metrics.items()}
        )
        if self.run:
            training_curve(
                self._lines, name, self.run.curve, f"{self.prepared.task.name} on {self.prepared.checkpoint.name}"
            )
        self.listener.evaluated(step, epoch, metrics, best=better)

    def keep_anything(self, step: int, epoch: float) -> None:
        """Interrupted: without an evaluation so far, the adapter as it is now is the best one."""
        if self.run and not self.best and step:
            self.best_epoch = epoch
            self._save()
        kept = self.run.adapter if self.run and (self.best or step) else None
        self.listener.interrupted(kept)

    def _append(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        if self.run:
            self.run.append_metrics(line)

    def _save(self) -> None:
        if self.run is None:
            return
        recipe = resolved_recipe(self.config, self.prepared)
        self.adapter.training_record = json.loads(
            json.dumps(
                {
                    "task": self.prepared.task.name,
                    "data": data_record(self.config, self.prepared),
                    "problem_type": self.prepared.task.problem_type,
                    "labels": self.prepared.task.labels,
                    "threshold": self.config.threshold,
                    "max_seq_length": self.config.max_seq_length,
                    "epoch": self.best_epoch,
                    "metrics": self.best,
                    "recipe": recipe,
                }
            )
        )
        card = model_card(self.adapter.describe(), self.prepared.checkpoint)
        self.adapter.save(self.run.adapter, card=card, factors=self.config.adapter_factors)
