"""`--torch-compile`: compile every adapted block of the model in place, as one graph."""

from __future__ import annotations

import warnings
from typing import Any

from craft_cli.errors import ConfigError, CraftError
from craft_cli.methods.model_adapter import ModelAdapter
from craft_cli.models.views import layer_of

_GRAPHS = 64
"""Graphs per code object: first and other blocks, training and evaluation, padded and unpadded batches need one each, and
dynamo's default limit is 8."""


def compile_blocks(adapter: ModelAdapter, backend: str = "inductor") -> list[str]:
    """Compile the blocks with adapted layers, without graph breaks and with dynamic shapes.

    Names, hooks and DDP are unaffected. Compilation happens when a block first runs; `refusal` explains its errors.

    Args:
        adapter: an attached adapter; adapters attached later have no effect on compiled code.
        backend: backend of torch.compile.

    Returns:
        Paths of the blocks, relative to the base model.

    Raises:
        ConfigError: there is no C++ compiler for the CPU.
    """
    import torch

    base = adapter.model.base_model
    if backend == "inductor" and next(base.parameters()).device.type == "cpu":
        _check_compiler()
    warnings.filterwarnings(
        "ignore", message="The .grad attribute of a Tensor that is not a leaf"
    )  # harmless: the chains are not leaves
    torch._dynamo.reset()  # graphs are cached by code, so those of other models would count
    torch._dynamo.config.cache_size_limit = max(_GRAPHS, torch._dynamo.config.cache_size_limit)
    paths = list(dict.fromkeys(map(layer_of, adapter.modules_adapted())))
    for path in paths:
        block = base.get_submodule(path)
        block.compile(fullgraph=True, dynamic=True, backend=backend)
        adapter.feed(block, path)
    return paths


def refusal(error: Exception) -> CraftError | None:
    """The error for the user if the compiler raised `error`; None otherwise."""
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CraftError(
        f"--torch-compile: this model's layers cannot be compiled as one graph: {lines[0]}; train without it"
    )


def _check_compiler() -> None:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:  # torch internals moved; the first update will report a problem
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError("--torch-compile on the CPU requires a C++ compiler (g++, or the one in CXX)") from error


def freeze_cache(model: Any) -> None:
    """Turn off the key-value cache in training: it is unused, and its layer indices break compiled code."""
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
