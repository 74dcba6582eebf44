"""FSDP: the frozen base is sharded over the processes; what is trained stays whole on each of them.

Accelerate's configuration says whether (`distributed_type: FSDP`) and how; torch's `fully_shard` is called here, since
Accelerate shards on accelerators only, and not every base (BERT's embeddings it would shard twice).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    disable_fsdp_ram_efficient_loading,
)
from torch import Tensor, distributed, nn

from craft_cli.errors import ConfigError, CraftError
from craft_cli.methods.model_adapter import ModelAdapter


def fsdp_asked() -> bool:
    """Whether several processes have joined and Accelerate's configuration asks for FSDP.

    To be asked before the model is loaded: every process must load the real weights, or no fingerprint would match.

    Raises:
        ConfigError: it asks for the first version of FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP version 1 cannot shard a part of a module: set fsdp_version: 2")
    disable_fsdp_ram_efficient_loading()
    return distributed.is_initialized()


def shard(model: Any, accelerator: Accelerator) -> Any:
    """Shard all parameters that are not trained, in place: a unit for each transformer block, one for the rest.

    Raises:
        ConfigError: torch is too old, or the configuration asks for what this does not do.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        raise ConfigError(f"FSDP needs torch 2.7 or later, this is {torch.__version__}")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.activation_checkpointing:
        raise ConfigError("fsdp_activation_checkpointing is not supported: use --gradient-checkpointing")
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in whole:  # `fully_shard` moves only what it manages
        parameter.data = parameter.data.to(accelerator.device)
    options: dict[str, Any] = {
        "mesh": distributed.device_mesh.init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
        "ignored_params": whole,
    }
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(f"{ModelAdapter.ATTRIBUTE}."):
            for block in module:
                fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **options)
    return fully_shard(model, **options)


def held_here(model: nn.Module) -> str:
    """How much of a sharded model this process holds, for the header of a run."""
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return f", FSDP: {here:,} of {sum(p.numel() for p in parameters):,} numbers on each"


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """The mean over processes of the gradients of whole parameters, in one message."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)


T = TypeVar("T")


def from_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What the main process makes, on every process; the error it meets, too."""
    made: list[Any] = [None]
    unexpected: Exception | None = None
    if accelerator.is_main_process:
        try:
            made = [make()]
        except CraftError as error:
            made = [error]
        except Exception as error:  # the others must not wait for it
            unexpected, made = error, [CraftError(f"the main process failed: {error}")]
    if accelerator.num_processes > 1:
        broadcast_object_list(made)
    if unexpected:
        raise unexpected
    if isinstance(made[0], CraftError):
        raise made[0]
    return made[0]
