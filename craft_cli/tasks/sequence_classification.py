"""Sequence classification, `--task-type sequence-classification`: one or more texts per row, with labels or a number.

Covers single-label and multi-label classification and regression.
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
    """A task on one text, a pair of texts or more. The methods are those of `tasks.base.Task`.

    Attributes:
        name: the value of `--task`; `own` for the user's own data.
        text_columns: one column, two, or more, which are joined (see `data.tokens.encode`).
        labels: label names, in the order of the label numbers; `NUMBER` for regression.
        metrics: metrics to report; the first one chooses the best adapter.
        problem_type: one of `PROBLEM_TYPES`; empty until it is known.
        label_column: the column of label numbers or names (one or more), or real numbers.
        label_separator: separator of the labels in a cell of a multi-label task.
        threshold: multi-label tasks predict every label above this probability.
        finds_threshold: whether `settled` chooses the threshold.
        units: see `Task`.
        hub: dataset on the Hub, with its configuration.
        sample: folder in `craft_cli/samples`, for data that ships with craft.
        train: training split; None for a task that is only evaluated.
        validation: validation splits; the first one chooses the best adapter.
        server: split and number of rows of each file for the GLUE server.
        server_numbers: whether the GLUE server expects label numbers instead of names.
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
        """The location of its rows."""
        test = tuple(dict.fromkeys(split for split, _ in self.server.values())) if self.server else (TEST,)
        return Home(self.hub, self.sample, self.train, self.validation, test)

    @property
    def chooser(self) -> str:
        """See `Task`. Regression on the user's own data uses the loss, because a correlation ignores the scale."""
        return "loss" if self.problem_type == REGRESSION and self.name == OWN else self.metrics[0]

    @property
    def stratified(self) -> bool:
        """Whether to stratify held-out rows by label."""
        return self.problem_type == SINGLE

    # -- rows -----------------------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, table: Table, source: DataSource) -> bool:
        """Always true: this is the default task type, and its errors name the missing columns."""
        return True

    @classmethod
    def own(cls) -> SequenceClassification:
        """A task whose columns, labels and problem type are detected in the data."""
        return cls(problem_type="", label_column="")

    @classmethod
    def of_record(cls, record: Mapping[str, Any], config: Any) -> SequenceClassification:
        """See `Task`. For a base checkpoint, its configuration decides, or else its number of outputs."""
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
        """A copy with columns, separator and problem type given by the user."""
        problem = source.problem_type or self.problem_type
        separator = source.label_separator or self.label_separator
        task = self
        if problem != self.problem_type and self.labels:  # the configuration of a trained head may omit it
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
        """Read texts, and labels if there is a label column."""
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
        """Return a reader; several texts in one line are separated by tabs."""
        names = ("text",) if plain else columns_of(first, origin, columns or self.text_columns)
        parts = len(self.text_columns) if plain else 1

        def texts(row: Row) -> tuple[str, ...]:
            if parts > 1:
                texts_of_row = tuple(row.cells["text"].split("\t", parts - 1))
                if len(texts_of_row) < parts:
                    count = "two texts; put a tab" if parts == 2 else f"{parts} texts; put tabs"
                    raise DataError(f"{origin}, {row.place}: this model takes {count} between them")
                return texts_of_row
            return tuple(text_of(row.cells.get(name), name, lambda: f"{origin}, {row.place}") for name in names)

        return lambda rows: Split(
            [texts(row) for row in rows], None, origin, place=lambda row: f"{origin}, {rows[row].place}"
        )

    def notes(self, rows: Mapping[str, Split]) -> list[str]:
        """Notes about texts and labels or numbers."""
        if self.problem_type == REGRESSION:
            return [*number_notes(rows, self.label_column), *super().notes(rows)]
        return [*label_notes(rows, self.labels, self.label_column), *super().notes(rows)]

    def for_training(self, config: RunConfig, gold: Sequence[Any]) -> SequenceClassification:
        """A copy with threshold, class weights if requested, and units of the user's regression targets.

        Raises:
            ConfigError: a setting has no effect on this problem type.
            DataError: the regression targets cannot be learned.
        """
        self.only_labels(config)
        if config.threshold != AUTO and self.problem_type != MULTI:
            raise ConfigError("--threshold is only for multi-label tasks; remove it")
        if self.problem_type == REGRESSION:
            if config.calibrate:
                raise ConfigError("--calibrate: a regression predicts numbers, not probabilities; remove it")
            if self.name == OWN:
                check_numbers(gold, self.label_column)
        choose_threshold = config.threshold == AUTO and self.problem_type == MULTI
        return replace(
            self,
            threshold=THRESHOLD if isinstance(config.threshold, str) else config.threshold,
            finds_threshold=choose_threshold,
            class_weights=tuple(self.balanced(gold)) if config.class_weights else (),
            units=units_of(gold) if self.problem_type == REGRESSION and self.name == OWN else (0.0, 1.0),
        )

    def balanced(self, gold: Sequence[Any]) -> list[float]:
        """Class weights, see `balanced_weights`.

        Raises:
            ConfigError: the task is a regression.
        """
        if self.problem_type == REGRESSION:
            raise ConfigError("--class-weights: a regression has no labels; remove it")
        return balanced_weights(gold, self.problem_type, len(self.labels))

    # -- model ----------------------------------------------------------------------------------------------------------

    def on_head(self, config: Any, *, strict: bool = True) -> SequenceClassification:
        """See `Task`; a regression has no label names to match."""
        return self if self.problem_type == REGRESSION else super().on_head(config, strict=strict)

    def continues(self, config: Any) -> bool:
        """See `Task`: the problem type and the labels must be the same; a regression has no label names to compare."""
        if self.problem_type == REGRESSION:
            return config.num_labels == 1 and config.problem_type == REGRESSION
        return (config.problem_type or SINGLE) == self.problem_type and super().continues(config)

    def model_options(self) -> dict[str, Any]:
        """Label names and problem type."""
        return super().model_options() | {"problem_type": self.problem_type}

    def encode(
        self,
        split: Split,
        tokenizer: Any,
        limit: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        cache: Path | None = None,
    ) -> Encoded:
        """Tokenize texts or pairs."""
        return encode(split, tokenizer, limit, progress, cache)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss, summed over the rows."""
        logits = self.outputs(model, batch)  # (rows, labels)
        assert batch.targets is not None
        weights = torch.tensor(self.class_weights, device=logits.device) if self.class_weights else None
        targets = batch.targets / self.units[1] if self.problem_type == REGRESSION else batch.targets
        return summed_loss(logits, targets, self.problem_type, weights)

    def scores(self, model: Any, batch: Batch) -> list[Tensor]:
        """The logits (labels,) of every row."""
        return list(self.outputs(model, batch).float().cpu() * self.units[1])

    def in_own_order(self) -> SequenceClassification:
        """See `Task`; the numbers stay in training units too."""
        return replace(self, head=(), units=(0.0, 1.0))

    def fit_head(
        self, features: Sequence[Tensor], gold: Sequence[Any], *, bias: bool, progress: Progress = silent
    ) -> tuple[Tensor, Tensor]:
        """Fit logistic or ridge regressions."""
        rows, labels = torch.stack(list(features)), len(self.labels)  # (rows, features)
        weight, start = fit_outputs(
            rows, gold, self.problem_type, labels, self.class_weights, bias=bias, progress=progress
        )
        return self.in_head_order(Linear(weight / self.units[1], start / self.units[1]))

    # -- results --------------------------------------------------------------------------------------------------------

    def decide(self, scores: Sequence[Tensor]) -> list[Any]:
        """The prediction of every row, see the function `predictions`."""
        return decide(torch.stack(list(scores)), self.problem_type, self.threshold)

    def settled(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> SequenceClassification:
        """A copy with the best threshold, if it is to be chosen."""
        if not self.finds_threshold:
            return self
        return replace(self, threshold=best_threshold(torch.stack(list(scores)), gold))

    def measure(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, float]:
        """The task's metrics, and the mean loss."""
        logits = torch.stack(list(scores))  # (rows, labels)
        metrics = compute_metrics(self.metrics, gold, decide(logits, self.problem_type, self.threshold))
        return metrics | {"loss": mean_loss(logits, gold, self.problem_type)}

    def baseline(self, train: Sequence[Any], gold: Sequence[Any]) -> dict[str, float]:
        """The metrics of the best constant prediction."""
        return compute_metrics(self.metrics, gold, [constant_answer(train, self.problem_type)] * len(gold))

    def tables(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, Any]:
        """See `Task`; empty for a regression, and a confusion matrix only for single-label tasks."""
        if self.problem_type == REGRESSION:
            return {}
        predicted = self.decide(scores)
        tables: dict[str, Any] = {
            "by_label": by_label(gold, predicted, self.labels),
            "ece": self.calibration(scores, gold),
        }
        if self.problem_type != MULTI and len(self.labels) <= MOST_CONFUSED:
            tables["confusion"] = confusion(list(gold), predicted, self.labels)
        return tables

    def forecasts(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
        """See `Task`; None for a regression."""
        return None if self.problem_type == REGRESSION else super().forecasts(scores, gold)

    def mistakes(self, scores: Sequence[Tensor], split: Split) -> Iterator[tuple[float, dict[str, Any]]]:
        """See `Task`. A regression ranks all rows by error; a multi-label row counts by its worst label."""
        labels, answers = split.labels or [], self.decide(scores)
        gold, predicted = torch.tensor(labels, dtype=torch.float64), torch.tensor(answers)
        values = probabilities(torch.stack(list(scores)), self.problem_type)  # (rows, labels)
        if self.problem_type == REGRESSION:
            wrong = (predicted - gold).abs()
        elif self.problem_type == MULTI:
            wrong = ((values - gold).abs() * (predicted != gold)).amax(dim=-1)
        else:
            wrong = values.amax(dim=-1) * (predicted != gold)
        size = "error" if self.problem_type == REGRESSION else "confidence"
        for row, (much, label, answer) in enumerate(zip(wrong.tolist(), labels, answers, strict=True)):
            if much > 0:
                named = {"label": self._named(label), "prediction": self._answered(answer), size: self._rounded(much)}
                yield much, {"place": split.place_of(row), **named, "texts": list(split.texts[row])}

    def records(self, scores: Sequence[Tensor], split: Split) -> Iterator[dict[str, Any]]:
        """One mapping per row: `prediction`, `scores` by label, and `label` if the gold is known.

        A prediction is a label name, a list of label names, or a number.
        """
        logits = torch.stack(list(scores))
        answers = zip(probabilities(logits, self.problem_type).tolist(), self.decide(scores), strict=True)
        for row, (values, number) in enumerate(answers):
            record: dict[str, Any] = {
                "prediction": self._answered(number),
                "scores": {name: self._rounded(value) for name, value in zip(self.labels, values, strict=True)},
            }
            if split.labels is not None:
                record["label"] = self._named(split.labels[row])
            yield record

    def _rounded(self, value: float) -> float:
        """Round probabilities to six decimals, and numbers to the seven significant digits of float32."""
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
        """The record of the task that is saved with an adapter."""
        return {
            "task": self.name,
            "task_type": self.kind,
            "problem_type": self.problem_type,
            "labels": list(self.labels),
            "threshold": self.threshold,
        }

    def columns(self) -> dict[str, Any]:
        """The columns that were read."""
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
