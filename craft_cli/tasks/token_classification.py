"""Token classification, `--task-type token-classification`: a tag for every word, for named entities.

Tags can be IOB1, IOB2, IOBES (or BILOU, BMES) or without prefix, and are read as in conlleval; models are trained on and
predict IOB2. The tag of a word is assigned to its first token. A word without a token, or truncated, counts as predicted
O.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from craft_cli.config import AUTO, RunConfig
from craft_cli.config.names import join_names
from craft_cli.data.batches import Batch
from craft_cli.data.cells import as_list, is_missing, whole_text
from craft_cli.data.sources import TRAIN, DataSource, Split
from craft_cli.data.tables import column_named, columns_told
from craft_cli.data.tokens import IGNORED, Encoded, encode
from craft_cli.errors import ConfigError, DataError, ModelError, listed
from craft_cli.tasks.base import OWN
from craft_cli.tasks.labelled import Labelled
from craft_cli.tasks.probe import Progress, fit_labels, silent
from craft_cli.tasks.tags import OUTSIDE, READ, Entity, by_kind, entities_of, entity_metrics, one_form, scheme
from craft_cli.tasks.texts import check_distinct, known_column, text_of

if TYPE_CHECKING:
    from craft_cli.data.readers import Row
    from craft_cli.data.tables import Table

_WORDS_FITTED = 20_000
"""Maximum words for fitting the probe; more do not improve it."""
_WORDS, _TAGS = ("tokens", "words"), ("tags", "ner_tags", "labels", "label")
_LINES = ("text", "sentence")
_NOT_BLANK = re.compile(r"\S+")


@dataclass(frozen=True)
class TokenClassification(Labelled):
    """Named entities in sentences. The methods are those of `tasks.base.Task`.

    Attributes:
        labels: `O`, and `B-` and `I-` of every entity type.
        metrics: micro averages over entities, and word accuracy.
    """

    kind: ClassVar[str] = "token-classification"
    auto_model: ClassVar[str] = "AutoModelForTokenClassification"
    stratified: ClassVar[bool] = False

    metrics: tuple[str, ...] = ("f1", "precision", "recall", "accuracy")
    label_column: str = field(default="", kw_only=True)

    @property
    def answers(self) -> tuple[str, ...]:
        """The entity types."""
        return tuple(dict.fromkeys(label[2:] for label in self.labels if label != OUTSIDE))

    # -- rows -----------------------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, table: Table, source: DataSource) -> bool:
        """Whether a table has lists of words and lists of tags."""
        words = source.text_columns or _first(_WORDS, table.columns)
        tags = (source.label_column,) if source.label_column else _first(_TAGS, table.columns)
        if len(words) != 1 or not tags:
            return False
        columns = [column_named(name, table.columns) for name in (*words, *tags)]
        return all(name and isinstance(as_list(table.column(name)[0]), list) for name in columns)

    @classmethod
    def own(cls) -> TokenClassification:
        """A task whose columns and entity types are detected in the data."""
        return cls()

    @classmethod
    def of_record(cls, record: Mapping[str, Any], config: Any) -> TokenClassification:
        """See `Task`. For a base checkpoint, the labels of its configuration are used.

        Raises:
            ModelError: the labels are not entity tags.
        """
        labels = tuple(record.get("labels") or (config.id2label[number] for number in range(config.num_labels)))
        if OUTSIDE not in labels or not all(label == OUTSIDE or label.startswith(READ) for label in labels):
            raise ModelError(
                f"the model's labels are {listed(labels)}, not entity tags O, B-... and I-...; train it first"
            )
        data = record.get("data", {})
        return cls(OWN, tuple(data.get("text_columns") or ()), labels, label_column=data.get("label_column") or "")

    def chosen(self, source: DataSource) -> TokenClassification:
        """A copy with the columns that the user gave."""
        for name in ("problem_type", "label_separator"):
            if getattr(source, name):
                raise ConfigError(f"--{name.replace('_', '-')} does not apply to token classification; remove it")
        if source.text_columns and len(source.text_columns) > 1:
            raise ConfigError(f"--text-columns: {self.kind} reads one column of words; name one")
        words, tags = source.text_columns or self.text_columns, source.label_column or self.label_column
        return replace(self, text_columns=words, label_column=tags)

    def read(self, table: Table, *, labelled: bool) -> tuple[TokenClassification, Split]:
        """Read sentences as words, and the IOB2 tag number of each word if there is a tag column."""
        task = self._with_columns(table)
        column = known_column(table, task.text_columns[0], "--text-columns")
        if labelled:
            known_column(table, task.label_column, "--label-column")
        tag_column = column_named(task.label_column, table.columns)
        check_distinct([column, *filter(None, [tag_column])], table.origin)
        cells = table.column(column)
        words = [_parts(cell, "words", column, partial(table.place, row)) for row, cell in enumerate(cells)]
        if tag_column is None:
            return task, Split(words, None, table.origin)
        tags = []
        for row, cell in enumerate(table.column(tag_column)):
            tags.append(_parts(cell, "tags", tag_column, partial(table.place, row)))
            if len(tags[row]) != len(words[row]):
                raise DataError(
                    f"{table.place(row)}: {len(tags[row])} tags for {len(words[row])} words; every word needs one tag"
                )
        rows = one_form(tags, table.place)
        entities = [entities_of(row) for row in rows]
        if not task.labels:
            kinds = sorted({kind for row in entities for kind, _, _ in row})
            if not kinds:
                raise DataError(
                    f"{table.origin}: column '{task.label_column}' has no entity; choose another with --label-column"
                )
            task = replace(task, labels=(OUTSIDE, *(f"{part}-{kind}" for kind in kinds for part in "BI")))
        gold = [task._numbers(spans, len(tags[row]), partial(table.place, row)) for row, spans in enumerate(entities)]
        return task, Split(words, gold, table.origin, note=scheme(rows, tags, table.origin))

    def reader(
        self, first: Row, origin: str, *, plain: bool, columns: Sequence[str]
    ) -> Callable[[Sequence[Row]], Split]:
        """Return a reader of lists of words, or of texts split at whitespace."""
        guesses = (*columns,) or (*self.text_columns, *_WORDS, *_LINES)
        there = list(first.cells)
        name = "text" if plain else next((column for guess in guesses if (column := column_named(guess, there))), "")
        if not name:
            raise DataError(f"{origin} has no column '{guesses[0]}'; {columns_told(there, '--text-columns')}")
        cell = first.cells[name]
        if plain or (name.lower() in _LINES and name not in self.text_columns):  # a text in brackets is not a list
            in_lines = not isinstance(cell, (list, tuple))
        else:
            in_lines = isinstance(as_list(cell), str)

        def read(rows: Sequence[Row]) -> Split:
            cells = [row.cells.get(name) for row in rows]

            def place(number: int) -> str:
                return f"{origin}, {rows[number].place}"

            if in_lines:
                lines = [text_of(cell, name, partial(place, row)) for row, cell in enumerate(cells)]
                words = [tuple(_NOT_BLANK.findall(line)) for line in lines]
                return Split(words, None, origin, lines, place=place)
            texts = [_parts(cell, "words", name, partial(place, row)) for row, cell in enumerate(cells)]
            return Split(texts, None, origin, place=place)

        return read

    def for_training(self, config: RunConfig, gold: Sequence[Any]) -> TokenClassification:
        """A copy with scikit-learn's `balanced` class weights, if requested.

        Raises:
            ConfigError: a threshold is given.
        """
        self.only_labels(config)
        if config.threshold != AUTO:
            raise ConfigError("--threshold is only for multi-label tasks, but a word has one tag; remove it")
        return replace(self, class_weights=tuple(self.balanced(gold)) if config.class_weights else ())

    def balanced(self, gold: Sequence[Any]) -> list[float]:
        """Class weights: words / (tags x words with this tag)."""
        words = [number for row in gold for number in row]
        counts = [max(words.count(number), 1) for number in range(len(self.labels))]
        return [len(words) / (len(counts) * count) for count in counts]

    def notes(self, rows: Mapping[str, Split]) -> list[str]:
        """Notes about the words, and about splits without entities."""
        notes = super().notes(rows)
        for name, split in rows.items():
            if name != TRAIN and not any(map(any, split.labels or [])):
                notes.append(f"{split.origin} has no entity, so precision, recall and f1 will be 0")
        return notes

    # -- model ----------------------------------------------------------------------------------------------------------

    def encode(
        self,
        split: Split,
        tokenizer: Any,
        limit: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        cache: Path | None = None,
    ) -> Encoded:
        """Tokenize sentences, with a target on the first token of each word."""
        return encode(split, tokenizer, limit, progress, cache, of_words=True)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Cross-entropy, summed over the words."""
        logits = self.outputs(model, batch).float()  # (rows, tokens, labels)
        assert batch.targets is not None
        weights = torch.tensor(self.class_weights, device=logits.device) if self.class_weights else None
        return functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), weight=weights, ignore_index=IGNORED, reduction="sum"
        )

    def scores(self, model: Any, batch: Batch) -> list[Tensor]:
        """The logits (words, labels) of each row; -inf for a word without a token."""
        logits = self.outputs(model, batch).float().cpu()  # (rows, tokens, labels)
        logits_of_rows = []
        for row, places in zip(logits, batch.words or [], strict=True):
            index = torch.tensor(places, dtype=torch.long)
            scores = torch.full((len(places), row.shape[-1]), -torch.inf)
            scores[index >= 0] = row[index[index >= 0]]
            logits_of_rows.append(scores)
        return logits_of_rows

    def fit_head(
        self, features: Sequence[Tensor], gold: Sequence[Any], *, bias: bool, progress: Progress = silent
    ) -> tuple[Tensor, Tensor]:
        """Fit a logistic regression on words with a token, stratified by tag."""
        words = torch.cat(list(features))  # (words, features)
        targets = torch.tensor([number for row in gold for number in row], dtype=torch.long)
        seen = _seen(words)
        words, targets = words[seen], targets[seen]
        order = targets.argsort(stable=True)
        order = order[torch.linspace(0, len(order) - 1, min(len(order), _WORDS_FITTED)).round().long()]
        x, y = words[order].double().numpy(), targets[order].numpy()
        layer = fit_labels(x, y, len(self.labels), factors=self.class_weights, bias=bias, progress=progress)
        return self.in_head_order(layer)

    # -- results --------------------------------------------------------------------------------------------------------

    def measure(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, float]:
        """Entity precision, recall and F1 as in conlleval, word accuracy, and mean loss per word."""
        metrics = entity_metrics([self._named(row) for row in gold], [self._decided(row) for row in scores])
        logits, targets = self.forecasts(scores, gold)
        total = float(functional.cross_entropy(logits, targets, reduction="sum"))
        return {name: metrics[name] for name in self.metrics} | {"loss": total / max(len(targets), 1)}

    def baseline(self, train: Sequence[Any], gold: Sequence[Any]) -> dict[str, float]:
        """The metrics of predicting O for every word."""
        named = [self._named(row) for row in gold]
        metrics = entity_metrics(named, [[OUTSIDE] * len(row) for row in named])
        return {name: metrics[name] for name in self.metrics}

    def tables(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, Any]:
        """Precision, recall, F1 and support of each entity type, and the calibration error of words."""
        predicted = [self._decided(row) for row in scores]
        kinds = by_kind([self._named(row) for row in gold], predicted, self.answers)
        return {"by_label": kinds, "ece": self.calibration(scores, gold)}

    def forecasts(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The calibration error of the words with a token."""
        logits = torch.cat(list(scores))  # (words, labels)
        seen = _seen(logits)
        return logits[seen], torch.tensor([number for row in gold for number in row], dtype=torch.long)[seen]

    def mistakes(self, scores: Sequence[Tensor], split: Split) -> Iterator[tuple[float, dict[str, Any]]]:
        """The `word` of each sentence with the most confident wrong tag."""
        for row, (words, logits, gold) in enumerate(zip(split.texts, scores, split.labels or [], strict=True)):
            sure, predicted = torch.softmax(logits, dim=-1).nan_to_num().max(dim=-1)  # (words,), 0 without a token
            wrong = sure * (predicted != torch.tensor(gold, dtype=torch.long))
            if wrong.any():
                word = int(wrong.argmax())
                tags = {"label": self.labels[gold[word]], "prediction": self.labels[int(predicted[word])]}
                fields = {"word": words[word], **tags, "confidence": round(float(wrong[word]), 6)}
                yield float(wrong[word]), {"place": split.place_of(row), **fields, "texts": [" ".join(words)]}

    def records(self, scores: Sequence[Tensor], split: Split) -> Iterator[dict[str, Any]]:
        """The entities of each row, with their offsets in `text`: the original line, or the words joined by spaces."""
        for row, (words, logits) in enumerate(zip(split.texts, scores, strict=True)):
            text = split.lines[row] if split.lines else " ".join(words)
            if split.lines:
                places = [match.span() for match in _NOT_BLANK.finditer(text)]
            else:
                ends = accumulate(len(word) + 1 for word in words)
                places = [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]
            best = torch.softmax(logits, dim=-1).amax(dim=-1).tolist()  # (words,)
            spans = [
                _span(text, places, entity) | {"score": round(fmean(best[entity[1] : entity[2] + 1]), 6)}
                for entity in entities_of(self._decided(logits))
            ]
            record: dict[str, Any] = {"prediction": spans, "text": text}
            if split.labels is not None:
                record["label"] = [_span(text, places, it) for it in entities_of(self._named(split.labels[row]))]
            yield record

    def _decided(self, logits: Tensor) -> list[str]:
        """The tag of every word, from its logits (words, labels)."""
        numbers = logits.argmax(dim=-1).tolist()
        return [self.labels[number] if seen else OUTSIDE for number, seen in zip(numbers, _seen(logits), strict=True)]

    def _named(self, numbers: Sequence[int]) -> list[str]:
        return [self.labels[number] for number in numbers]

    def _numbers(self, entities: Sequence[Entity], words: int, place: Callable[[], str]) -> list[int]:
        """The IOB2 tags of a sentence, restricted to the labels of the checkpoint."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        tags: list[Any] = [numbers[OUTSIDE]] * words
        for kind, first, last in entities:
            if kind not in self.answers:
                raise DataError(f"{place()}: '{kind}' is not an entity type of the training ({listed(self.answers)})")
            begin, inside = (numbers.get(f"{part}-{kind}") for part in "BI")
            tags[first : last + 1] = [begin if inside is None else inside] * (last + 1 - first)
            tags[first] = inside if begin is None else begin
        return tags

    # -- on disk --------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """The record of the task that is saved with an adapter."""
        return {"task": self.name, "task_type": self.kind, "labels": list(self.labels)}

    def columns(self) -> dict[str, Any]:
        """The columns that were read."""
        return {"text_columns": self.text_columns, "label_column": self.label_column}

    def settings(self) -> dict[str, Any]:
        """The settings that repeat what was found in the user's own data."""
        return {
            "task_type": self.kind,
            "text_columns": join_names(self.text_columns),
            "label_column": self.label_column,
        }

    def _with_columns(self, table: Table) -> TokenClassification:
        """The task with its columns: those given, or by their usual names."""
        words = self.text_columns or _first(_WORDS, table.columns) or _WORDS[:1]
        tags = self.label_column or (*_first(_TAGS, table.columns), _TAGS[0])[0]
        return replace(self, text_columns=words, label_column=tags)


def _first(guesses: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    return next(((column,) for guess in guesses if (column := column_named(guess, columns))), ())


def _parts(cell: Any, what: str, column: str, place: Callable[[], str]) -> tuple[str, ...]:
    """Read the words or tags of a cell; csv stores lists as text."""
    parts = as_list(cell)
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, (str, int, float)) for part in parts):
        raise DataError(f"{place()}: column '{column}' has no list of {what}")
    if any(is_missing(part) or not whole_text(str(part)) for part in parts):
        raise DataError(
            f"{place()}: column '{column}' has {what} without text, or with an invalid character (a lone surrogate)"
        )
    return tuple(str(part) for part in parts)


def _seen(logits: Tensor) -> Tensor:
    """Which words have a token (words,), from their logits (words, labels)."""
    return ~torch.isneginf(logits).all(dim=-1)


def _span(text: str, places: Sequence[tuple[int, int]], entity: Entity) -> dict[str, Any]:
    kind, first, last = entity
    start, end = places[first][0], places[last][1]
    return {"label": kind, "text": text[start:end], "start": start, "end": end}
