"""Events from the training loop to the display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAME_ANSWER, HEAD_ALONE, CHECKPOINT, START = BASELINES = ("same_answer", "head_alone", "checkpoint", "start")
"""Baselines of a run: the best constant answer on the training rows, and the starting point of the first update, which is a
head fitted on the frozen base, or the base checkpoint itself, possibly with an adapter from another run."""


@dataclass(frozen=True)
class Memory:
    """Estimated memory in bytes of one device during an update on its longest batch.

    Attributes:
        peak: total.
        weights: weights of the base.
        trained: adapter and head: parameters, gradients, and the two float32 moments of AdamW.
        activations: tensors saved for the backward pass, plus the gradient of the largest one.
        other: factors; on the CPU also libraries and data.
        rows: rows of the batch.
        length: tokens per row.
        savings: bytes that other flags would save, by flag; empty unless requested.
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
    """The plan of a run, for its header."""

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
    """The results of a run.

    Attributes:
        output: the run folder; None for a dry run.
        metric: that chooses the best evaluation.
        metrics: of the best evaluation; empty where nothing was evaluated.
        baselines: the metrics of what it had to beat, see `BASELINES`.
        tables: of the best evaluation, by label, as `craft eval --report` shows them.
        epoch: of the best evaluation.
        updates: made in all.
        seconds: of the loop, evaluations included, and of what went before a resume.
        parameters: trained parameters of `adapter` and `head`.
        examples: rows of each evaluation.
        stopped_early: whether early stopping ended the run.
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
    """Receives the progress events of a run; the console displays them. Only the main process sends events."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """A preparation step made progress, such as tokenizing or decomposing."""

    def started(self, plan: Plan) -> None:
        """The loop starts."""

    def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
        """An update was made; `examples` in this update."""

    def logged(self, step: int, epoch: float, loss: float, rate: float) -> None:
        """An update was written to metrics.jsonl."""

    def evaluating(self, done: int, total: int) -> None:
        """Progress of the current evaluation."""

    def evaluated(self, step: int, epoch: float, metrics: Mapping[str, float], *, best: bool) -> None:
        """An evaluation is complete."""

    def noticed(self, what: str) -> None:
        """A note for the user."""

    def stopping(self) -> None:
        """A signal was received; the checkpoint is being saved."""

    def interrupted(self, step: int, run: Path | None, *, resumable: bool) -> None:
        """The training was interrupted.

        Args:
            step: updates made.
            run: the run folder, if it exists already.
            resumable: whether it has a checkpoint.
        """
