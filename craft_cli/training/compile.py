"""`--torch-compile`: every adapted block of the model compiled whole, in place."""

from __future__ import annotations

import warnings
from typing import Any

from craft_cli.errors import ConfigError, CraftError
from craft_cli.methods.model_adapter import ModelAdapter
from craft_cli.models.views import layer_of

_GRAPHS = 64
"""The first block and the others, training and evaluation, padded and unpadded batches each make a graph of the same code;
dynamo stops at 8."""


def compile_blocks(adapter: ModelAdapter, backend: str = "inductor") -> list[str]:
    """Compile the blocks that hold adapted layers, without graph breaks and for batches of every shape.

    Names, hooks and DDP are untouched. It happens when a block first runs, where `refusal` tells what cannot be compiled.

    Args:
        adapter: attached already; what is attached later is not seen by compiled code.
        backend: of torch.compile.

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
    )  # the chains; all is well
    torch._dynamo.reset()  # its graphs belong to the code of the blocks, whatever model they were made for
    torch._dynamo.config.cache_size_limit = max(_GRAPHS, torch._dynamo.config.cache_size_limit)
    paths = list(dict.fromkeys(map(layer_of, adapter.modules_adapted())))
    for path in paths:
        block = base.get_submodule(path)
        block.compile(fullgraph=True, dynamic=True, backend=backend)
        adapter.feed(block, path)
    return paths


def refusal(error: Exception) -> CraftError | None:
    """What to tell of an error that the compiler raised; None for any other."""
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CraftError(f"--torch-compile: this model's layers do not compile whole: {lines[0]}; train without it")


def _check_compiler() -> None:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:  # they are torch's own business; the first update then tells
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError("--torch-compile needs a C++ compiler on the CPU (g++, or what CXX names)") from error


def freeze_cache(model: Any) -> None:
    """No cache of keys and values in training: nobody reads it, and it numbers the layers, which compiled code trips over."""
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
