"""Texts, alone or several a row, with a label, several labels or a number: `--task-type sequence-classification`.

One place for every kind of problem: what its labels are, its loss, its predictions, scores and metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from craft_cli.config import AUTO, THRESHOLD, RunConfig
from craft_cli.config.names import SEPARATOR, join_names
from craft_cli.data.batches import Batch
from craft_cli.data.sources import TEST, DataSource, Home, Split
from craft_cli.data.tokens import Encoded, encode
from craft_cli.errors import ConfigError, DataError
from craft_cli.tasks.base import OWN
from craft_cli.tasks.checks import label_notes, number_notes
from craft_cli.tasks.labelled import Labelled
from craft_cli.tasks.labels import (
    MULTI,
    NUMBER,
    OWN_METRICS,
    REGRESSION,
    SINGLE,
    check_numbers,
    label_numbers,
    settle_task,
)
from craft_cli.tasks.metrics import MOST_CONFUSED, by_label, compute_metrics, confusion
from craft_cli.tasks.probe import Linear, Progress, silent
from craft_cli.tasks.problems import (
    balanced_weights,
    best_threshold,
    constant_answer,
    decide,
    fit_outputs,
    kept_threshold,
    mean_loss,
    probabilities,
    summed_loss,
    units_of,
)
from craft_cli.tasks.texts import columns_of, settled_columns, text_of, texts_of

if TYPE_CHECKING:
    from craft_cli.data.readers import Row
    from craft_cli.data.tables import Table


@dataclass(frozen=True)
class SequenceClassification(Labelled):
    """What is to be told of one text, of a pair or of more. The methods are those of `tasks.base.Task`.

    Attributes:
        name: as typed after `--task`; `own` for the user's own data.
        text_columns: one, two, or more, which are joined (see `data.tokens.encode`).
        labels: the names, in the order of the label numbers; `NUMBER` for a regression.
        metrics: what is reported; the first one chooses the best adapter.
        problem_type: one of `PROBLEM_TYPES`; empty as long as it is not known.
        label_column: the gold label, as number or as name (or several, or a real number).
        label_separator: what stands between the labels of one cell, where several apply.
        threshold: above it a label applies, where several can.
        finds_threshold: whether `settled` is to find it.
        units: see `Task`.
        hub: data set on the hub, with its configuration.
        sample: folder below `craft_cli/samples`, for data that ships with craft.
        train: split to train on; None for a task that is only evaluated.
        validation: splits to evaluate on; the first one chooses the best adapter.
        server: for each of the GLUE server's files its split and its rows.
        server_numbers: whether the server takes label numbers, not names.
    """

    kind: ClassVar[str] = "sequence-classification"
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"

    metrics: tuple[str, ...] = ("accuracy",)
    problem_type: str = SINGLE
    label_column: str = field(default="label", kw_only=True)
    label_separator: str | None = None
    threshold: float = THRESHOLD
    finds_threshold: bool = False
    units: tuple[float, float] = (0.0, 1.0)
    hub: tuple[str, str] | None = None
    sample: str | None = None
    train: str | None = "train"
    validation: tuple[str, ...] = ("validation",)
    server: Mapping[str, tuple[str, int]] | None = None
    server_numbers: bool = True

    @property
    def home(self) -> Home:
        """Where its rows lie."""
        test = tuple(dict.fromkeys(split for split, _ in self.server.values())) if self.server else (TEST,)
        return Home(self.hub, self.sample, self.train, self.validation, test)

    @property
    def chooser(self) -> str:
        """Own numbers are to be near: a correlation is content with any scale."""
        return "loss" if self.problem_type == REGRESSION and self.name == OWN else self.metrics[0]

    @property
    def stratified(self) -> bool:
        """Whether rows that are held out are to be of all labels alike."""
        return self.problem_type == SINGLE

    # -- rows -----------------------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, table: Table, source: DataSource) -> bool:
        """Whatever no other kind recognises: its errors tell of the columns that are missing."""
        return True

    @classmethod
    def own(cls) -> SequenceClassification:
        """Columns, labels and the kind of problem are to be found in the data."""
        return cls(problem_type="", label_column="")

    @classmethod
    def of_record(cls, record: Mapping[str, Any], config: Any) -> SequenceClassification:
        """Of a checkpoint: what its configuration says, or what one output and several usually mean."""
        threshold = kept_threshold(record)
        if record.get("task", OWN) != OWN:
            from craft_cli.tasks.glue import task_of

            return replace(task_of(cls, record["task"]), threshold=threshold)
        names = tuple(config.id2label[number] for number in range(config.num_labels))
        problem = record.get("problem_type") or config.problem_type or (REGRESSION if len(names) == 1 else SINGLE)
        data = record.get("data", {})
        return cls(
            OWN,
            tuple(data.get("text_columns") or ()),
            NUMBER if problem == REGRESSION else tuple(record.get("labels") or names),
            OWN_METRICS[problem],
            problem,
            label_column=data.get("label_column") or "",
            label_separator=(data.get("label_separator") or SEPARATOR) if problem == MULTI else None,
            threshold=threshold,
        )

    def chosen(self, source: DataSource) -> SequenceClassification:
        """With columns, separator and kind of problem as the user names them."""
        problem = source.problem_type or self.problem_type
        separator = source.label_separator or self.label_separator
        task = self
        if problem != self.problem_type and self.labels:  # of a trained head that does not tell
            if REGRESSION in (problem, self.problem_type):
                raise ConfigError(f"--problem-type {problem}: the model was trained for {self.problem_type}")
            task = replace(self, metrics=OWN_METRICS[problem])
            separator = (separator or SEPARATOR) if problem == MULTI else None
        return replace(
            task,
            text_columns=source.text_columns or self.text_columns,
            label_separator=separator,
            problem_type=problem,
            label_column=source.label_column or self.label_column,
        )

    def read(self, table: Table, *, labelled: bool) -> tuple[SequenceClassification, Split]:
        """Texts, and gold where there is a column of labels."""
        columns, label = settled_columns(table, self.text_columns, self.label_column, labelled=labelled)
        task = replace(self, text_columns=self.text_columns or columns, label_column=self.label_column or label)
        texts = list(zip(*(texts_of(table, column) for column in columns), strict=True))
        labels = None
        if label in table.columns:
            values = table.column(label)
            task = settle_task(task, values, table.place, table.origin)
            labels = label_numbers(values, task, table.place)
        return task, Split(texts, labels, table.origin)

    def reader(
        self, first: Row, origin: str, *, plain: bool, columns: Sequence[str]
    ) -> Callable[[Sequence[Row]], Split]:
        """Several texts in one line are divided by tabs."""
        names = ("text",) if plain else columns_of(first, origin, columns or self.text_columns)
        parts = len(self.text_columns) if plain else 1

        def texts(row: Row) -> tuple[str, ...]:
            if parts > 1:
                found = tuple(row.cells["text"].split("\t", parts - 1))
                if len(found) < parts:
                    count = "two texts; put a tab" if parts == 2 else f"{parts} texts; put tabs"
                    raise DataError(f"{origin}, {row.place}: this model takes {count} between them")
                return found
            return tuple(text_of(row.cells.get(name), name, lambda: f"{origin}, {row.place}") for name in names)

        return lambda rows: Split(
            [texts(row) for row in rows], None, origin, place=lambda row: f"{origin}, {rows[row].place}"
        )

    def notes(self, rows: Mapping[str, Split]) -> list[str]:
        """Of the labels or the numbers too."""
        if self.problem_type == REGRESSION:
            return [*number_notes(rows, self.label_column), *super().notes(rows)]
        return [*label_notes(rows, self.labels, self.label_column), *super().notes(rows)]

    def for_training(self, config: RunConfig, gold: Sequence[Any]) -> SequenceClassification:
        """With the threshold, weights against rare labels being drowned where they are asked for, and units of own numbers.

        Raises:
            ConfigError: a setting without effect on this kind of problem.
            DataError: numbers from which nothing can be learned.
        """
        self.only_labels(config)
        if config.threshold != AUTO and self.problem_type != MULTI:
            raise ConfigError("--threshold: only where several labels can apply to a row; leave it out")
        if self.problem_type == REGRESSION:
            if config.calibrate:
                raise ConfigError("--calibrate: a regression answers numbers, not probabilities; leave it out")
            if self.name == OWN:
                check_numbers(gold, self.label_column)
        found = config.threshold == AUTO and self.problem_type == MULTI
        return replace(
            self,
            threshold=THRESHOLD if isinstance(config.threshold, str) else config.threshold,
            finds_threshold=found,
            class_weights=tuple(self.balanced(gold)) if config.class_weights else (),
            units=units_of(gold) if self.problem_type == REGRESSION and self.name == OWN else (0.0, 1.0),
        )

    def balanced(self, gold: Sequence[Any]) -> list[float]:
        """A weight for every label against rare ones being drowned, see `balanced_weights`.

        Raises:
            ConfigError: a regression has no labels to weigh.
        """
        if self.problem_type == REGRESSION:
            raise ConfigError("--class-weights: a regression has no labels to weigh")
        return balanced_weights(gold, self.problem_type, len(self.labels))

    # -- model ----------------------------------------------------------------------------------------------------------

    def on_head(self, config: Any, *, strict: bool = True) -> SequenceClassification:
        """A regression has no names to go by."""
        return self if self.problem_type == REGRESSION else super().on_head(config, strict=strict)

    def continues(self, config: Any) -> bool:
        """For the same kind of problem, the same labels; of a number there is no name to go by."""
        if self.problem_type == REGRESSION:
            return config.num_labels == 1 and config.problem_type == REGRESSION
        return (config.problem_type or SINGLE) == self.problem_type and super().continues(config)

    def model_options(self) -> dict[str, Any]:
        """The names of the outputs, and the kind of problem."""
        return super().model_options() | {"problem_type": self.problem_type}

    def encode(
        self,
        split: Split,
        tokenizer: Any,
        limit: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        cache: Path | None = None,
    ) -> Encoded:
        """One text or two in a row of tokens."""
        return encode(split, tokenizer, limit, progress, cache)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Summed over the rows."""
        logits = self.outputs(model, batch)  # (rows, labels)
        assert batch.targets is not None
        weights = torch.tensor(self.class_weights, device=logits.device) if self.class_weights else None
        targets = batch.targets / self.units[1] if self.problem_type == REGRESSION else batch.targets
        return summed_loss(logits, targets, self.problem_type, weights)

    def scores(self, model: Any, batch: Batch) -> list[Tensor]:
        """The logits (labels,) of every row."""
        return list(self.outputs(model, batch).float().cpu() * self.units[1])

    def in_own_order(self) -> SequenceClassification:
        """Nor are its numbers in other units."""
        return replace(self, head=(), units=(0.0, 1.0))

    def fit_head(
        self, features: Sequence[Tensor], gold: Sequence[Any], *, bias: bool, progress: Progress = silent
    ) -> tuple[Tensor, Tensor]:
        """Logistic regressions or a ridge."""
        rows, labels = torch.stack(list(features)), len(self.labels)  # (rows, features)
        weight, start = fit_outputs(
            rows, gold, self.problem_type, labels, self.class_weights, bias=bias, progress=progress
        )
        return self.in_head_order(Linear(weight / self.units[1], start / self.units[1]))

    # -- results --------------------------------------------------------------------------------------------------------

    def decide(self, scores: Sequence[Tensor]) -> list[Any]:
        """The prediction of every row, see the function of this name."""
        return decide(torch.stack(list(scores)), self.problem_type, self.threshold)

    def settled(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> SequenceClassification:
        """With the threshold, where it is to be found."""
        if not self.finds_threshold:
            return self
        return replace(self, threshold=best_threshold(torch.stack(list(scores)), gold))

    def measure(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, float]:
        """The task's metrics, and the mean loss."""
        logits = torch.stack(list(scores))  # (rows, labels)
        metrics = compute_metrics(self.metrics, gold, decide(logits, self.problem_type, self.threshold))
        return metrics | {"loss": mean_loss(logits, gold, self.problem_type)}

    def baseline(self, train: Sequence[Any], gold: Sequence[Any]) -> dict[str, float]:
        """The metrics of the answer that is best for all the training rows."""
        return compute_metrics(self.metrics, gold, [constant_answer(train, self.problem_type)] * len(gold))

    def tables(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, Any]:
        """Not of a regression; a confusion matrix of one label a row only."""
        if self.problem_type == REGRESSION:
            return {}
        found = self.decide(scores)
        tables: dict[str, Any] = {"by_label": by_label(gold, found, self.labels), "ece": self.calibration(scores, gold)}
        if self.problem_type != MULTI and len(self.labels) <= MOST_CONFUSED:
            tables["confusion"] = confusion(list(gold), found, self.labels)
        return tables

    def forecasts(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
        """None of a regression."""
        return None if self.problem_type == REGRESSION else super().forecasts(scores, gold)

    def mistakes(self, scores: Sequence[Tensor], split: Split) -> Iterator[tuple[float, dict[str, Any]]]:
        """A regression is never quite right; where several labels apply the worst of them counts."""
        labels, answers = split.labels or [], self.decide(scores)
        gold, found = torch.tensor(labels, dtype=torch.float64), torch.tensor(answers)
        values = probabilities(torch.stack(list(scores)), self.problem_type)  # (rows, labels)
        if self.problem_type == REGRESSION:
            wrong = (found - gold).abs()
        elif self.problem_type == MULTI:
            wrong = ((values - gold).abs() * (found != gold)).amax(dim=-1)
        else:
            wrong = values.amax(dim=-1) * (found != gold)
        size = "error" if self.problem_type == REGRESSION else "confidence"
        for row, (much, label, answer) in enumerate(zip(wrong.tolist(), labels, answers, strict=True)):
            if much > 0:
                named = {"label": self._named(label), "prediction": self._answered(answer), size: self._rounded(much)}
                yield much, {"place": split.place_of(row), **named, "texts": list(split.texts[row])}

    def records(self, scores: Sequence[Tensor], split: Split) -> Iterator[dict[str, Any]]:
        """A mapping for each row: `prediction`, `scores` by label, and `label` where gold is known.

        A prediction is a label's name, the names of all labels that apply, or a number.
        """
        logits = torch.stack(list(scores))
        found = zip(probabilities(logits, self.problem_type).tolist(), self.decide(scores), strict=True)
        for row, (values, number) in enumerate(found):
            record: dict[str, Any] = {
                "prediction": self._answered(number),
                "scores": {name: self._rounded(value) for name, value in zip(self.labels, values, strict=True)},
            }
            if split.labels is not None:
                record["label"] = self._named(split.labels[row])
            yield record

    def _rounded(self, value: float) -> float:
        """Probabilities to six decimals; numbers of any size to the seven digits that a model computes with."""
        return float(f"{value:.7g}") if self.problem_type == REGRESSION else round(value, 6)

    def _answered(self, value: Any) -> Any:
        return self._rounded(value) if self.problem_type == REGRESSION else self._named(value)

    def _named(self, value: Any) -> Any:
        if self.problem_type == REGRESSION:
            return float(value)
        if self.problem_type == MULTI:
            return [name for name, applies in zip(self.labels, value, strict=True) if applies]
        return self.labels[value]

    # -- on disk --------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What an adapter keeps of the task."""
        return {
            "task": self.name,
            "task_type": self.kind,
            "problem_type": self.problem_type,
            "labels": list(self.labels),
            "threshold": self.threshold,
        }

    def columns(self) -> dict[str, Any]:
        """Which columns were read."""
        names = ("text_columns", "label_column", "label_separator")
        return {name: getattr(self, name) for name in names}

    def settings(self) -> dict[str, Any]:
        """The settings that repeat what was found in the user's own data."""
        return {
            "task_type": self.kind,
            "text_columns": join_names(self.text_columns),
            "label_column": self.label_column,
            "problem_type": self.problem_type,
        }
