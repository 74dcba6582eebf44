"""Preparation of a run before its loop: rows, factors, the adapted model, and the recipe that reproduces it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from craft_cli.config import RunConfig
from craft_cli.data.batches import padding, plan_epoch
from craft_cli.data.packing import packed
from craft_cli.data.sources import TRAIN, VALIDATION, DataSource
from craft_cli.data.tokens import Encoded, Unseen, separator
from craft_cli.errors import DataError, ModelError
from craft_cli.files import cache_folder
from craft_cli.methods import method_named
from craft_cli.methods.attach import attach_prepared
from craft_cli.methods.base import Method
from craft_cli.methods.frozen import Frozen
from craft_cli.methods.model_adapter import ModelAdapter
from craft_cli.models.checkpoint import Checkpoint
from craft_cli.models.hub import resolve
from craft_cli.models.identity import Base, base_of
from craft_cli.models.loading import (
    head_of,
    load_model,
    load_quantised,
    load_tokenizer,
    recompute_activations,
    stored_in,
)
from craft_cli.models.stacks import Weights, read_weights
from craft_cli.models.tables import agree_on_padding, tables_in
from craft_cli.tasks.base import OWN, Task
from craft_cli.tasks.metrics import renamed
from craft_cli.tasks.splits import load_splits
from craft_cli.training.compile import compile_blocks, freeze_cache


@dataclass(frozen=True)
class Measured:
    """The result of an evaluation.

    Attributes:
        task: the task, with values chosen on the validation rows.
        metrics: metrics of all validation splits, by name.
        scores: scores of the first split, divided by the temperature.
        gold: gold of the first split.
        temperature: temperature that the scores were divided by.
        samples: generated answers with their prompts, see `generation.judged`.
    """

    task: Task
    metrics: dict[str, float]
    scores: Sequence[Tensor]
    gold: Sequence[Any]
    temperature: float = 1.0
    samples: Sequence[Mapping[str, Any]] = ()

    def tables(self) -> dict[str, Any]:
        """See `Task.tables`."""
        return self.task.tables(self.scores, self.gold)


@dataclass
class Prepared:
    """Everything needed before a model is built.

    Attributes:
        config: settings of the run, with the defaults of its task type.
        checkpoint: the base checkpoint.
        base: identity of the base.
        method: the adapter method.
        frozen: what the method keeps of the base's weights.
        task: the task with its labels, for the trained head.
        tokenizer: tokenizer of the base.
        train: training rows.
        validation: validation rows, by split.
        notes: notes for the user.
        rows: record of the rows, see `Loaded.record`.
        asked: prompt tokens of the first validation rows, to generate answers to at each evaluation.
    """

    config: RunConfig
    checkpoint: Checkpoint
    base: Base
    method: Method
    frozen: Frozen
    task: Task
    tokenizer: Any
    train: Encoded
    validation: dict[str, Encoded]
    notes: list[str]
    rows: Mapping[str, Any] = field(default_factory=dict)
    asked: Sequence[Sequence[int]] = ()

    def measure(self, scores: Mapping[str, Sequence[Tensor]], *, calibrate: bool = False) -> Measured:
        """Compute the metrics of all validation splits.

        Args:
            scores: scores of every split's rows.
            calibrate: whether to divide all scores by one temperature, fitted on the first split.
        """
        first = next(iter(self.validation))
        gold = self.validation[first].labels or []
        temperature = self.task.temperature(scores[first], gold) if calibrate else 1.0
        cooled = {name: [row / temperature for row in rows] if calibrate else rows for name, rows in scores.items()}
        task = self.task.settled(cooled[first], gold)
        metrics: dict[str, float] = {}
        for name, encoded in self.validation.items():
            metrics |= renamed(task.measure(cooled[name], encoded.labels or []), name, self.validation)
        return Measured(task, metrics, cooled[first], gold, temperature)

    @property
    def train_batch(self) -> int:
        """Training batch size per process."""
        return int(self.config.per_device_train_batch_size or 1)

    @property
    def eval_batch(self) -> int:
        """Evaluation batch size per process."""
        return int(self.config.per_device_eval_batch_size or 1)

    @property
    def eval_examples(self) -> int:
        """Number of validation rows."""
        return sum(map(len, self.validation.values()))


def within_budget(config: RunConfig, progress: Callable[[str, int, int], None]) -> RunConfig:
    """Choose the rank within the budget, if there is one.

    Raises:
        CraftError: the model cannot be read, or rank 1 already exceeds the budget.
    """
    if config.budget is None:
        return config
    method = method_named(config.method)
    weights = read_weights(
        resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code), config.targets
    )
    return config.completed(method.within(weights, config.method_options, int(config.budget), progress))


def prepare(
    config: RunConfig,
    progress: Callable[[str, int, int], None],
    frozen: Frozen | None = None,
    former: Base | None = None,
    held_out: Mapping[str, str] | None = None,
) -> Prepared:
    """Prepare data, base checkpoint and frozen tensors; the same on every process.

    Args:
        config: settings of the run.
        progress: called with (what, done, total).
        frozen: frozen tensors of a previous run. Default: prepared, or read from the cache.
        former: base of the previous run.
        held_out: held-out marks of a previous run, see `data.holdout`. Default: chosen anew.
    """
    progress("loading data", 0, 1)
    loaded = load_splits(replace(DataSource.of(config), held_out=held_out), [TRAIN, VALIDATION])
    config = config.settled(loaded.task.defaults)
    assert config.max_seq_length is not None
    rows = {
        name: split.first(config.max_train_samples, by_label=loaded.task.stratified)
        if name == TRAIN
        else split.first(config.max_eval_samples)
        for name, split in loaded.splits.items()
    }
    task = loaded.task.for_training(config, rows[TRAIN].labels or [])  # raises its errors before the expensive steps
    progress("loading data", 1, 1)
    checkpoint = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    method = method_named(config.method)
    notes = list(loaded.notes)
    weights = read_weights(checkpoint, config.targets if frozen is None else frozen.targets)
    if frozen is None:
        frozen, said = method.prepare(weights, config.method_options, config.cache_dir, progress)
        notes = [*said, *notes]
    else:
        frozen = _on(weights, frozen, allow_other=config.allow_other_base)
    progress("reading the base", 0, 1)
    base = base_of(checkpoint, task.auto_model, config.cache_dir)
    if former and not config.allow_other_base:
        former.check(base, "--resume: the run" if config.resume else f"--init-from: {config.init_from}", training=True)
    progress("reading the base", 1, 1)
    task = task.on_head(checkpoint.config(), strict=False)
    tables = tables_in(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    if loaded.task.name == OWN or config.dry_run:
        notes += loaded.task.notes(rows)
    encoded = {
        name: task.encode(
            split,
            tokenizer,
            tables.limit(config.max_seq_length),
            lambda done, total: progress("tokenising", done, total),
            cache_folder(config.cache_dir),
        )
        for name, split in rows.items()
    }
    for name, part in encoded.items():
        tables.check(part.features, tokenizer, rows[name].place_of)
        if note := Unseen().add(part).note(rows[name].origin, config.max_seq_length):
            notes.append(note)
    if config.load_in_4bit or config.load_in_8bit:
        notes.append("the base is quantized only in training; craft eval, predict and merge use full precision")
    train = _taught(encoded.pop(TRAIN), rows[TRAIN].origin, notes)
    if config.packing:
        train = packed(train, train.limit)
    asked: list[list[int]] = []
    if config.eval_generate:
        first = next(name for name in rows if name != TRAIN)
        asked = task.prompts(rows[first].first(config.eval_generate), tokenizer)
    return Prepared(
        config, checkpoint, base, method, frozen, task, tokenizer, train, encoded, notes, loaded.record(), asked
    )


def _taught(train: Encoded, origin: str, notes: list[str]) -> Encoded:
    """Drop rows without a target token, with a note.

    Raises:
        DataError: no row has a target.
    """
    rows = [row for row, weight in enumerate(train.weights) if weight]
    if not rows:
        raise DataError(f"{origin}: no row has a target within {train.limit:,} tokens; increase --max-seq-length")
    if len(rows) == len(train):
        return train
    notes.append(
        f"{len(train) - len(rows):,} of {len(train):,} rows of {origin} have no target within {train.limit:,} tokens and are skipped"
    )
    return train.only(rows)


def _on(weights: Weights, frozen: Frozen, *, allow_other: bool) -> Frozen:
    """Reuse the frozen tensors of the same weights, even under another model name.

    Raises:
        ModelError: the weights differ and `allow_other_base` is off, or their shapes differ.
    """
    if dict(weights.fingerprints) != dict(frozen.fingerprints) and not allow_other:
        target = next(name for name, value in weights.fingerprints.items() if frozen.fingerprints[name] != value)
        raise ModelError(
            f"{weights.model} has different weights ({target}) from those the adapter was trained on; pass the original base, or "
            "--allow-other-base"
        )
    if dict(weights.shapes) != dict(frozen.shapes):
        raise ModelError(
            f"the weights of {weights.model} have different shapes from those the adapter was trained on; pass the original base"
        )
    return replace(frozen, **weights.origin())


def describe_tokens(config: RunConfig, prepared: Prepared, update_size: int) -> str:
    """Token lengths, and the padding of the first epoch, compared to that without length grouping or packing."""
    lengths, size = prepared.train.lengths, prepared.train_batch
    updates = plan_epoch(lengths, update_size, seed=config.seed, epoch=0)
    batches = [update[start : start + size] for update in updates for start in range(0, len(update), size)]
    alone = prepared.train.row_lengths
    plain = [range(start, min(start + size, len(alone))) for start in range(0, len(alone), size)]
    together = f"; {len(lengths):,} packed sequences of up to {max(lengths):,}" if config.packing else ""
    return (
        f"median {median(alone):g}, longest {max(alone):,}{together}; padding {100 * padding(lengths, batches):.1f}% "
        f"({'unpacked' if config.packing else 'unsorted'} {100 * padding(alone, plain):.1f}%)"
    )


def build(config: RunConfig, prepared: Prepared, device: torch.device) -> tuple[Any, ModelAdapter, list[str]]:
    """Build the adapted model with its task head. Also returns the names of parameters missing from the base checkpoint.

    The base is loaded in float32. A language model that is stored in the run's half precision keeps it: no part of it is
    trained, and nothing is rounded.

    Args:
        config: settings of the run.
        prepared: the preparation of the run.
        device: device for a quantized base; any other base stays on the CPU here.

    Raises:
        ModelError: the model cannot be loaded, quantized or compiled, or does not support gradient checkpointing.
    """
    name, options = prepared.task.auto_model, prepared.task.model_options()
    compute = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    dtype = torch.float32
    if (config.bf16 or config.fp16) and not prepared.task.trains_head and stored_in(prepared.checkpoint) == compute:
        dtype = compute
    if bits := 4 if config.load_in_4bit else 8 if config.load_in_8bit else None:
        model, fresh = load_quantised(prepared.checkpoint, name, options, bits, compute, device, dtype)
    else:
        model, fresh = load_model(prepared.checkpoint, name, options, dtype)
    freeze_cache(model)
    agree_on_padding(model, prepared.tokenizer)
    head = head_of(model, fresh) if prepared.task.trains_head else []
    adapter = attach_prepared(model, prepared.method, prepared.frozen, config.method_options, head, prepared.base)
    if config.gradient_checkpointing:
        recompute_activations(model)
    if config.torch_compile:
        compile_blocks(adapter)
    return model, adapter, fresh


def data_record(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """The data source with absolute paths."""
    record = asdict(DataSource.of(config).resolved()) | prepared.task.columns() | dict(prepared.rows)
    if len(prepared.task.text_columns) > 2:
        record["text_separator"] = separator(prepared.tokenizer)
    return record


def resolved_recipe(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """The configuration that reproduces this run from any folder."""
    recipe = config.recipe()
    source = DataSource.of(config).resolved()
    recipe |= {name: path for name, path in asdict(source).items() if name.endswith(("_dir", "_file")) and path}
    if source.task is None:
        recipe |= prepared.task.settings()
    if Path(config.model).expanduser().is_dir():
        recipe["model"] = str(Path(config.model).expanduser().resolve())
    elif prepared.checkpoint.revision:
        recipe["revision"] = prepared.checkpoint.revision
    if config.init_from and Path(config.init_from).expanduser().is_dir():
        recipe["init_from"] = str(Path(config.init_from).expanduser().resolve())
    return recipe
