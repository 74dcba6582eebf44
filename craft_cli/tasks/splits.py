"""Load the splits of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from craft_cli.data.holdout import SALT, divided, hold_out
from craft_cli.data.sources import (
    TEST,
    TRAIN,
    VALIDATION,
    DataSource,
    Home,
    Split,
    has_validation,
    read_split,
    split_names,
)
from craft_cli.errors import ConfigError
from craft_cli.tasks import kind_of_table
from craft_cli.tasks.base import OWN, Task
from craft_cli.tasks.glue import task_named


@dataclass(frozen=True)
class Loaded:
    """A task and the requested splits by name, in the order of the request, with notes for the user.

    Attributes:
        read: number of rows and checksum of every table, by name, before rows were held out.
        held_out: the held-out marks, see `data.holdout`; empty if no rows were held out.
    """

    task: Task
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)
    read: dict[str, dict[str, Any]] = field(default_factory=dict)
    held_out: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The record of the training rows, by which an evaluation recognizes them."""
        return {"rows": self.read, "held_out": dict(self.held_out)}


def load_splits(source: DataSource, parts: Sequence[str], known: Task | None = None) -> Loaded:
    """Load a task and its splits.

    Args:
        source: the data source.
        parts: any of `train`, `validation`, `test`; labels of the user's own data are collected from the first one.
        known: an existing task on the user's own data (labels, task type). Default: detected in the data.

    Raises:
        ConfigError: the task is unknown, or cannot be trained on.
        DataError: a file, column, row or label is invalid.
    """
    task = task_named(source.task) if source.task else known
    if known and task and task.name == known.name:
        task = known
    home = task.home if task else Home()
    if task and TRAIN in parts and home.train is None:
        raise ConfigError(
            f"--task {task.name} is for evaluation only; train on mnli, then run `craft eval --task {task.name}`"
        )
    if task and source.task_type not in (None, task.kind):
        raise ConfigError(f"--task-type: {task.name} is {task.kind}, not {source.task_type}; remove it")
    own = task is None or task.name == OWN
    held_out = VALIDATION in parts and own and not has_validation(source)
    if source.validation_share and not held_out and VALIDATION in parts:
        raise ConfigError("--validation-share cannot be combined with validation data; remove one")
    names = [
        name for part in parts for name in ([TRAIN] if held_out and part != TEST else split_names(source, home, part))
    ]
    tables = {name: read_split(source, home, name) for name in dict.fromkeys(names)}

    if task is None:
        task = kind_of_table(next(iter(tables.values())), source).own()
    task = task.chosen(source)
    splits: dict[str, Split] = {}
    for name, table in tables.items():
        task, split = task.read(table, labelled=not name.startswith(TEST))
        splits[name] = replace(split, place=table.place)
    read = {name: {"count": len(split), "sha256": split.checksum()} for name, split in splits.items()}
    limits: Mapping[str, str] = {}
    notes = [splits[TRAIN].note] if TRAIN in parts and splits[TRAIN].note else []
    if held_out:
        share = source.validation_share or 0.1
        limits = source.held_out or hold_out(splits[TRAIN], share, source.seed or 0, stratify=task.stratified)
        kept, apart = divided(splits[TRAIN], limits)
        seed = limits.get(SALT, "").partition(".")[0]  # may come from another run
        note = (
            f"{len(apart)} of {len(splits[TRAIN])} rows of {splits[TRAIN].origin} held out for validation (seed {seed})"
        )
        notes += [note] if TRAIN in parts else []
        whole = splits.pop(TRAIN)
        if TRAIN in parts:
            splits[TRAIN] = whole.select(kept)
        splits[VALIDATION] = whole.select(apart, f", {len(apart)} rows held out")
    return Loaded(task, splits, notes, read, limits)
