"""Train an adapter and a head: open the run, call the loop, close the run."""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, is_initialized

from craft_cli.config import RunConfig, contradictions
from craft_cli.errors import ConfigError
from craft_cli.tasks.inference import predict_batches
from craft_cli.training import loop
from craft_cli.training.compile import refusal
from craft_cli.training.launch import settle_environment
from craft_cli.training.memory import peak
from craft_cli.training.notebook import NotebookListener, in_notebook
from craft_cli.training.progress import Listener, TrainResult
from craft_cli.training.run import RUNS
from craft_cli.training.setup import Training, make_accelerator, set_up
from craft_cli.training.signals import end_by
from craft_cli.training.trackers import finish_trackers


def train(
    config: RunConfig | None = None, listener: Listener | None = None, *, runs: Path = RUNS, **settings: Any
) -> TrainResult:
    """Fine-tune a transformer for a task.

        craft.train(model="demo", task="opinions", num_train_epochs=3)
        craft.train(craft.RunConfig(model="demo", task="opinions"))

    Under `accelerate launch` or `torchrun`, every process calls this function; only the main one writes and reports.

    Args:
        config: all settings; they can also be passed by name.
        listener: receives progress events. Default: a progress bar in a notebook, nothing elsewhere.
        runs: folder of runs without `output_dir`, and of the link to the latest run.
        settings: settings of `RunConfig`, instead of `config`.

    Raises:
        TypeError: both `config` and settings are given.
        CraftError: the configuration, model or data is invalid, or the loss is not finite.
        KeyboardInterrupt: Ctrl-C, after the current update and a checkpoint.
        SystemExit: SIGTERM, after the current update and a checkpoint; the code is 143.
    """
    if config is None:
        config = RunConfig.build(settings)
    elif settings:
        raise TypeError(f"train: pass either config or settings by name ({', '.join(settings)}), not both")
    elif problems := contradictions(config):
        raise ConfigError("\n".join(problems))
    shared = is_initialized()
    try:
        with contextlib.ExitStack() as held:
            if listener is None:
                listener = held.enter_context(contextlib.closing(NotebookListener())) if in_notebook() else Listener()
            for line in settle_environment():
                listener.noticed(line)
            training = set_up(config, make_accelerator(config), listener, held, runs)
            try:
                loop.run(training)
            except KeyboardInterrupt:  # a second Ctrl-C stops at once
                training.listener.interrupted(training.step, training.run_folder, resumable=training.saved > 0)
                raise
            return _close(training)
    except Exception as error:
        refused = refusal(error) if config.torch_compile else None
        if refused is None:
            raise
        raise refused from error
    finally:
        if not shared:  # a second run in this interpreter may use another precision
            AcceleratorState._reset_state()


def _close(training: Training) -> TrainResult:
    """Write the summary, close trackers and processes, and exit after a signal."""
    run, journal, listener, main = training.run, training.journal, training.listener, training.is_main
    if journal.out_of_patience and training.step == training.resumed_at:
        listener.noticed("early stopping had already ended this run; increase --early-stopping-patience to continue")
    if run and main and (training.stopped or training.config.eval_strategy == "no"):
        journal.keep_last(training.step, training.epoch)
    result = _result(training)
    if training.config.dry_run:
        result = _estimated(training, result)
    elif training.stopped:
        listener.interrupted(training.step, training.run_folder, resumable=True)
    elif run and main:
        run.write_results(asdict(result))
    problem = finish_trackers(training.accelerator)
    if problem:
        listener.noticed(problem)
    _end_processes(training)
    if training.stopped:
        raise end_by(training.stopped)
    return result


def _result(training: Training) -> TrainResult:
    prepared, journal = training.prepared, training.journal
    return TrainResult(
        output=str(training.run.path) if training.run else None,
        metric=journal.metric,
        metrics=journal.best,
        baselines=journal.baselines,
        tables=journal.tables,
        epoch=journal.best_epoch,
        updates=training.step,
        seconds=time.perf_counter() - training.began,
        parameters=training.parameters,
        examples=prepared.eval_examples,
        stopped_early=training.step < training.timetable.total and journal.out_of_patience,
        remarks=_remarks(training) if journal.best else (),
        generates=prepared.task.generates,
    )


def _remarks(training: Training) -> list[str]:
    """Advice about the result."""
    config, journal, task = training.config, training.journal, training.prepared.task
    found = task.remarks(journal.tables, training.prepared.train.labels or [], weighted=bool(config.class_weights))
    if journal.best_step == 0 < training.step:
        adapter = "changes nothing"
        if config.init_from:
            adapter = f"is that of {config.init_from}"
        elif config.init_noise:
            adapter = "has only its initial noise (--init-noise)"
        found.append(
            f"no update improved on the start on the validation rows: the adapter {adapter}, and the head is the initial one"
        )
    if training.step == training.timetable.total and training.run and journal.is_falling:
        more = f"craft train --resume --output-dir {shlex.quote(str(training.run.path))}"
        longer = f"--num-train-epochs {math.ceil(1.5 * training.epoch)}"
        found.append(f"the validation loss was still falling; continue with {more} {longer}")
    return found


def _estimated(training: Training, result: TrainResult) -> TrainResult:
    """Evaluate one batch, and estimate the seconds of the whole loop from it and the update made."""
    began = time.perf_counter()
    _evaluate_a_batch(training)
    batch = time.perf_counter() - began
    timetable = training.whole_timetable
    evaluations = sum(timetable.evaluates(step) for step in range(timetable.total + 1))
    batches = sum(-(-len(part) // training.prepared.eval_batch) for part in training.prepared.validation.values())
    seconds = result.seconds * timetable.total + batch * batches * evaluations / training.accelerator.num_processes
    memory, held = training.memory, peak(training.accelerator.device)
    return replace(result, estimate=seconds, planned=timetable.total, memory=memory, peak=held)


def _evaluate_a_batch(training: Training) -> None:
    prepared, accelerator = training.prepared, training.accelerator
    encoded = next(iter(prepared.validation.values()))
    batch = list(range(min(len(encoded), training.prepared.eval_batch)))
    model = accelerator.unwrap_model(training.model)
    predict_batches(model, prepared.task, encoded, [batch], prepared.tokenizer, accelerator.device)


def _end_processes(training: Training) -> None:
    accelerator = training.accelerator
    accelerator.wait_for_everyone()
    accelerator.free_memory(accelerator.unwrap_model(training.model), training.optimizer)
    del training.model  # release DDP before its process group
    accelerator.end_training()
