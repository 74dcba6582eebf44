"""A kind of work: what a row means, the loss of a batch, the metrics, the answers. Everything else knows this protocol only.

A task begins as a kind alone (or as a row of `glue`), learns columns and labels as it reads tables, and is put on the head
of a model. Tasks are frozen: what they learn is in the copy that is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from craft_cli.data.sources import DataSource, Home, Split
from craft_cli.errors import CraftError, DataError, listed
from craft_cli.tasks.calibration import forecast_error, temperature
from craft_cli.tasks.checks import row_notes

if TYPE_CHECKING:
    from typing import Self

    from craft_cli.config import RunConfig
    from craft_cli.data.readers import Row
    from craft_cli.data.tables import Table
    from craft_cli.data.tokens import Batch, Encoded
    from craft_cli.tasks.probe import Linear, Progress

OWN = "own"
"""The name of a task on the user's own data: columns and labels are found in it."""


_UNEVEN = 1.5
"""Factors of labels that differ by less would change nothing that can be seen."""


class Task(Protocol):
    """One kind of work on one set of data."""

    @property
    def kind(self) -> str:
        """As typed after `--task-type`."""

    @property
    def name(self) -> str:
        """As typed after `--task`; `OWN` for the user's own data."""

    @property
    def auto_model(self) -> str:
        """The class of transformers that loads a model for it."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `measure` gives beside `loss`; the first one is what people look at."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of what the model tells apart, in the order of the gold numbers."""

    @property
    def answers(self) -> tuple[str, ...]:
        """What it can answer, for people: labels in the order of the head, or kinds of entities."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that it reads; none where the data have not said yet."""

    @property
    def home(self) -> Home:
        """Where its rows lie."""

    @property
    def stratified(self) -> bool:
        """Whether rows that are held out are to be of all labels alike."""

    @property
    def chooser(self) -> str:
        """The metric that chooses the best adapter where none is named."""

    @property
    def units(self) -> tuple[float, float]:
        """The mean of the numbers to learn, and the power of two by which a training divides them; else 0 and 1.

        Outputs in training are in these units, `scores` in those of the data; the mean loss is to be multiplied by the square.
        """

    # -- rows -----------------------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, table: Table, source: DataSource) -> bool:
        """Whether a table of the user's own looks like rows of this kind."""

    @classmethod
    def own(cls) -> Self:
        """The task on data of the user's own, of which nothing is known yet."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any], config: Any) -> Self:
        """The task an adapter was trained for (`record` and the data it names), or what a checkpoint looks like.

        Args:
            record: what `record` gave; empty for a checkpoint.
            config: of the model.
        """

    def chosen(self, source: DataSource) -> Self:
        """With the columns and other properties of the data that the user names.

        Raises:
            ConfigError: one that this kind of work does not have.
        """

    def read(self, table: Table, *, labelled: bool) -> tuple[Self, Split]:
        """A table's rows, and the task with what it has learned from them: columns, labels.

        Raises:
            DataError: a column, cell or label that cannot be used.
        """

    def reader(
        self, first: Row, origin: str, *, plain: bool, columns: Sequence[str]
    ) -> Callable[[Sequence[Row]], Split]:
        """How rows to predict for are read, judged by the first of them.

        Args:
            first: the first row.
            origin: what messages call the file.
            plain: whether rows are lines of text.
            columns: wanted by the user; as in training without.

        Raises:
            DataError: the columns are not there.
        """

    def notes(self, rows: Mapping[str, Split]) -> list[str]:
        """What looks wrong in the rows of every split before they are trained and evaluated on, a line each."""

    def for_training(self, config: RunConfig, gold: Sequence[Any]) -> Self:
        """With what a run's settings and the gold of its training rows decide: weights of labels, a threshold."""

    # -- model ----------------------------------------------------------------------------------------------------------

    def on_head(self, config: Any, *, strict: bool = True) -> Self:
        """For a model with this configuration: where its head names the same labels, in their order.

        Raises:
            DataError: it names others (without `strict` the head is to be trained for ours).
        """

    def continues(self, config: Any) -> bool:
        """Whether a trained head of a checkpoint with this configuration answers what this task asks."""

    def model_options(self) -> dict[str, Any]:
        """What `from_pretrained` needs to know for a head of this task, in the order of the head."""

    def encode(
        self,
        split: Split,
        tokenizer: Any,
        limit: int,
        progress: Callable[[int, int], None] = ...,
        cache: Path | None = None,
    ) -> Encoded:
        """Token ids, gold and targets."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss of a batch, summed over its targets; calls the model once."""

    def scores(self, model: Any, batch: Batch) -> list[Tensor]:
        """For each row what `measure` and `records` need, float32 on the CPU, in the order of `labels`."""

    def in_own_order(self) -> Self:
        """The same for what a model gives in the place of its head's outputs: `scores` leaves its order alone."""

    def fit_head(
        self, features: Sequence[Tensor], gold: Sequence[Any], *, bias: bool, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """A linear probe for the last layer of the head, in the order of the head.

        Args:
            features: for each row what goes into that layer, as `scores` gives it.
            gold: of each row.
            bias: whether the layer has one.
            progress: called with (fits done, fits in all).

        Returns:
            Its weight (outputs, features) and its bias (outputs,).
        """

    # -- results --------------------------------------------------------------------------------------------------------

    def settled(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> Self:
        """With what is found on the validation rows, such as a threshold."""

    def measure(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, float]:
        """The metrics and the mean `loss`; finite numbers but for errors (`tasks.metrics.lower_is_better`) of what is not."""

    def baseline(self, train: Sequence[Any], gold: Sequence[Any]) -> dict[str, float]:
        """The metrics of always giving the same answer, the best one on the training rows."""

    def tables(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, Any]:
        """`by_label`, `confusion` and `ece`, as far as they make sense."""

    def calibration(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float | None:
        """The expected calibration error; None where nothing is given a probability."""

    def temperature(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float:
        """What the logits are to be divided by to make the mean loss smallest; 1.0 where nothing is given a probability."""

    def mistakes(self, scores: Sequence[Tensor], split: Split) -> Iterator[tuple[float, dict[str, Any]]]:
        """For each row with a wrong answer how sure it was, or how far off, and the row.

        A row has its `place`, `label`, `prediction` and `texts`, whatever else tells of the mistake, and `confidence` or
        `error`.
        """

    def remarks(self, tables: Mapping[str, Any], train: Sequence[Any], *, weighted: bool) -> list[str]:
        """What the user should know of `tables`, and what can be done.

        Args:
            tables: of the validation rows.
            train: gold of the training rows.
            weighted: whether labels are weighed already.
        """

    def records(self, scores: Sequence[Tensor], split: Split) -> Iterator[dict[str, Any]]:
        """For each row its `prediction` and more, and its `label` where the gold is known."""

    # -- on disk --------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What an adapter keeps of the task, as JSON."""

    def columns(self) -> dict[str, Any]:
        """Which columns were read, by the names of the settings."""

    def settings(self) -> dict[str, Any]:
        """The settings that repeat what was found in the user's own data."""


@dataclass(frozen=True)
class Labelled:
    """What all tasks share whose model has an output for each of some labels.

    Attributes:
        name: as typed after `--task`; `OWN` for the user's own data.
        text_columns: what is read; found in the data without.
        labels: the names, in the order of the label numbers.
        metrics: what is reported.
        label_column: the gold.
        head: the labels in the order of the model's outputs; empty where that is the order of `labels`.
        class_weights: a factor in the loss for each label; none without.
    """

    name: str = OWN
    text_columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    label_column: str = field(default="", kw_only=True)
    head: tuple[str, ...] = field(default=(), kw_only=True)
    class_weights: tuple[float, ...] = field(default=(), kw_only=True)

    @property
    def answers(self) -> tuple[str, ...]:
        """See `Task`."""
        return self.head or self.labels

    @property
    def home(self) -> Home:
        """See `Task`."""
        return Home()

    @property
    def chooser(self) -> str:
        """See `Task`."""
        return self.metrics[0]

    @property
    def units(self) -> tuple[float, float]:
        """See `Task`."""
        return 0.0, 1.0

    def settled(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> Self:
        """See `Task`."""
        return self

    def notes(self, rows: Mapping[str, Split]) -> list[str]:
        """Of the texts alone."""
        return row_notes(rows)

    def on_head(self, config: Any, *, strict: bool = True) -> Self:
        """See `Task`."""
        if strict:
            return replace(self, head=align_labels(self.labels, config.id2label))
        if config.num_labels == len(self.labels):
            with suppress(CraftError):  # other names: the head is trained for ours
                return replace(self, head=align_labels(self.labels, config.id2label))
        return self

    def continues(self, config: Any) -> bool:
        """See `Task`; a head whose labels have no names may be another's."""
        theirs = {str(name).lower() for name in (config.id2label or {}).values()}
        return bool(self.head) and theirs == {label.lower() for label in self.labels}

    def model_options(self) -> dict[str, Any]:
        """See `Task`."""
        names = self.head or self.labels
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {label: number for number, label in enumerate(names)},
        }

    def balanced(self, gold: Sequence[Any]) -> list[float]:
        """A weight for every label against rare ones being drowned."""
        raise NotImplementedError

    def remarks(self, tables: Mapping[str, Any], train: Sequence[Any], *, weighted: bool) -> list[str]:
        """See `Task`."""
        missed = [name for name, row in tables.get("by_label", {}).items() if row["support"] and not row["f1"]]
        if not missed:
            return []
        line = f"never right on the validation rows (F1 0): {listed(missed, 5)}"
        factors = [] if weighted else self.balanced(train)
        if max(factors, default=0.0) > _UNEVEN * min([1.0, *factors]):
            line += f"; --class-weights balanced lets rare labels weigh more, here {min(factors):.2g} to {max(factors):.2g} times"
        return [line]

    def in_own_order(self) -> Self:
        """See `Task`."""
        return replace(self, head=())

    def in_head_order(self, probe: Linear) -> tuple[Tensor, Tensor]:
        """The weight and the bias of a probe, whose outputs are in the order of `labels`."""
        order = [self.labels.index(name) for name in self.head or self.labels]
        return torch.from_numpy(probe.weight[order]), torch.from_numpy(probe.bias[order])

    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """The model's logits (rows, ..., labels), in the order of `labels`."""
        logits: Tensor = model(**batch.inputs).logits
        if self.head in ((), self.labels):
            return logits
        return logits[..., [self.head.index(name) for name in self.labels]]

    def forecasts(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
        """The logits (rows, labels) that mean probabilities, and what came true: a number a row, or one a label."""
        return torch.stack(list(scores)), torch.tensor(gold)

    def calibration(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float | None:
        """See `Task`."""
        found = self.forecasts(scores, gold)
        return forecast_error(*found) if found else None

    def temperature(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float:
        """See `Task`."""
        found = self.forecasts(scores, gold)
        return temperature(*found) if found else 1.0


def align_labels(labels: Sequence[str], id2label: Mapping[int, str] | None) -> tuple[str, ...]:
    """The label names in the order of a checkpoint's head, if it has names; by name, never by position.

    Names in another case are the same names, unless there are labels that differ in nothing else.

    Raises:
        DataError: the checkpoint names other labels.
    """
    if not id2label:
        return tuple(labels)
    theirs = [id2label[number] for number in sorted(id2label)]
    if all(name.startswith("LABEL_") for name in theirs) and len(theirs) == len(labels):
        return tuple(labels)
    if sorted(theirs) == sorted(labels):
        return tuple(theirs)
    by_lower = {label.lower(): label for label in labels}
    if sorted(name.lower() for name in theirs) != sorted(by_lower):
        raise DataError(f"the checkpoint has the labels {listed(theirs)}, the data {listed(labels)}")
    return tuple(by_lower[name.lower()] for name in theirs)
