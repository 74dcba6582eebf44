"""Use-case: evaluate a run, an adapter, or any checkpoint for sequence classification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from craft_cli.checkpoints import resolve
from craft_cli.data import DataSource, Encoded, collate, encode, load_splits
from craft_cli.errors import ConfigError, CraftError
from craft_cli.models import load_adapted, load_classifier, load_tokenizer
from craft_cli.runs import find_adapter, find_run
from craft_cli.tasks import align_labels, compute_metrics


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        subject: what was evaluated.
        data: on which rows.
        metrics: by scikit-learn's names, and `loss`.
        examples: how many rows were counted, each once.
    """

    subject: str
    data: str
    metrics: Mapping[str, float]
    examples: int


def evaluate(
    path: str | Path | None = None,
    *,
    source: DataSource | None = None,
    max_eval_samples: int | None = None,
    max_seq_length: int | None = None,
    per_device_eval_batch_size: int = 64,
    use_cpu: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluate on validation data.

    Args:
        path: a run, an adapter, a checkpoint's folder or a hub id; the latest run without.
        source: task or files; what is not given is as in training (runs and adapters know it).
        max_eval_samples: only the first rows.
        max_seq_length: tokens kept; as in training without, 128 for a checkpoint.
        per_device_eval_batch_size: rows at once.
        use_cpu: stay on the CPU.
        progress: called with (rows done, rows in all).

    Raises:
        ConfigError: a checkpoint needs a task or files.
        CraftError: the model or the data cannot be used.
    """
    found = find_run(None if path is None else str(path))
    adapter_path = find_adapter(found)
    record: dict[str, Any] = {}
    if adapter_path:
        model, adapter, checkpoint = load_adapted(adapter_path)
        record = adapter.training_record
    else:
        checkpoint = resolve(str(path or found))
        model, fresh = load_classifier(checkpoint)
        if fresh:
            raise ConfigError(f"{found} has no trained head ({', '.join(fresh)} would be random): train it first")
    source = _source(source or DataSource(), record.get("data"))
    if source == DataSource():
        raise ConfigError(f"{found}: on which data? Give --task, --data-dir or --validation-file")
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    task, (split,) = load_splits(source, ["validation"], None if source.task else names)
    labels = align_labels(task.labels, model.config.id2label)
    position = [labels.index(name) for name in task.labels]  # of each of the task's labels in the head
    split = split.first(max_eval_samples)

    tokenizer = load_tokenizer(checkpoint)
    encoded = encode(split, tokenizer, max_seq_length or record.get("max_seq_length", 128))
    device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.to(device)
    batches = length_sorted_batches(encoded, per_device_eval_batch_size)
    logits = in_order(predict(model, encoded, batches, tokenizer, device, progress), batches, len(encoded))
    metrics = measure(logits[:, position], encoded.labels, task.metrics)
    return Evaluation(str(path or found), split.origin, metrics, len(encoded))


def _source(given: DataSource, trained: Mapping[str, Any] | None) -> DataSource:
    """The data of the training, overridden by what is given."""
    known = DataSource.of(trained) if trained else DataSource()
    if given.task and given.task != known.task:
        known = DataSource()
    if given.data_dir or given.validation_file:
        known = replace(known, data_dir=None, train_file=None, validation_file=None)
    return replace(known, **{name: value for name, value in asdict(given).items() if value is not None})


def length_sorted_batches(encoded: Encoded, batch_size: int) -> list[list[int]]:
    """All rows once, rows of similar length together."""
    order = sorted(range(len(encoded)), key=lambda row: -encoded.lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def predict(
    model: Any,
    encoded: Encoded,
    batches: Sequence[Sequence[int]],
    tokenizer: Any,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """Logits (rows, labels) of every batch, float32 on the CPU."""
    was_training = model.training
    model.eval()
    outputs, done, total = [], 0, sum(len(batch) for batch in batches)
    for batch in batches:
        inputs, _ = collate(encoded, batch, tokenizer)
        outputs.append(model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.float().cpu())
        done += len(batch)
        progress(done, total)
    model.train(was_training)
    return outputs


def in_order(outputs: Sequence[Tensor], batches: Sequence[Sequence[int]], examples: int) -> Tensor:
    """Logits (examples, labels) in the order of the rows.

    Raises:
        CraftError: a row was counted twice or not at all.
    """
    rows = torch.tensor([row for batch in batches for row in batch])
    if sorted(rows.tolist()) != list(range(examples)):
        raise CraftError(f"evaluation counted {len(rows)} rows of {examples}; please report this")
    logits = torch.cat(list(outputs))
    return torch.empty_like(logits).index_copy_(0, rows, logits)


def measure(logits: Tensor, labels: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """The task's metrics, and the mean loss."""
    metrics = compute_metrics(names, labels, logits.argmax(dim=-1).tolist())
    return metrics | {"loss": float(functional.cross_entropy(logits, torch.tensor(labels)))}
