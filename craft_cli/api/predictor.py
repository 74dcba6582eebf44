"""Logits of rows: of any model in memory, and of whatever can be named on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.data.batches import length_sorted_batches
from craft_cli.data.sources import DataSource, Split
from craft_cli.data.tokens import Encoded, encode
from craft_cli.errors import ConfigError
from craft_cli.methods.adapter_folder import read_record
from craft_cli.methods.attach import ModelAdapter, load
from craft_cli.models.checkpoint import Checkpoint
from craft_cli.models.hub import resolve
from craft_cli.models.loading import load_model, load_tokenizer
from craft_cli.tasks.base import MULTI, NUMBER, OWN, OWN_METRICS, REGRESSION, SINGLE, Task
from craft_cli.tasks.glue import task_named
from craft_cli.tasks.inference import in_order, predict_batches
from craft_cli.tasks.sequence_classification import align_labels
from craft_cli.training.run import find_adapter, find_run


@dataclass
class Subject:
    """A trained model, ready to be asked.

    Attributes:
        name: run, adapter or checkpoint, as given.
        model: on its device.
        tokenizer: the base's.
        device: where it computes.
        labels: names of its outputs, in the order of its head.
        record: what it was trained on, where that is known (runs and adapters).
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    labels: tuple[str, ...]
    record: Mapping[str, Any]

    @property
    def problem_type(self) -> str:
        """Of the record, of the configuration, or what one output and several usually mean."""
        told = self.record.get("problem_type") or self.model.config.problem_type
        return told or (REGRESSION if len(self.labels) == 1 else SINGLE)

    @property
    def threshold(self) -> float:
        """Above it a label applies, where several can."""
        return float(self.record.get("threshold", 0.5))

    def task(self) -> Task:
        """What it was trained for; of a checkpoint, what its head looks like."""
        if self.record.get("task", OWN.name) != OWN.name:
            return task_named(self.record["task"])
        problem, data = self.problem_type, self.record.get("data", {})
        return Task(
            OWN.name,
            tuple(data.get("text_columns") or ()),
            NUMBER if problem == REGRESSION else tuple(self.record.get("labels") or self.labels),
            OWN_METRICS[problem],
            problem,
            data.get("label_column") or "label",
            (data.get("label_separator") or ",") if problem == MULTI else None,
        )

    def source(self, given: DataSource) -> DataSource:
        """The data of its training, overridden by what is given."""
        trained = self.record.get("data")
        known = DataSource.of(trained) if trained else DataSource()
        if given.task and given.task != known.task:
            known = DataSource()
        if given.data_dir or given.validation_file or given.dataset_name:
            known = replace(
                known, data_dir=None, train_file=None, validation_file=None, dataset_name=None, validation_share=None
            )
        source = replace(known, **{name: value for name, value in asdict(given).items() if value is not None})
        if not source.given:
            raise ConfigError(f"{self.name}: on which data? Give --task, --data-dir or --validation-file")
        return source

    def encode(self, split: Split, max_seq_length: int | None = None) -> Encoded:
        """Token ids, at the length of its training where none is given."""
        limit = max_seq_length or int(self.record.get("max_seq_length", 128))
        return encode(split, self.tokenizer, limit)

    def logits(
        self,
        encoded: Encoded,
        labels: Sequence[str],
        batch_size: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Tensor:
        """Logits (rows, labels) in the order of the rows and of these label names; each row is computed once."""
        aligned = align_labels(labels, None if self.problem_type == REGRESSION else self.model.config.id2label)
        batches = length_sorted_batches(encoded, batch_size)
        outputs = predict_batches(self.model, encoded, batches, self.tokenizer, self.device, progress)
        return in_order(outputs, batches, len(encoded))[:, [aligned.index(name) for name in labels]]


def load_subject(path: str | Path | None = None, *, use_cpu: bool = False) -> Subject:
    """A run, an adapter, a checkpoint's folder or a hub id; the latest run without.

    Raises:
        CraftError: it is missing, damaged, or has no trained head.
    """
    found = find_run(None if path is None else str(path))
    adapter_path = find_adapter(found)
    record: Mapping[str, Any] = {}
    if adapter_path:
        model, adapter, checkpoint = load_adapted(adapter_path)
        record = adapter.training_record
    else:
        checkpoint = resolve(str(path or found))
        model, fresh = load_model(checkpoint, "AutoModelForSequenceClassification")
        if fresh:
            raise ConfigError(f"{found} has no trained head ({', '.join(fresh)} would be random): train it first")
    tokenizer = load_tokenizer(checkpoint)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
    labels = tuple(model.config.id2label[number] for number in range(model.config.num_labels))
    return Subject(str(path or found), model.to(device), tokenizer, device, labels, record)


def load_adapted(path: Path, dtype: torch.dtype | str = torch.float32) -> tuple[Any, ModelAdapter, Checkpoint]:
    """An adapter's base model with the adapter and its head on it.

    Raises:
        FileError: the adapter is missing or damaged.
        ModelError: its base cannot be found, or is another one now.
    """
    record = read_record(path)
    checkpoint = resolve(record["base_model"]["model"], record["base_model"]["revision"])
    labels = {int(number): label for number, label in record["model"]["id2label"].items()}
    options = {"num_labels": len(labels), "id2label": labels, "label2id": {name: n for n, name in labels.items()}}
    model, _ = load_model(checkpoint, record["model"]["architecture"], options, dtype)
    model.config.pad_token_id = record["model"]["pad_token_id"]
    return model, load(model, path), checkpoint
