"""Texts or pairs of texts with a label, several labels or a number: `--task-type sequence-classification`.

One place for every kind of problem: what its labels are, its loss, its predictions, scores and metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from craft_cli.config import RunConfig
from craft_cli.data.sources import TEST, DataSource, Home, Split
from craft_cli.data.tokens import Batch, Encoded, encode
from craft_cli.errors import ConfigError, DataError
from craft_cli.tasks.base import OWN, Labelled
from craft_cli.tasks.checks import label_notes
from craft_cli.tasks.labels import MULTI, NUMBER, OWN_METRICS, REGRESSION, SINGLE, label_numbers, settle_task
from craft_cli.tasks.metrics import by_label, compute_metrics, confusion

if TYPE_CHECKING:
    from craft_cli.data.readers import Row
    from craft_cli.data.tables import Table

_TEXTS = (
    ("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"),
)  # fmt: skip
_LABELS = ("label", "labels", "score", "target", "class")


@dataclass(frozen=True)
class SequenceClassification(Labelled):
    """What is to be told of one text or of a pair. The methods are those of `tasks.base.Task`.

    Attributes:
        name: as typed after `--task`; `own` for the user's own data.
        text_columns: one or two.
        labels: the names, in the order of the label numbers; `NUMBER` for a regression.
        metrics: what is reported; the first one chooses the best adapter.
        problem_type: one of `PROBLEM_TYPES`; empty as long as it is not known.
        label_column: the gold label, as number or as name (or several, or a real number).
        label_separator: what stands between the labels of one cell, where several apply.
        threshold: above it a label applies, where several can.
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
    threshold: float = RunConfig.threshold
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
        threshold = float(record.get("threshold", RunConfig.threshold))
        if record.get("task", OWN) != OWN:
            from craft_cli.tasks.glue import task_named

            return replace(task_named(record["task"]), threshold=threshold)
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
            label_separator=(data.get("label_separator") or ",") if problem == MULTI else None,
            threshold=threshold,
        )

    def chosen(self, source: DataSource) -> SequenceClassification:
        """With columns, separator and kind of problem as the user names them."""
        return replace(
            self,
            text_columns=source.text_columns or self.text_columns,
            label_separator=source.label_separator or self.label_separator,
            problem_type=source.problem_type or self.problem_type,
            label_column=source.label_column or self.label_column,
        )

    def read(self, table: Table, *, labelled: bool) -> tuple[SequenceClassification, Split]:
        """Texts, and gold where there is a column of labels."""
        task = self._with_columns(table, labelled=labelled)
        texts = list(zip(*(_texts(table, column) for column in task.text_columns), strict=True))
        labels = None
        if task.label_column in table.columns:
            values = table.column(task.label_column)
            task = settle_task(task, values, table.place, table.origin)
            labels = label_numbers(values, task, table.place)
        return task, Split(texts, labels, table.origin)

    def reader(
        self, first: Row, origin: str, *, plain: bool, columns: Sequence[str]
    ) -> Callable[[Sequence[Row]], Split]:
        """A pair in one line of text is divided by a tab."""
        names = ("text",) if plain else _columns_of(first, origin, columns or self.text_columns)
        divide = plain and len(self.text_columns) == 2

        def texts(row: Row) -> tuple[str, ...]:
            if divide:
                one, tab, two = row.cells["text"].partition("\t")
                if not tab:
                    raise DataError(f"{origin}, {row.place}: this model takes two texts; put a tab between them")
                return one, two
            return tuple(text_of(row.cells.get(name), name, lambda: f"{origin}, {row.place}") for name in names)

        return lambda rows: Split([texts(row) for row in rows], None, origin)

    def notes(self, rows: Mapping[str, Split]) -> list[str]:
        """Of the labels too, where there are any."""
        of_labels = [] if self.problem_type == REGRESSION else label_notes(rows, self.labels, self.label_column)
        return [*of_labels, *super().notes(rows)]

    def for_training(self, config: RunConfig, gold: Sequence[Any]) -> SequenceClassification:
        """With the threshold, and weights against rare labels being drowned where they are asked for."""
        weights = tuple(self.balanced(gold)) if config.class_weights else ()
        return replace(self, threshold=config.threshold, class_weights=weights)

    def balanced(self, gold: Sequence[Any]) -> list[float]:
        """A weight for every label against rare ones being drowned.

        Of one label a row, scikit-learn's `balanced`: rows / (labels x rows of this label). Where several labels apply,
        the rows without a label against those with it, for the positive part of its loss.

        Raises:
            ConfigError: a regression has no labels to weigh.
        """
        if self.problem_type == REGRESSION:
            raise ConfigError("--class-weights: a regression has no labels to weigh")
        if self.problem_type == MULTI:
            table = torch.tensor(gold)  # (rows, labels)
            positive = table.sum(dim=0)
            return ((len(table) - positive) / positive.clamp(min=1)).tolist()
        counts = Counter(gold)
        return [len(gold) / (len(self.labels) * max(counts[number], 1)) for number in range(len(self.labels))]

    # -- model ----------------------------------------------------------------------------------------------------------

    def on_head(self, config: Any, *, strict: bool = True) -> SequenceClassification:
        """A regression has no names to go by."""
        return self if self.problem_type == REGRESSION else super().on_head(config, strict=strict)

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
        return summed_loss(logits, batch.targets, self.problem_type, weights)

    def scores(self, model: Any, batch: Batch) -> list[Tensor]:
        """The logits (labels,) of every row."""
        return list(self.outputs(model, batch).float().cpu())

    # -- results --------------------------------------------------------------------------------------------------------

    def decide(self, scores: Sequence[Tensor]) -> list[Any]:
        """The prediction of every row, see the function of this name."""
        return decide(torch.stack(list(scores)), self.problem_type, self.threshold)

    def measure(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, float]:
        """The task's metrics, and the mean loss."""
        logits = torch.stack(list(scores))  # (rows, labels)
        metrics = compute_metrics(self.metrics, gold, decide(logits, self.problem_type, self.threshold))
        return metrics | {"loss": float(summed_loss(logits, torch.tensor(gold), self.problem_type)) / len(gold)}

    def baseline(self, train: Sequence[Any], gold: Sequence[Any]) -> float:
        """The first metric for always predicting what is most frequent (or the mean) in the training rows."""
        if self.problem_type == REGRESSION:
            guess: Any = sum(train) / len(train)
        elif self.problem_type == MULTI:
            guess = [int(2 * sum(column) > len(train)) for column in zip(*train, strict=True)]
        else:
            counts = Counter(train)
            guess = max(counts, key=lambda label: (counts[label], -label))
        return compute_metrics(self.metrics[:1], gold, [guess] * len(gold))[self.metrics[0]]

    def tables(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, Any]:
        """Not of a regression; a confusion matrix of one label a row only."""
        if self.problem_type == REGRESSION:
            return {}
        found = self.decide(scores)
        tables: dict[str, Any] = {"by_label": by_label(gold, found, self.labels)}
        if self.problem_type != MULTI:
            tables["confusion"] = confusion(list(gold), found, self.labels)
        return tables

    def records(self, scores: Sequence[Tensor], split: Split) -> Iterator[dict[str, Any]]:
        """A mapping for each row: `prediction`, `scores` by label, and `label` where gold is known.

        A prediction is a label's name, the names of all labels that apply, or a number.
        """
        logits = torch.stack(list(scores))
        found = zip(probabilities(logits, self.problem_type).tolist(), self.decide(scores), strict=True)
        for row, (values, number) in enumerate(found):
            record: dict[str, Any] = {
                "prediction": self._named(number),
                "scores": {name: round(value, 6) for name, value in zip(self.labels, values, strict=True)},
            }
            if split.labels is not None:
                record["label"] = self._named(split.labels[row])
            yield record

    def _named(self, value: Any) -> Any:
        if self.problem_type == REGRESSION:
            return round(float(value), 6)
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
            "text_columns": ",".join(self.text_columns),
            "label_column": self.label_column,
            "problem_type": self.problem_type,
        }

    def _with_columns(self, table: Table, *, labelled: bool) -> SequenceClassification:
        """The task with its columns: as given, as the task has them, or as they are usually called."""
        texts = self.text_columns or guess_texts(table.columns)
        if not texts:
            raise DataError(
                f"{table.origin}: which columns hold the text? It has {', '.join(table.columns)} (choose with --text-columns)"
            )
        label = self.label_column or next((guess for guess in _LABELS if guess in table.columns), _LABELS[0])
        wanted_columns = dict.fromkeys(texts, "--text-columns") | ({label: "--label-column"} if labelled else {})
        for column, wanted in wanted_columns.items():
            if column not in table.columns:
                raise DataError(
                    f"{table.origin} has no column '{column}'; it has {', '.join(table.columns)} (choose with {wanted})"
                )
        return replace(self, text_columns=texts, label_column=label)


def summed_loss(logits: Tensor, gold: Tensor, problem_type: str, class_weights: Tensor | None = None) -> Tensor:
    """Loss of a batch, summed over its rows.

    Args:
        logits: (rows, labels), or (rows, 1) for a regression.
        gold: label numbers (rows,); real numbers (rows,); or 0 and 1 for every label (rows, labels).
        problem_type: cross-entropy, squared error, or the mean over the labels of binary cross-entropies.
        class_weights: (labels,), a factor for the rows of each label.
    """
    logits = logits.float()
    if problem_type == REGRESSION:
        return functional.mse_loss(logits.squeeze(-1), gold.float(), reduction="sum")
    if problem_type == MULTI:
        losses = functional.binary_cross_entropy_with_logits(
            logits, gold.float(), pos_weight=class_weights, reduction="none"
        )
        return losses.mean(dim=-1).sum()
    losses = functional.cross_entropy(logits, gold, reduction="none")  # (rows,)
    return (losses if class_weights is None else losses * class_weights[gold]).sum()


def probabilities(logits: Tensor, problem_type: str) -> Tensor:
    """Probability of every label (rows, labels): softmax, or one sigmoid a label; of a regression the number itself."""
    if problem_type == REGRESSION:
        return logits
    return torch.sigmoid(logits) if problem_type == MULTI else torch.softmax(logits, dim=-1)


def decide(logits: Tensor, problem_type: str, threshold: float = RunConfig.threshold) -> list[Any]:
    """The prediction of every row: a label number, a real number, or a 0 or 1 for every label."""
    if problem_type == REGRESSION:
        return logits.squeeze(-1).tolist()
    if problem_type == MULTI:
        return (torch.sigmoid(logits) > threshold).int().tolist()
    return logits.argmax(dim=-1).tolist()


def guess_texts(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of one text or a pair by their usual names; none if there are none."""
    return next((guess for guess in _TEXTS if set(guess) <= set(columns)), ())


def _columns_of(first: Row, origin: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """The columns of texts to predict for: those wanted, or as they are usually called."""
    if wanted and all(column in first.cells for column in wanted):
        return tuple(wanted)
    found = guess_texts(list(first.cells))
    if not found or (wanted and len(wanted) != len(found)):
        needed = f"no columns {' and '.join(wanted)}" if wanted else "no column that is usually a text"
        raise DataError(f"{origin} has {needed}; it has {', '.join(first.cells)} (choose with --text-columns)")
    return found


def _texts(table: Table, column: str) -> list[str]:
    return [text_of(value, column, partial(table.place, row)) for row, value in enumerate(table.column(column))]


def text_of(value: Any, column: str, place: Callable[[], str]) -> str:
    """The text in a cell.

    Raises:
        DataError: there is none (`place` tells where).
    """
    if value is None or isinstance(value, (list, dict)):
        raise DataError(f"{place()}: column '{column}' {'has no text' if value is None else 'is a list, not a text,'}")
    return str(value)
