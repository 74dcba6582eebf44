"""What a run needs before its loop: rows, factors, the adapted model, the recipe that repeats it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from craft_cli.attached import ModelAdapter, attach
from craft_cli.checkpoints import Checkpoint, resolve
from craft_cli.config import RunConfig
from craft_cli.data import DataSource, Encoded, encode, load_splits
from craft_cli.decomposition import Decomposition, decompose_checkpoint
from craft_cli.errors import CraftError
from craft_cli.evaluation import measure
from craft_cli.models import head_of, load_classifier, load_tokenizer
from craft_cli.tasks import Task, align_labels


@dataclass
class Prepared:
    """All that is needed before a model is built."""

    checkpoint: Checkpoint
    decomposition: Decomposition
    task: Task
    labels: tuple[str, ...]
    tokenizer: Any
    train: Encoded
    validation: Encoded
    notes: list[str] = field(default_factory=list)


def prepare(config: RunConfig, progress: Callable[[str, int, int], None]) -> Prepared:
    """Data, checkpoint and factors of a run; the same on every process.

    Args:
        config: of the run.
        progress: called with (what, done, total).
    """
    source = DataSource.of(config)
    progress("loading data", 0, 1)
    task, (train_split, validation_split) = load_splits(source, ["train", "validation"])
    progress("loading data", 1, 1)
    checkpoint = resolve(config.model, config.revision)
    decomposition = decompose_checkpoint(
        checkpoint,
        config.targets,
        config.ranks,
        cache_dir=config.cache_dir,
        progress=lambda target, done, total: progress(f"decomposing {target}", done, total),
    )
    tokenizer = load_tokenizer(checkpoint)
    encoded = []
    for split, rows in ((train_split, config.max_train_samples), (validation_split, config.max_eval_samples)):
        encoded.append(
            encode(
                split.first(rows),
                tokenizer,
                config.max_seq_length,
                lambda done, total: progress("tokenising", done, total),
            )
        )
    return Prepared(
        checkpoint, decomposition, task, task.labels, tokenizer, encoded[0], encoded[1], list(decomposition.notes)
    )


def build(config: RunConfig, prepared: Prepared) -> tuple[Any, ModelAdapter]:
    """The adapted model; the labels are put in the order of the checkpoint's head if it names the same ones."""
    named = prepared.checkpoint.config()
    same = named.num_labels == len(prepared.labels)
    if same:
        with contextlib.suppress(CraftError):  # other names: the head is trained for ours
            prepared.labels = align_labels(prepared.labels, named.id2label)
    model, fresh = load_classifier(prepared.checkpoint, prepared.labels)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = prepared.tokenizer.pad_token_id
    model.config.problem_type = "single_label_classification"
    number = {name: position for position, name in enumerate(prepared.labels)}
    for encoded in (prepared.train, prepared.validation):
        encoded.labels[:] = [number[prepared.task.labels[label]] for label in encoded.labels]
    return model, attach(
        model, prepared.decomposition.factors, init_noise=config.init_noise, head=head_of(model, fresh)
    )


def resolved_recipe(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """The configuration that repeats this run from any folder."""
    recipe = config.recipe()
    source = DataSource.of(config).resolved()
    recipe |= {name: path for name, path in asdict(source).items() if name.endswith(("_dir", "_file")) and path}
    if source.task is None:
        recipe["text_columns"] = ",".join(prepared.task.text_columns)
        recipe["label_column"] = prepared.task.label_column
    if Path(config.model).expanduser().is_dir():
        recipe["model"] = str(Path(config.model).expanduser().resolve())
    elif prepared.checkpoint.revision:
        recipe["revision"] = prepared.checkpoint.revision
    return recipe | {"ranks": str(config.ranks)}


def measure_by_name(logits: torch.Tensor, prepared: Prepared) -> dict[str, float]:
    """The task's metrics in the task's own label numbers, whatever order the head has."""
    position = [prepared.labels.index(name) for name in prepared.task.labels]
    gold = [prepared.task.labels.index(prepared.labels[label]) for label in prepared.validation.labels]
    return measure(logits[:, position], gold, prepared.task.metrics)
