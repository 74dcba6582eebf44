"""The splits of a task: tables read as what its rows mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from craft_cli.data.sources import (
    TEST,
    TRAIN,
    VALIDATION,
    DataSource,
    Split,
    _has_validation,
    _split_names,
    _table,
    hold_out,
)
from craft_cli.data.tables import (
    Table,
)
from craft_cli.errors import ConfigError, DataError
from craft_cli.tasks.base import OWN, SINGLE, Task
from craft_cli.tasks.glue import task_named
from craft_cli.tasks.labels import label_numbers, settle_task

_TEXTS = (
    ("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"),
)  # fmt: skip


_LABELS = ("label", "labels", "score", "target", "class")


@dataclass(frozen=True)
class Loaded:
    """A task and the splits asked for, by name, in the order of the request; notes for the user."""

    task: Task
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)

    def of(self, part: str) -> dict[str, Split]:
        """The splits of a part: of `validation` the task's several ones."""
        return {name: split for name, split in self.splits.items() if name.startswith(part)}


def load_splits(source: DataSource, parts: Sequence[str], known: Task = OWN) -> Loaded:
    """The task and its splits.

    Args:
        source: where from.
        parts: of `train`, `validation`, `test`; labels of the user's own data are collected from the first one.
        known: what is known of the user's own task already (labels, kind of problem).

    Raises:
        ConfigError: an unknown task, or one that cannot be trained on.
        DataError: a file, column, row or label that cannot be used.
    """
    task = task_named(source.task) if source.task else known
    if TRAIN in parts and task.train is None:
        raise ConfigError(
            f"--task {task.name} is for evaluation only: train on mnli, then `craft eval --task {task.name}`"
        )
    task = replace(
        task,
        text_columns=source.text_columns or task.text_columns,
        label_separator=source.label_separator or task.label_separator,
        problem_type=source.problem_type or task.problem_type,
    )
    held_out = VALIDATION in parts and task.name == OWN.name and not _has_validation(source)
    if source.validation_share and not held_out and VALIDATION in parts:
        raise ConfigError("--validation-share: there is validation data, so nothing is held out; give one or the other")
    tables: dict[str, Table] = {}
    for part in parts:
        for name in [TRAIN] if held_out and part != TEST else _split_names(source, task, part):
            if name not in tables:
                tables[name] = _table(source, task, name)

    splits: dict[str, Split] = {}
    for name, table in tables.items():
        task = _with_columns(task, source, table, labelled=not name.startswith(TEST))
        texts = list(zip(*(_texts(table, column) for column in task.text_columns), strict=True))
        labels = None
        if task.label_column in table.columns:
            values = table.column(task.label_column)
            task = settle_task(task, values, table.place, table.origin)
            labels = label_numbers(values, task, table.place)
        splits[name] = Split(texts, labels, table.origin)
    notes = []
    if held_out:
        share, seed = source.validation_share or 0.1, source.seed or 0
        kept, apart = hold_out(splits[TRAIN], share, seed, stratify=task.problem_type == SINGLE)
        note = (
            f"{len(apart)} of {len(splits[TRAIN])} rows of {splits[TRAIN].origin} held out to evaluate on (seed {seed})"
        )
        notes = [note] if TRAIN in parts else []
        whole = splits.pop(TRAIN)
        if TRAIN in parts:
            splits[TRAIN] = whole.select(kept)
        splits[VALIDATION] = whole.select(apart, f", {len(apart)} rows held out")
    return Loaded(task, splits, notes)


def guess_texts(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of one text or a pair by their usual names; none if there are none."""
    return next((guess for guess in _TEXTS if set(guess) <= set(columns)), ())


def _with_columns(task: Task, source: DataSource, table: Table, *, labelled: bool) -> Task:
    """The task with its columns: as given, as the task has them, or as they are usually called."""
    texts = task.text_columns or guess_texts(table.columns)
    if not texts:
        raise DataError(
            f"{table.origin}: which columns hold the text? It has {', '.join(table.columns)} (choose with --text-columns)"
        )
    label = source.label_column or task.label_column
    if not source.label_column and task.name == OWN.name and label not in table.columns:
        label = next((guess for guess in _LABELS if guess in table.columns), label)
    wanted_columns = dict.fromkeys(texts, "--text-columns") | ({label: "--label-column"} if labelled else {})
    for column, wanted in wanted_columns.items():
        if column not in table.columns:
            raise DataError(
                f"{table.origin} has no column '{column}'; it has {', '.join(table.columns)} (choose with {wanted})"
            )
    return replace(task, text_columns=texts, label_column=label)


def _texts(table: Table, column: str) -> list[str]:
    return [text_of(value, column, partial(table.place, row)) for row, value in enumerate(table.column(column))]


def text_of(value: Any, column: str, place: Callable[[], str]) -> str:
    """The text in a cell.

    Raises:
        DataError: there is none (`place` tells where).
    """
    if value is None or isinstance(value, (list, dict)):
        raise DataError(f"{place()}: column '{column}' {'has no text' if value is None else 'is a list, not a text,'}")
    return str(value)
