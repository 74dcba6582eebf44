"""Task types: rows, loss, metrics and answers. Each task type is a class in its own module, registered here."""

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
"""Task classes by the value of `--task-type`. The last one is the default."""


def kind_named(name: str) -> type[Task]:
    """The class of a task type."""
    module, _, class_name = KINDS[name].partition(".")
    kind: type[Task] = getattr(import_module(f"craft_cli.tasks.{module}"), class_name)
    return kind


def kind_of_table(table: Table, source: DataSource) -> type[Task]:
    """The task type that the user gave, or the one that matches the table."""
    if source.task_type:
        return kind_named(source.task_type)
    kinds = [kind_named(name) for name in KINDS]
    return next((kind for kind in kinds if kind.recognises(table, source)), kinds[-1])


def kind_of_model(record: Mapping[str, Any], architectures: list[str] | None, *, strict: bool = False) -> type[Task]:
    """The task type that an adapter was trained for, or that matches the head of a base checkpoint.

    Args:
        record: the adapter's training record; may be empty.
        architectures: `architectures` of the model's configuration.
        strict: whether to refuse a model class without a supported head, instead of adding one.

    Raises:
        ConfigError: the model's head is not supported, or contradicts the record.
    """
    task_type = str(record.get("task_type"))
    if task_type in KINDS:
        kind = kind_named(task_type)
        if strict and not any(name.endswith(_heads(kind)) for name in architectures or []):
            raise ConfigError(
                f"the adapter is damaged: its task type is {task_type}, but its model class is {', '.join(architectures or [])}"
            )
        return kind
    kinds = [kind_named(name) for name in KINDS]
    names = architectures or []
    matching = next((kind for kind in kinds if any(name.endswith(_heads(kind)) for name in names)), None)
    if matching is None and strict:
        raise ConfigError(
            f"the head of a {', '.join(names)} fits none of the task types {', '.join(KINDS)}; merge it and use it with its own tools"
        )
    return matching or kinds[-1]


def _heads(kind: Any) -> tuple[str, ...]:
    """How the names of the model classes of a task type end: GPT-2's language model is a GPT2LMHeadModel."""
    head = str(kind.auto_model).removeprefix("AutoModel")
    return (head, "LMHeadModel") if head == "ForCausalLM" else (head,)
