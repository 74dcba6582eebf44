"""The log of a training: metrics.jsonl, trackers, the curve, the best adapter, and early stopping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from craft_cli.config import RunConfig
from craft_cli.errors import ConfigError, CraftError, nearest
from craft_cli.files import write_bytes
from craft_cli.methods.model_adapter import ModelAdapter
from craft_cli.models.cards import model_card
from craft_cli.plots import training_curve
from craft_cli.tasks.base import Task
from craft_cli.tasks.inference import not_finite
from craft_cli.tasks.metrics import lower_is_better, renamed
from craft_cli.training.head import KEPT, RANDOM, WHY_NOT_FINITE, LastLayer
from craft_cli.training.preparation import Measured, Prepared, data_record, resolved_recipe
from craft_cli.training.progress import CHECKPOINT, HEAD_ALONE, SAME_ANSWER, START, Listener
from craft_cli.training.run import Run
from craft_cli.training.samples import forget_samples


def chosen_metric(config: RunConfig, task: Task, splits: Iterable[str]) -> str:
    """The metric that chooses the best adapter.

    Args:
        config: settings of the run.
        task: the task.
        splits: names of the validation splits.

    Raises:
        ConfigError: the task does not have this metric.
    """
    if config.metric_for_best_model is None:
        return task.chooser
    known: list[str] = []
    splits = list(splits)
    for split in splits:
        known += renamed(dict.fromkeys((*task.metrics, "loss"), 0.0), split, splits)
    name = config.metric_for_best_model.removeprefix("eval_")
    if name not in known:
        raise ConfigError(f"--metric-for-best-model: {task.name} has no metric '{name}'{nearest(name, known)}")
    return name


class Journal:
    """Records updates and evaluations. It runs on every process and writes only if given a run.

    Args:
        config: settings of the run.
        prepared: data, base and task.
        adapter: the adapter in training.
        last: the last layer of the head.
        metric: metric that chooses the best adapter, see `chosen_metric`.
        run: run folder to write to; None writes nothing.
        listener: receives progress events.
        track: logs (values, step) to the trackers.

    Attributes:
        metric: the metric given.
        best: metrics of the best evaluation so far; empty before the first.
        best_step: update of that evaluation.
        best_epoch: epoch of that evaluation.
        best_state: adapter and head of that evaluation, if there is a run.
        tables: result of `Task.tables` for that evaluation.
        baselines: metrics of the baselines, see `BASELINES`.
        evaluated: the last update that was evaluated; -1 before the first.
    """

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        adapter: ModelAdapter,
        last: LastLayer,
        metric: str,
        run: Run | None,
        listener: Listener,
        track: Callable[[dict[str, float], int], None] = lambda values, step: None,
    ) -> None:
        self._config, self._prepared, self._adapter, self._last = config, prepared, adapter, last
        self._run, self._listener, self._track = run, listener, track
        self.metric = metric
        self._lines: list[dict[str, Any]] = []
        self._misses = 0
        self._since: list[float] = []  # losses of the updates since the last log line
        self._loss = 0.0  # mean loss of the last log line
        self.best: dict[str, float] = {}
        self.best_step, self.best_epoch = 0, 0.0
        self.best_state: dict[str, Tensor] = {}
        self.tables: dict[str, Any] = {}
        self._found: dict[str, Any] = {}  # record of the best evaluation for the adapter
        gold = next(iter(prepared.validation.values())).labels or []
        always = prepared.task.baseline(prepared.train.labels or [], gold)
        self.baselines = {SAME_ANSWER: always} if always else {}
        self.evaluated = -1

    def update(self, step: int, epoch: float, loss: float, rate: float, examples: int, gradient: float = 0.0) -> None:
        """Record an update.

        Raises:
            CraftError: the loss or the gradient norm is not finite.
        """
        for what, value in (("loss", loss), ("gradient", gradient)):
            if not math.isfinite(value):
                raise CraftError(f"the {what} is {value} at update {step}{self._advice(step - 1)}")
        self._since.append(loss)
        log = step % self._config.logging_steps == 0 or step == 1
        if log:
            self._loss, self._since = fmean(self._since), []
            self._append({"step": step, "epoch": round(epoch, 6), "loss": self._loss, "learning_rate": rate})
        self._listener.updated(step, self._loss, rate, examples)
        if log:
            self._listener.logged(step, epoch, self._loss, rate)

    def check_scores(self, step: int, scores: Sequence[Tensor]) -> None:
        """Check the scores of an evaluation before they are used.

        Raises:
            CraftError: some scores are not finite.
        """
        if odd := not_finite(scores):
            when = f"after update {step}" if step else "before the first update"
            rows = f"{len(odd):,} of {len(scores):,} validation rows"
            raise CraftError(f"the scores of {rows} are not finite {when}{self._advice(step)}")

    def check_weights(self, step: int) -> None:
        """Check the trained parameters before they are saved.

        Raises:
            CraftError: some trained parameters are not finite.
        """
        for name, tensor in self._adapter.trained_state().items():
            if not tensor.isfinite().all():
                raise CraftError(f"{name} is not finite after update {step}{self._advice(step)}")

    def evaluation(self, step: int, epoch: float, measured: Measured) -> None:
        """Record an evaluation.

        Raises:
            CraftError: the loss is not finite.
        """
        metrics = measured.metrics
        if not math.isfinite(metrics["loss"]):
            when = f"after update {step}" if step else "before the first update"
            raise CraftError(f"the validation loss is {metrics['loss']} {when}{self._advice(step)}")
        if step == 0 and self._last.start != RANDOM:
            changed = self._config.init_from or self._config.init_noise
            self.baselines[START if changed else CHECKPOINT if self._last.start == KEPT else HEAD_ALONE] = dict(metrics)
        gain = self._gain(metrics)
        better = gain > 0 or (gain == 0 and metrics["loss"] < self.best["loss"])
        missed = gain <= self._config.early_stopping_threshold if self._config.early_stopping_threshold else not better
        self._misses = self._misses + 1 if missed else 0
        self.evaluated = step
        if better:
            self.best, self.best_step, self.best_epoch = dict(metrics), step, epoch
            self.tables = measured.tables()
            self._found = measured.task.record() | {"temperature": measured.temperature}
            self._keep()
        if self._run and measured.samples:
            self._run.append(self._run.samples_file, [{"step": step} | dict(sample) for sample in measured.samples])
        self._append(
            {"step": step, "epoch": round(epoch, 6)} | {f"eval_{key}": value for key, value in metrics.items()}
        )
        self._draw()
        self._listener.evaluated(step, epoch, metrics, best=better)

    @property
    def out_of_patience(self) -> bool:
        """Whether early stopping applies: too many evaluations in a row without improvement."""
        return bool(self._config.early_stopping_patience) and self._misses >= (
            self._config.early_stopping_patience or 0
        )

    @property
    def is_falling(self) -> bool:
        """Whether the validation loss of the last evaluation is the lowest, and clearly lower than the previous one."""
        losses = [line["eval_loss"] for line in self._lines if "eval_loss" in line]
        return len(losses) > 2 and losses[-1] < 0.99 * min(losses[:-1])

    def keep_last(self, step: int, epoch: float) -> None:
        """Save the current adapter as the best one if nothing was evaluated."""
        if not self.best:
            self.best_step, self.best_epoch = step, epoch
            self._keep()

    # -- for checkpoints ------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """The record of this journal for a checkpoint, in addition to `best_state` and metrics.jsonl."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "best_epoch": self.best_epoch,
            "tables": self.tables,
            "found": self._found,
            "baselines": self.baselines,
            "misses": self._misses,
            "evaluated": self.evaluated,
            "since": self._since,
            "loss": self._loss,
        }

    def restore(self, record: Mapping[str, Any], best: Mapping[str, Tensor], metrics: bytes) -> None:
        """Restore the journal and the files of the run folder from a checkpoint. The adapter is left at its best state."""
        self.best, self.best_step, self.best_epoch = dict(record["best"]), record["best_step"], record["best_epoch"]
        self.tables, self._found, self.baselines = record["tables"], record["found"], record["baselines"]
        self._misses, self.evaluated, self._since = record["misses"], record["evaluated"], list(record["since"])
        self._loss = record["loss"]
        self._lines = [json.loads(line) for line in metrics.splitlines()]
        if self._run:
            write_bytes(self._run.metrics_file, metrics)
            forget_samples(self._run.samples_file, self.evaluated)
        if self._run and best:
            self._adapter.load_trained_state(best)
            self._keep()

    # -------------------------------------------------------------------------------------------------------------------

    def _advice(self, updates: int) -> str:
        """Advice about a non-finite loss after this many updates."""
        if not updates:
            return f": {self._prepared.checkpoint.name} computes non-finite values: {WHY_NOT_FINITE}"
        kept = f"; the best adapter so far is in {self._run.adapter}" if self._run and self.best else ""
        return f": start again with a lower --learning-rate or --head-learning-rate{kept}"

    def _gain(self, metrics: Mapping[str, float]) -> float:
        """The improvement of this evaluation over the best so far."""
        if not self.best:
            return math.inf
        gain = metrics[self.metric] - self.best[self.metric]
        return -gain if lower_is_better(self.metric) else gain

    def _draw(self) -> None:
        if self._run:
            title = f"{self._prepared.task.name} on {self._prepared.checkpoint.name}"
            training_curve(self._lines, self.metric, self._run.curve, title, self.baselines, self.best_epoch)

    def _append(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        if self._run:
            self._run.append(self._run.metrics_file, [line])
        try:
            self._track({name: value for name, value in line.items() if name not in ("step", "epoch")}, line["step"])
        except Exception as error:  # an unreachable server must not end a training
            self._track = lambda values, step: None
            self._listener.noticed(
                f"--report-to: the tracker failed ({' '.join(str(error).split())}); training continues without it"
            )

    def _keep(self) -> None:
        if self._run is None:
            return
        self.best_state = self._adapter.trained_state()
        self._adapter.training_record = {
            **training_record(self._config, self._prepared, self.best_epoch, self.best),
            **({"baselines": self.baselines} if self.best else {}),
            **self._found,
        }
        record = self._adapter.record()
        card = model_card(record, self._prepared.method.describe(record), self._prepared.checkpoint)
        with self._last.multiplied(self._prepared.task.units[1] / self._found.get("temperature", 1.0)):
            self._adapter.save(self._run.adapter, card=card, factors=self._config.adapter_factors)


def training_record(
    config: RunConfig, prepared: Prepared, epoch: float, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """The training record that is saved with an adapter, as JSON."""
    record = {
        **prepared.task.record(),
        "data": data_record(config, prepared),
        "max_seq_length": config.max_seq_length,
        "epoch": epoch,
        "metrics": metrics,
        "recipe": resolved_recipe(config, prepared),
    }
    return dict(json.loads(json.dumps(record)))
