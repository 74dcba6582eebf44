"""What a training tells while it goes on: the words between the loop and whoever shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAME_ANSWER, HEAD_ALONE, CHECKPOINT, START = BASELINES = ("same_answer", "head_alone", "checkpoint", "start")
"""What a run has to beat: always the same answer, the best one on the training rows; and what its first update begins with,
which is a head that was fitted on the frozen base, or the checkpoint as it is; or either with an adapter that changes something."""


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one device while an update is made on its longest batch.

    Attributes:
        peak: in all.
        weights: of the base.
        trained: adapter and head: numbers, gradients, and two moments of AdamW in float32.
        activations: what is kept for the backward pass, and the largest of it once more while gradients flow.
        other: factors; on the CPU the libraries and the data too, as they are now.
        rows: of the batch.
        length: tokens of each of its rows.
        savings: bytes that flags would save, by flag; empty unless asked for.
    """

    peak: int
    weights: int
    trained: int
    activations: int
    other: int
    rows: int
    length: int
    savings: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """What is about to happen, for the header of a run."""

    model: str
    task: str
    labels: tuple[str, ...]
    train_examples: int
    eval_examples: int
    tokens: str
    method: str
    targets: tuple[str, ...]
    sizes: str
    adapter_parameters: int
    head_parameters: int
    head_start: str
    devices: str
    effective_batch: str
    updates: int
    evaluations: int
    length: str
    done: int
    memory: Memory | None
    output: str | None
    notes: Sequence[str] = ()
    example: Sequence[tuple[str, bool]] = ()


@dataclass(frozen=True)
class TrainResult:
    """What a run reached.

    Attributes:
        output: the run folder; None for a dry run.
        metric: that chooses the best evaluation.
        metrics: of the best evaluation; empty where nothing was evaluated.
        baselines: the metrics of what it had to beat, see `BASELINES`.
        tables: of the best evaluation, by label, as `craft eval --report` shows them.
        epoch: of the best evaluation.
        updates: made in all.
        seconds: of the loop, evaluations included, and of what went before a resume.
        parameters: `adapter` and `head`, numbers trained.
        examples: rows of each evaluation.
        stopped_early: whether patience was over before the last update.
        remarks: what the user should know of it, a sentence each.
        generates: whether the model writes its answers.
        estimate: of a dry run, the seconds that the whole loop would take, by its one update and its one batch of evaluation.
        planned: of a dry run, the updates that there would be.
        memory: of a dry run, what an update on the longest batch would take.
        peak: of a dry run, the most bytes that were held.
    """

    output: str | None
    metric: str
    metrics: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, float]]
    tables: Mapping[str, Any]
    epoch: float
    updates: int
    seconds: float
    parameters: Mapping[str, int]
    examples: int
    stopped_early: bool = False
    remarks: Sequence[str] = ()
    generates: bool = False
    estimate: float | None = None
    planned: int | None = None
    memory: Memory | None = None
    peak: int | None = None


class Listener:
    """Hears of a run's progress; the console shows it. Only the main process speaks."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """Something before the loop goes on: rows tokenised, layers decomposed."""

    def started(self, plan: Plan) -> None:
        """The loop begins."""

    def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
        """An update was made; `examples` in this update."""

    def logged(self, step: int, epoch: float, loss: float, rate: float) -> None:
        """An update was written to metrics.jsonl."""

    def evaluating(self, done: int, total: int) -> None:
        """Rows of the running evaluation."""

    def evaluated(self, step: int, epoch: float, metrics: Mapping[str, float], *, best: bool) -> None:
        """An evaluation is complete."""

    def noticed(self, what: str) -> None:
        """Something the user should know."""

    def stopping(self) -> None:
        """A signal came; the checkpoint is being written."""

    def interrupted(self, step: int, run: Path | None, *, resumable: bool) -> None:
        """The training ended before its time.

        Args:
            step: updates made.
            run: the run folder, if there is one yet.
            resumable: whether it has a checkpoint.
        """
