"""Entities in sentences: a label for every word, `--task-type token-classification`.

Tags are read in IOB1, IOB2, IOBES (and its kin BILOU and BMES) or without a prefix, as conlleval reads them; IOB2 is what
a model learns and answers. The label of a word is on its first token. A word without a token of its own, or beyond the
length, counts as predicted O.
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
from craft_cli.tasks.texts import known_column, text_of

if TYPE_CHECKING:
    from craft_cli.data.readers import Row
    from craft_cli.data.tables import Table

_WORDS_FITTED = 20_000
"""More words than these are no better start of a head."""
_WORDS, _TAGS = ("tokens", "words"), ("tags", "ner_tags", "labels", "label")
_LINES = ("text", "sentence")
_NOT_BLANK = re.compile(r"\S+")


@dataclass(frozen=True)
class TokenClassification(Labelled):
    """Which words of a sentence are an entity, and of which kind. The methods are those of `tasks.base.Task`.

    Attributes:
        labels: `O`, and `B-` and `I-` of every kind.
        metrics: of whole entities, micro averages; accuracy of words.
    """

    kind: ClassVar[str] = "token-classification"
    auto_model: ClassVar[str] = "AutoModelForTokenClassification"
    stratified: ClassVar[bool] = False

    metrics: tuple[str, ...] = ("f1", "precision", "recall", "accuracy")
    label_column: str = field(default="", kw_only=True)

    @property
    def answers(self) -> tuple[str, ...]:
        """The kinds of entities."""
        return tuple(dict.fromkeys(label[2:] for label in self.labels if label != OUTSIDE))

    # -- rows -----------------------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, table: Table, source: DataSource) -> bool:
        """Whether there are lists of words, and lists of tags beside them."""
        words = source.text_columns or _first(_WORDS, table.columns)
        tags = (source.label_column,) if source.label_column else _first(_TAGS, table.columns)
        if len(words) != 1 or not tags:
            return False
        columns = [column_named(name, table.columns) for name in (*words, *tags)]
        return all(name and isinstance(as_list(table.column(name)[0]), list) for name in columns)

    @classmethod
    def own(cls) -> TokenClassification:
        """Columns and kinds of entities are to be found in the data."""
        return cls()

    @classmethod
    def of_record(cls, record: Mapping[str, Any], config: Any) -> TokenClassification:
        """Of a checkpoint: the labels of its configuration.

        Raises:
            ModelError: they are no tags of entities.
        """
        labels = tuple(record.get("labels") or (config.id2label[number] for number in range(config.num_labels)))
        if OUTSIDE not in labels or not all(label == OUTSIDE or label.startswith(READ) for label in labels):
            raise ModelError(
                f"the model's labels are {listed(labels)}, not O, B-... and I-... of entities: train it first"
            )
        data = record.get("data", {})
        return cls(OWN, tuple(data.get("text_columns") or ()), labels, label_column=data.get("label_column") or "")

    def chosen(self, source: DataSource) -> TokenClassification:
        """With the columns that the user names."""
        for name in ("problem_type", "label_separator"):
            if getattr(source, name):
                raise ConfigError(f"--{name.replace('_', '-')} is for texts; words have one tag each: leave it out")
        if source.text_columns and len(source.text_columns) > 1:
            raise ConfigError(f"--text-columns: {self.kind} reads one column, of words")
        words, tags = source.text_columns or self.text_columns, source.label_column or self.label_column
        return replace(self, text_columns=words, label_column=tags)

    def read(self, table: Table, *, labelled: bool) -> tuple[TokenClassification, Split]:
        """Sentences in words, and the number of each word's IOB2 tag where there is a column of tags."""
        task = self._with_columns(table)
        column = known_column(table, task.text_columns[0], "--text-columns")
        if labelled:
            known_column(table, task.label_column, "--label-column")
        tag_column = column_named(task.label_column, table.columns)
        cells = table.column(column)
        words = [_parts(cell, "words", column, partial(table.place, row)) for row, cell in enumerate(cells)]
        if tag_column is None:
            return task, Split(words, None, table.origin)
        tags = []
        for row, cell in enumerate(table.column(tag_column)):
            tags.append(_parts(cell, "tags", tag_column, partial(table.place, row)))
            if len(tags[row]) != len(words[row]):
                found = f"{len(tags[row])} tags for {len(words[row])} words"
                raise DataError(f"{table.place(row)}: {found}; every word needs one")
        rows = one_form(tags, table.place)
        entities = [entities_of(row) for row in rows]
        if not task.labels:
            kinds = sorted({kind for row in entities for kind, _, _ in row})
            if not kinds:
                raise DataError(
                    f"{table.origin}: column '{task.label_column}' holds no entity; nothing can be learned from it"
                )
            task = replace(task, labels=(OUTSIDE, *(f"{part}-{kind}" for kind in kinds for part in "BI")))
        gold = [task._numbers(found, len(tags[row]), partial(table.place, row)) for row, found in enumerate(entities)]
        return task, Split(words, gold, table.origin, note=scheme(rows, tags, table.origin))

    def reader(
        self, first: Row, origin: str, *, plain: bool, columns: Sequence[str]
    ) -> Callable[[Sequence[Row]], Split]:
        """Lists of words, or texts that are divided at white space."""
        guesses = (*columns,) or (*self.text_columns, *_WORDS, *_LINES)
        there = list(first.cells)
        name = "text" if plain else next((found for guess in guesses if (found := column_named(guess, there))), "")
        if not name:
            raise DataError(f"{origin} has no column '{guesses[0]}'; {columns_told(there, '--text-columns')}")
        cell = first.cells[name]
        if plain or (name.lower() in _LINES and name not in self.text_columns):  # a text in brackets is no list
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
        """With scikit-learn's `balanced` weights of the tags, where they are asked for.

        Raises:
            ConfigError: a threshold, where there is none.
        """
        self.only_labels(config)
        if config.threshold != AUTO:
            raise ConfigError("--threshold: only where several labels can apply, and a word has one tag; leave it out")
        return replace(self, class_weights=tuple(self.balanced(gold)) if config.class_weights else ())

    def balanced(self, gold: Sequence[Any]) -> list[float]:
        """Words / (tags x words of it)."""
        words = [number for row in gold for number in row]
        counts = [max(words.count(number), 1) for number in range(len(self.labels))]
        return [len(words) / (len(counts) * count) for count in counts]

    def notes(self, rows: Mapping[str, Split]) -> list[str]:
        """Of the words, and of rows to evaluate on that hold nothing to be found."""
        found = super().notes(rows)
        for name, split in rows.items():
            if name != TRAIN and not any(map(any, split.labels or [])):
                found.append(f"{split.origin} holds no entity: precision, recall and f1 are 0 whatever is found")
        return found

    # -- model ----------------------------------------------------------------------------------------------------------

    def encode(
        self,
        split: Split,
        tokenizer: Any,
        limit: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        cache: Path | None = None,
    ) -> Encoded:
        """The words of a sentence in a row of tokens, the first of each word with its target."""
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
        """For each row the logits (words, labels); -inf for a word without a token."""
        logits = self.outputs(model, batch).float().cpu()  # (rows, tokens, labels)
        found = []
        for row, places in zip(logits, batch.words or [], strict=True):
            index = torch.tensor(places, dtype=torch.long)
            scores = torch.full((len(places), row.shape[-1]), -torch.inf)
            scores[index >= 0] = row[index[index >= 0]]
            found.append(scores)
        return found

    def fit_head(
        self, features: Sequence[Tensor], gold: Sequence[Any], *, bias: bool, progress: Progress = silent
    ) -> tuple[Tensor, Tensor]:
        """A logistic regression of the words that have a token, of every tag its share."""
        words = torch.cat(list(features))  # (words, features)
        targets = torch.tensor([number for row in gold for number in row], dtype=torch.long)
        seen = _seen(words)
        words, targets = words[seen], targets[seen]
        order = targets.argsort(stable=True)
        order = order[torch.linspace(0, len(order) - 1, min(len(order), _WORDS_FITTED)).round().long()]
        x, y = words[order].double().numpy(), targets[order].numpy()
        found = fit_labels(x, y, len(self.labels), factors=self.class_weights, bias=bias, progress=progress)
        return self.in_head_order(found)

    # -- results --------------------------------------------------------------------------------------------------------

    def measure(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, float]:
        """Precision, recall and F1 of entities as conlleval counts them, accuracy of words, mean loss of words."""
        metrics = entity_metrics([self._named(row) for row in gold], [self._decided(row) for row in scores])
        logits, targets = self.forecasts(scores, gold)
        total = float(functional.cross_entropy(logits, targets, reduction="sum"))
        return {name: metrics[name] for name in self.metrics} | {"loss": total / max(len(targets), 1)}

    def baseline(self, train: Sequence[Any], gold: Sequence[Any]) -> dict[str, float]:
        """Always O."""
        named = [self._named(row) for row in gold]
        found = entity_metrics(named, [[OUTSIDE] * len(row) for row in named])
        return {name: found[name] for name in self.metrics}

    def tables(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, Any]:
        """Precision, recall, F1 and support of each kind of entity; the calibration error of words."""
        found = [self._decided(row) for row in scores]
        kinds = by_kind([self._named(row) for row in gold], found, self.answers)
        return {"by_label": kinds, "ece": self.calibration(scores, gold)}

    def forecasts(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Of the words that have a token."""
        logits = torch.cat(list(scores))  # (words, labels)
        seen = _seen(logits)
        return logits[seen], torch.tensor([number for row in gold for number in row], dtype=torch.long)[seen]

    def mistakes(self, scores: Sequence[Tensor], split: Split) -> Iterator[tuple[float, dict[str, Any]]]:
        """Of a sentence the `word` with the surest wrong tag."""
        for row, (words, logits, gold) in enumerate(zip(split.texts, scores, split.labels or [], strict=True)):
            sure, found = torch.softmax(logits, dim=-1).nan_to_num().max(dim=-1)  # (words,), 0 without a token
            wrong = sure * (found != torch.tensor(gold, dtype=torch.long))
            if wrong.any():
                word = int(wrong.argmax())
                tags = {"label": self.labels[gold[word]], "prediction": self.labels[int(found[word])]}
                told = {"word": words[word], **tags, "confidence": round(float(wrong[word]), 6)}
                yield float(wrong[word]), {"place": split.place_of(row), **told, "texts": [" ".join(words)]}

    def records(self, scores: Sequence[Tensor], split: Split) -> Iterator[dict[str, Any]]:
        """For each row its entities, with their place in its `text`: a line as it was, or words with blanks between."""
        for row, (words, logits) in enumerate(zip(split.texts, scores, strict=True)):
            text = split.lines[row] if split.lines else " ".join(words)
            if split.lines:
                places = [found.span() for found in _NOT_BLANK.finditer(text)]
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
        found = logits.argmax(dim=-1).tolist()
        return [self.labels[number] if seen else OUTSIDE for number, seen in zip(found, _seen(logits), strict=True)]

    def _named(self, numbers: Sequence[int]) -> list[str]:
        return [self.labels[number] for number in numbers]

    def _numbers(self, entities: Sequence[Entity], words: int, place: Callable[[], str]) -> list[int]:
        """The tags of a sentence in IOB2, as far as the labels of a stranger's checkpoint have them."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        tags: list[Any] = [numbers[OUTSIDE]] * words
        for kind, first, last in entities:
            if kind not in self.answers:
                raise DataError(
                    f"{place()}: '{kind}' is not among the kinds of entities trained on ({listed(self.answers)})"
                )
            begin, inside = (numbers.get(f"{part}-{kind}") for part in "BI")
            tags[first : last + 1] = [begin if inside is None else inside] * (last + 1 - first)
            tags[first] = inside if begin is None else begin
        return tags

    # -- on disk --------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What an adapter keeps of the task."""
        return {"task": self.name, "task_type": self.kind, "labels": list(self.labels)}

    def columns(self) -> dict[str, Any]:
        """Which columns were read."""
        return {"text_columns": self.text_columns, "label_column": self.label_column}

    def settings(self) -> dict[str, Any]:
        """The settings that repeat what was found in the user's own data."""
        return {
            "task_type": self.kind,
            "text_columns": join_names(self.text_columns),
            "label_column": self.label_column,
        }

    def _with_columns(self, table: Table) -> TokenClassification:
        """The task with its columns: as given, or as they are usually called."""
        words = self.text_columns or _first(_WORDS, table.columns) or _WORDS[:1]
        tags = self.label_column or (*_first(_TAGS, table.columns), _TAGS[0])[0]
        return replace(self, text_columns=words, label_column=tags)


def _first(guesses: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    return next(((found,) for guess in guesses if (found := column_named(guess, columns))), ())


def _parts(cell: Any, what: str, column: str, place: Callable[[], str]) -> tuple[str, ...]:
    """The words or tags of a cell; a csv holds lists as text."""
    parts = as_list(cell)
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, (str, int, float)) for part in parts):
        raise DataError(f"{place()}: column '{column}' holds no list of {what}")
    if any(is_missing(part) or not whole_text(str(part)) for part in parts):
        raise DataError(
            f"{place()}: column '{column}' holds {what} without text, or half a character (a lone surrogate)"
        )
    return tuple(str(part) for part in parts)


def _seen(logits: Tensor) -> Tensor:
    """Which words (words,) have a token, from their logits (words, labels)."""
    return ~torch.isneginf(logits).all(dim=-1)


def _span(text: str, places: Sequence[tuple[int, int]], entity: Entity) -> dict[str, Any]:
    kind, first, last = entity
    start, end = places[first][0], places[last][1]
    return {"label": kind, "text": text[start:end], "start": start, "end": end}
