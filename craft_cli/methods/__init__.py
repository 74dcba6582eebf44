"""Adapter methods, and what they share: hooks, files, merging, export."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from craft_cli.errors import ConfigError, nearest

if TYPE_CHECKING:
    from craft_cli.methods.base import Method

METHODS = {
    "craft": "craft_cli.methods.craft.method",
    "lora": "craft_cli.methods.lora",
    "pissa": "craft_cli.methods.pissa",
    "lora-xs": "craft_cli.methods.lora_xs",
    "lotr": "craft_cli.methods.lotr",
    "superlora": "craft_cli.methods.superlora",
}
"""The module of every method, by its `--method` name. Each module has one object `METHOD`."""


def method_named(name: Any) -> Method:
    """The method with this name.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in METHODS:
        raise ConfigError(f"--method: unknown method '{name}'{nearest(str(name), METHODS)}")
    method: Method = import_module(METHODS[name]).METHOD
    return method
