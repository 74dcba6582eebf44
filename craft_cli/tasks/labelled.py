"""What all tasks share whose model has an output for each of some labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from craft_cli.data.sources import Home, Split
from craft_cli.errors import ConfigError, CraftError, DataError, listed
from craft_cli.tasks.base import OWN
from craft_cli.tasks.calibration import forecast_error, temperature
from craft_cli.tasks.checks import row_notes

if TYPE_CHECKING:
    from typing import Self

    from craft_cli.config import RunConfig
    from craft_cli.data.batches import Batch
    from craft_cli.data.tokens import Encoded
    from craft_cli.tasks.probe import Linear

_UNEVEN = 1.5
"""Factors of labels that differ by less would change nothing that can be seen."""


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

    trains_head: ClassVar[bool] = True
    generates: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_seq_length": 128, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64,
    }  # fmt: skip

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

    def prompts(self, split: Split, tokenizer: Any) -> list[list[int]]:
        """See `Task`; never asked for."""
        raise NotImplementedError

    def in_chat(self, tokenizer: Any) -> tuple[Self, bool]:
        """See `Task`; never asked for."""
        raise NotImplementedError

    def ends(self, tokenizer: Any) -> list[int]:
        """See `Task`; never asked for."""
        raise NotImplementedError

    def example(self, encoded: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
        """See `Task`."""
        return []

    def only_labels(self, config: RunConfig) -> None:
        """Refuse the settings of language models.

        Raises:
            ConfigError: one is given.
        """
        for name in ("train_on", "chat_template", "packing", "eval_generate"):
            if getattr(config, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for language models, and these rows have labels; leave it out"
                )

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
