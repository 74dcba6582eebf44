"""Language modeling, `--task-type causal-lm`: conversations, prompts with completions, or plain text.

The loss covers the trained tokens only: the assistant's turns with their end tokens, a completion, or the whole text. It is a
sum; the training loop divides by the number of trained tokens. The model keeps its own head, which is not trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from craft_cli.config import AUTO, RunConfig
from craft_cli.data.batches import Batch
from craft_cli.data.sources import DataSource, Home, Split
from craft_cli.data.tables import column_named, columns_listed
from craft_cli.data.tokens import IGNORED, Encoded
from craft_cli.errors import ConfigError, DataError, ModelError
from craft_cli.tasks.base import OWN
from craft_cli.tasks.checks import row_notes
from craft_cli.tasks.dialogues import (
    COMPLETION,
    FORMS,
    MESSAGES,
    TEXT,
    Conversation,
    as_text,
    layout_of,
    read_row,
    rows_of,
    waiting,
)
from craft_cli.tasks.generation import MATCHES, Matcher
from craft_cli.tasks.language_loss import losses_and_hits, model_inputs, summed_loss
from craft_cli.tasks.templates import ALL, TRAIN_ON, Renderer, end_tokens, learned_by_default, template_named

if TYPE_CHECKING:
    from craft_cli.data.readers import Row
    from craft_cli.data.tables import Table
    from craft_cli.tasks.probe import Progress

_LABELS_ONLY = ("label_column", "label_separator", "problem_type")
_ROWS_AT_ONCE = 200


@dataclass(frozen=True)
class CausalLM:
    """A language modeling task. The methods are those of `tasks.base.Task`.

    Attributes:
        name: `OWN`, or the name of a sample.
        text_columns: columns to read: of conversations, of prompt and completion, or of texts.
        form: format of the rows, one of `dialogues.FORMS`; empty before any are read.
        beside: the column with the input of an instruction; empty if there is none.
        train_on: the tokens to train on, one of `templates.TRAIN_ON`; if empty, it depends on the form of the rows.
        template: a chat template to use instead of the tokenizer's; empty for the tokenizer's.
        packing: whether rows are packed into shared sequences in training.
        asked: number of validation rows to generate answers to at each evaluation.
        sample: folder in `craft_cli/samples`, for chats that ship with craft.
    """

    kind: ClassVar[str] = "causal-lm"
    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    labels: ClassVar[tuple[str, ...]] = ()
    answers: ClassVar[tuple[str, ...]] = ()
    stratified: ClassVar[bool] = False
    trains_head: ClassVar[bool] = False
    generates: ClassVar[bool] = True
    chooser: ClassVar[str] = "loss"
    units: ClassVar[tuple[float, float]] = (0.0, 1.0)
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_seq_length": 1024, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
    }  # fmt: skip

    name: str = OWN
    text_columns: tuple[str, ...] = ()
    form: str = ""
    beside: str = ""
    train_on: str = ""
    template: str = ""
    packing: bool = False
    asked: int = 0
    sample: str = ""

    # -- rows -----------------------------------------------------------------------------------------------------------

    @property
    def home(self) -> Home:
        """The location of a sample's rows."""
        return Home(sample=self.sample or None)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, with exact match if answers are generated."""
        return ("perplexity", "token_accuracy", *([MATCHES] if self.asked else []))

    @classmethod
    def recognises(cls, table: Table, source: DataSource) -> bool:
        """Whether a table has conversations, prompts with completions, or texts without labels."""
        if any(getattr(source, name) for name in _LABELS_ONLY):
            return False
        layout = layout_of(table.columns, _first(table), source.text_columns or ())
        if layout is None or (source.text_columns and layout.form != MESSAGES):
            return False
        return layout.form != TEXT or list(table.columns) == ["text"]

    @classmethod
    def own(cls) -> CausalLM:
        """A task whose columns and form are detected in the data."""
        return cls()

    @classmethod
    def of_record(cls, record: Mapping[str, Any], config: Any) -> CausalLM:
        """The task of an adapter; of a base checkpoint, columns and form are unknown."""
        data, form, train_on = record.get("data", {}), record.get("form", ""), record.get("train_on", "")
        if form not in ("", *FORMS) or train_on not in ("", *TRAIN_ON):
            raise ModelError(
                f"the adapter is damaged: its training form {form or train_on!r} is unknown to this version"
            )
        columns = tuple(data.get("text_columns") or ())
        beside, template = str(data.get("beside") or ""), str(record.get("chat_template") or "")
        task = cls(OWN, columns, form, beside, train_on, template)
        if record.get("task", OWN) == OWN:
            return task
        from craft_cli.tasks.glue import task_of

        known = task_of(cls, record["task"])
        return replace(task, name=known.name, sample=known.sample)

    def chosen(self, source: DataSource) -> CausalLM:
        """A copy with the columns that the user gave."""
        for name in _LABELS_ONLY:
            if getattr(source, name):
                raise ConfigError(f"--{name.replace('_', '-')}: a language model has no labels; remove it")
        if not source.text_columns or source.text_columns == self.text_columns:
            return self
        return replace(self, text_columns=source.text_columns, form="", beside="")

    def read(self, table: Table, *, labelled: bool) -> tuple[CausalLM, Split]:
        """Read the rows, with the reference answer of each."""
        wanted = [column_named(name, table.columns) for name in self.text_columns]
        missing = [name for name, column in zip(self.text_columns, wanted, strict=True) if column is None]
        layout = layout_of(table.columns, _first(table), [name for name in wanted if name])
        if layout is None or missing:
            lacking = f"no column '{missing[0]}'" if missing else "no column of conversations, prompts or texts"
            raise DataError(
                f"{table.origin} has {lacking}; it has {columns_listed(table.columns)} (choose with --text-columns: messages, "
                "prompt,completion or text)"
            )
        if self.form and layout.form != self.form:
            raise DataError(
                f"{table.origin} has rows of the form '{layout.form}', but the training rows have the form '{self.form}'"
            )
        rows = rows_of(table, layout)
        task = replace(self, text_columns=layout.columns, form=layout.form, beside=layout.beside)
        return task, Split(rows, [_answer(row, layout.form) for row in rows], table.origin)

    def reader(
        self, first: Row, origin: str, *, plain: bool, columns: Sequence[str]
    ) -> Callable[[Sequence[Row]], Split]:
        """Return a reader of prompts or conversations to answer. A line of text is a user message, or the start of a text."""
        speaks = self.form == MESSAGES or not self.form
        wanted = ("text",) if plain else (*columns,) or self.text_columns
        layout = waiting(first.cells, wanted, self.beside, speaks=speaks)
        if layout is None:
            raise DataError(
                f"{origin} has no column of prompts or conversations; it has {columns_listed(first.cells)} (choose with --text-columns)"
            )

        def read(rows: Sequence[Row]) -> Split:
            def place(number: int) -> str:
                return f"{origin}, {rows[number].place}"

            texts = [
                read_row(row.cells, layout, partial(place, number), answered=False) for number, row in enumerate(rows)
            ]
            return Split(texts, None, origin, place=place)

        return read

    def for_training(self, config: RunConfig, gold: Sequence[Any]) -> CausalLM:
        """A copy with the tokens to train on settled.

        Raises:
            ConfigError: a setting does not apply to language models, or not to this form of rows.
        """
        refused = {
            "threshold": config.threshold != AUTO, "class_weights": config.class_weights, "calibrate": config.calibrate,
            "head_start": config.head_start != AUTO,
        }  # fmt: skip
        for name, given in refused.items():
            if given:
                raise ConfigError(f"--{name.replace('_', '-')}: a language model keeps its own head; remove it")
        train_on = config.train_on or learned_by_default(self.form)
        possible = {MESSAGES: TRAIN_ON, COMPLETION: TRAIN_ON[2:], TEXT: (ALL,)}[self.form]
        if train_on not in possible:
            raise ConfigError(
                f"--train-on {train_on}: rows of {', '.join(self.text_columns)} have {' or '.join(possible)}"
            )
        if config.chat_template and self.form != MESSAGES:
            raise ConfigError(
                f"--chat-template: rows of {', '.join(self.text_columns)} are used without a template; remove it"
            )
        template = template_named(config.chat_template) if config.chat_template else ""
        if config.eval_generate and self.form == TEXT:
            raise ConfigError("--eval-generate: plain texts have no answers to compare; remove it")
        Matcher(config.answer_pattern)
        return replace(
            self, train_on=train_on, template=template, packing=config.packing, asked=config.eval_generate or 0
        )

    def notes(self, rows: Mapping[str, Split]) -> list[str]:
        """Notes about the texts."""
        return row_notes(rows)

    # -- model ----------------------------------------------------------------------------------------------------------

    def on_head(self, config: Any, *, strict: bool = True) -> CausalLM:
        """A copy for this model, whose head is kept.

        Raises:
            ModelError: the model is bidirectional.
            ConfigError: the model does not support packing.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
            raise ModelError(
                f"a {config.model_type} model is bidirectional and cannot generate text; choose a decoder model"
            )
        if self.packing and (config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False)):
            raise ConfigError(
                f"--packing: a {config.model_type} model uses relative positions, which packing does not support; remove it"
            )
        return self

    def continues(self, config: Any) -> bool:
        """Always."""
        return True

    def model_options(self) -> dict[str, Any]:
        """None."""
        return {}

    def encode(
        self,
        split: Split,
        tokenizer: Any,
        limit: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        cache: Path | None = None,
    ) -> Encoded:
        """Tokenize rows, with the trained tokens as targets."""
        renderer = Renderer(tokenizer, self.form, self.train_on or learned_by_default(self.form), self.template)
        features, targets, cut = [], [], 0
        for number, row in enumerate(split.texts):
            rendered = renderer.row(row, split.place_of(number), limit)
            features.append({"input_ids": rendered.ids[:limit]})
            targets.append(rendered.targets[:limit])
            cut += len(rendered.ids) > limit
            if number % _ROWS_AT_ONCE == 0 or number + 1 == len(split):
                progress(number + 1, len(split))
        return Encoded(features, split.labels, cut, limit, targets=targets)

    def in_chat(self, tokenizer: Any) -> tuple[CausalLM, bool]:
        """See `Task`. Conversations require a chat template and a model that was not trained on another form."""
        if self.form not in ("", MESSAGES):
            return self, False
        if self.template or tokenizer.chat_template:
            return self, True
        return replace(self, form=TEXT), False

    def prompts(self, split: Split, tokenizer: Any) -> list[list[int]]:
        """The prompt tokens of each row."""
        renderer = Renderer(tokenizer, self.form or MESSAGES, ALL, self.template)
        return [renderer.prompt(row, split.place_of(number)) for number, row in enumerate(split.texts)]

    def ends(self, tokenizer: Any) -> list[int]:
        """The tokens that end a text or the assistant's turn."""
        return (
            end_tokens(tokenizer, self.template) if self.form in ("", MESSAGES) else end_tokens(tokenizer, chat=False)
        )

    def example(self, encoded: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
        """The first row with trained tokens."""
        assert encoded.targets is not None
        row = next((row for row, weight in enumerate(encoded.weights) if weight), 0)
        length = encoded.segments[row].count(0) if encoded.segments else encoded.lengths[row]
        pairs = islice(zip(encoded.features[row]["input_ids"], encoded.targets[row], strict=True), length)
        parts = [
            (learned, [token for token, _ in some]) for learned, some in groupby(pairs, lambda pair: pair[1] != IGNORED)
        ]
        return [(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), learned) for learned, ids in parts]

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Cross-entropy, summed over the trained tokens."""
        assert batch.targets is not None
        return summed_loss(model, model_inputs(model, batch), batch.targets)

    def scores(self, model: Any, batch: Batch) -> list[Tensor]:
        """For each row (3,): summed loss, number of targets predicted correctly, number of targets."""
        assert batch.targets is not None
        return losses_and_hits(model, model_inputs(model, batch), batch.targets)

    def in_own_order(self) -> CausalLM:
        """Return the scores unchanged."""
        return self

    def fit_head(
        self, features: Sequence[Tensor], gold: Sequence[Any], *, bias: bool, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """Not used: there is no head to fit."""
        raise NotImplementedError

    # -- results --------------------------------------------------------------------------------------------------------

    def settled(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> CausalLM:
        """Nothing to choose on the validation rows."""
        return self

    def measure(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, float]:
        """Mean loss per target token in nats, perplexity, and token accuracy."""
        losses, hits, count = (float(column) for column in torch.stack(list(scores)).double().sum(dim=0))
        loss = losses / max(count, 1.0)
        return {"perplexity": math.exp(min(loss, 700.0)), "token_accuracy": hits / max(count, 1.0), "loss": loss}

    def baseline(self, train: Sequence[Any], gold: Sequence[Any]) -> dict[str, float]:
        """Empty: the baseline is the untrained model at update 0."""
        return {}

    def tables(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, Any]:
        """None."""
        return {}

    def calibration(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float | None:
        """None."""
        return None

    def temperature(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float:
        """None."""
        return 1.0

    def mistakes(self, scores: Sequence[Tensor], split: Split) -> Iterator[tuple[float, dict[str, Any]]]:
        """Rows by mean loss."""
        for row, (losses, hits, count) in enumerate(torch.stack(list(scores)).tolist()):
            mean = losses / max(count, 1.0)
            fields = {
                "label": (split.labels or [""])[row],
                "prediction": f"{hits:g} of {count:g} tokens",
                "error": round(mean, 6),
            }
            yield mean, {"place": split.place_of(row), **fields, "texts": [as_text(split.texts[row], self.form)]}

    def remarks(self, tables: Mapping[str, Any], train: Sequence[Any], *, weighted: bool) -> list[str]:
        """None."""
        return []

    def records(self, scores: Sequence[Tensor], split: Split) -> Iterator[dict[str, Any]]:
        """For each row, its reference answer and how well the model predicts it."""
        for row, (losses, hits, count) in enumerate(torch.stack(list(scores)).tolist()):
            yield {
                "label": (split.labels or [""])[row], "loss": losses / max(count, 1.0),
                "token_accuracy": hits / max(count, 1.0), "targets": int(count),
            }  # fmt: skip

    # -- on disk --------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """The record of columns, form and template."""
        record = {"task": self.name, "task_type": self.kind, "form": self.form, "train_on": self.train_on}
        return record | ({"chat_template": self.template} if self.template else {})

    def columns(self) -> dict[str, Any]:
        """The columns that are read."""
        return {"text_columns": list(self.text_columns)} | ({"beside": self.beside} if self.beside else {})

    def settings(self) -> dict[str, Any]:
        """The settings by flag name."""
        return {"task_type": self.kind, "text_columns": ",".join(self.text_columns)}


def _first(table: Table) -> dict[str, Any]:
    return {name: next(iter(table.column(name)), None) for name in table.columns}


def _answer(row: Sequence[str], form: str) -> str:
    if form == MESSAGES:
        return Conversation.of(row[0]).answer
    return row[1] if form == COMPLETION else ""
