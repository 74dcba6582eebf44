"""FSDP: shard the frozen base over the processes, and keep trained parameters whole on each of them.

`--fsdp` or Accelerate's configuration (`distributed_type: FSDP`) turns it on. torch's `fully_shard` is called here directly, because
Accelerate shards only on accelerators and not every base (it would shard BERT's embeddings twice).
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

from craft_cli.config import RunConfig
from craft_cli.errors import ConfigError, CraftError
from craft_cli.methods.model_adapter import ModelAdapter


def fsdp_asked(config: RunConfig) -> bool:
    """Whether there are several processes and the settings or Accelerate's configuration request FSDP.

    Must be called before the model is loaded, because every process has to load the real weights for the fingerprint.

    Raises:
        ConfigError: FSDP version 1 is requested.
    """
    in_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if in_accelerate:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("FSDP version 1 cannot shard part of a module; set fsdp_version: 2")
        disable_fsdp_ram_efficient_loading()
    return (config.fsdp or in_accelerate) and distributed.is_initialized()


def shard(model: Any, accelerator: Accelerator) -> Any:
    """Shard all frozen parameters in place: one unit per transformer block, and one for the rest.

    Raises:
        ConfigError: torch is too old, or the configuration has an unsupported option.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        raise ConfigError(f"FSDP requires torch 2.7 or later, but {torch.__version__} is installed")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin(fsdp_version=2)
    if plugin.activation_checkpointing:
        raise ConfigError("fsdp_activation_checkpointing is not supported: use --gradient-checkpointing")
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in whole:  # `fully_shard` moves only the parameters it manages
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
    """The share of a sharded model on this process, for the header of a run."""
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return f", FSDP: {here:,} of {sum(p.numel() for p in parameters):,} parameters on each"


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average the gradients of whole parameters over all processes, in one message."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)


T = TypeVar("T")


def from_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """Run `make` on the main process and return its result, or raise its error, on every process."""
    made: list[Any] = [None]
    unexpected: Exception | None = None
    if accelerator.is_main_process:
        try:
            made = [make()]
        except CraftError as error:
            made = [error]
        except Exception as error:  # the other processes must not wait forever
            unexpected, made = error, [CraftError(f"the main process failed: {error}")]
    if accelerator.num_processes > 1:
        broadcast_object_list(made)
    if unexpected:
        raise unexpected
    if isinstance(made[0], CraftError):
        raise made[0]
    return made[0]
