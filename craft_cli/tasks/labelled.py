"""Shared base of tasks with one model output per label."""

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
"""Minimum ratio of class weights worth suggesting."""


@dataclass(frozen=True)
class Labelled:
    """Base class of tasks with one model output per label.

    Attributes:
        name: the value of `--task`; `OWN` for the user's own data.
        text_columns: columns to read. Default: detected in the data.
        labels: label names, in the order of the label numbers.
        metrics: metrics to report.
        label_column: the label column.
        head: labels in the order of the model's outputs; empty if it is the order of `labels`.
        class_weights: loss weight of each label; empty for equal weights.
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
        """Notes about the texts."""
        return row_notes(rows)

    def on_head(self, config: Any, *, strict: bool = True) -> Self:
        """See `Task`."""
        if strict:
            return replace(self, head=align_labels(self.labels, config.id2label))
        if config.num_labels == len(self.labels):
            with suppress(CraftError):  # other label names: a new head is trained
                return replace(self, head=align_labels(self.labels, config.id2label))
        return self

    def prompts(self, split: Split, tokenizer: Any) -> list[list[int]]:
        """See `Task`; not used by these tasks."""
        raise NotImplementedError

    def in_chat(self, tokenizer: Any) -> tuple[Self, bool]:
        """See `Task`; never asked for."""
        raise NotImplementedError

    def ends(self, tokenizer: Any) -> list[int]:
        """See `Task`; not used by these tasks."""
        raise NotImplementedError

    def example(self, encoded: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
        """See `Task`."""
        return []

    def only_labels(self, config: RunConfig) -> None:
        """Refuse settings of language models.

        Raises:
            ConfigError: such a setting is given.
        """
        for name in ("train_on", "chat_template", "packing", "eval_generate"):
            if getattr(config, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for language models, but these rows have labels; remove it"
                )

    def continues(self, config: Any) -> bool:
        """See `Task`; a head without label names may belong to a different task."""
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
        """Class weights that balance frequent and rare labels."""
        raise NotImplementedError

    def remarks(self, tables: Mapping[str, Any], train: Sequence[Any], *, weighted: bool) -> list[str]:
        """See `Task`."""
        missed = [name for name, row in tables.get("by_label", {}).items() if row["support"] and not row["f1"]]
        if not missed:
            return []
        line = f"never predicted correctly on the validation rows (F1 0): {listed(missed, 5)}"
        factors = [] if weighted else self.balanced(train)
        if max(factors, default=0.0) > _UNEVEN * min([1.0, *factors]):
            line += f"; --class-weights balanced weights rare labels higher, here {min(factors):.2g} to {max(factors):.2g} times"
        return [line]

    def in_own_order(self) -> Self:
        """See `Task`."""
        return replace(self, head=())

    def in_head_order(self, probe: Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of a probe, reordered from `labels` to the order of the head."""
        order = [self.labels.index(name) for name in self.head or self.labels]
        return torch.from_numpy(probe.weight[order]), torch.from_numpy(probe.bias[order])

    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """The model's logits (rows, ..., labels), in the order of `labels`."""
        logits: Tensor = model(**batch.inputs).logits
        if self.head in ((), self.labels):
            return logits
        return logits[..., [self.head.index(name) for name in self.labels]]

    def forecasts(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
        """Logits (rows, labels) and gold for calibration: one number per row, or one per label."""
        return torch.stack(list(scores)), torch.tensor(gold)

    def calibration(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float | None:
        """See `Task`."""
        forecasts = self.forecasts(scores, gold)
        return forecast_error(*forecasts) if forecasts else None

    def temperature(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float:
        """See `Task`."""
        forecasts = self.forecasts(scores, gold)
        return temperature(*forecasts) if forecasts else 1.0


def align_labels(labels: Sequence[str], id2label: Mapping[int, str] | None) -> tuple[str, ...]:
    """Order the labels as in a checkpoint's head, if the head has label names; matched by name, never by position.

    Names match regardless of case, unless some labels differ only in case.

    Raises:
        DataError: the checkpoint has different labels.
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
        raise DataError(f"the checkpoint has the labels {listed(theirs)}, but the data has {listed(labels)}")
    return tuple(by_lower[name.lower()] for name in theirs)
