"""Kinds of work: what a row means, its loss, its metrics, its answers. A kind is one module with one class, named here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from craft_cli.errors import ConfigError

if TYPE_CHECKING:
    from craft_cli.data.sources import DataSource
    from craft_cli.data.tables import Table
    from craft_cli.tasks.base import Task

KINDS = {
    "token-classification": "token_classification.TokenClassification",
    "causal-lm": "causal_lm.CausalLM",
    "sequence-classification": "sequence_classification.SequenceClassification",
}
"""By the words after `--task-type`; the last one where nothing speaks for another."""


def kind_named(name: str) -> type[Task]:
    """The class of a kind of work."""
    module, _, class_name = KINDS[name].partition(".")
    found: type[Task] = getattr(import_module(f"craft_cli.tasks.{module}"), class_name)
    return found


def kind_of_table(table: Table, source: DataSource) -> type[Task]:
    """The kind of work that the user names, or that a table of theirs looks like."""
    if source.task_type:
        return kind_named(source.task_type)
    kinds = [kind_named(name) for name in KINDS]
    return next((kind for kind in kinds if kind.recognises(table, source)), kinds[-1])


def kind_of_model(record: Mapping[str, Any], architectures: list[str] | None, *, strict: bool = False) -> type[Task]:
    """The kind of work that an adapter was trained for, or that a checkpoint has the head of.

    Args:
        record: of an adapter's training; may be empty.
        architectures: of the model's configuration.
        strict: whether a class with the head of no kind is refused; else it is to get a head.

    Raises:
        ConfigError: it is refused.
    """
    told = str(record.get("task_type"))
    if told in KINDS:
        kind = kind_named(told)
        if strict and not any(name.endswith(_head(kind)) for name in architectures or []):
            raise ConfigError(
                f"it was trained for {told}, but as a {', '.join(architectures or [])}: it contradicts itself"
            )
        return kind
    kinds = [kind_named(name) for name in KINDS]
    names = architectures or []
    found = next((kind for kind in kinds if any(name.endswith(_head(kind)) for name in names)), None)
    if found is None and strict:
        raise ConfigError(
            f"a {', '.join(names)} has the head of none of {', '.join(KINDS)}: merge it, and use it with its own tools"
        )
    return found or kinds[-1]


def _head(kind: Any) -> str:
    return str(kind.auto_model).removeprefix("AutoModel")
