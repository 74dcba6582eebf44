"""`--load-in-4bit`, `--load-in-8bit`: the frozen base by bitsandbytes; adapter and head stay as they are.

The factors are those of the full-precision checkpoint, whose weights are checked against them where it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from craft_cli.errors import ConfigError, ModelError

TOLERANCE = {"4bit": 0.25, "8bit": 0.05}
"""How far the core of a quantised weight may be from the checkpoint's, relative; measured 0.04 and 0.003. Another model's
is about 1.4 away."""


def check_available() -> None:
    """Refuse where a quantised base cannot be trained over.

    Raises:
        ConfigError: no CUDA GPU, or bitsandbytes is missing.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--load-in-4bit and --load-in-8bit need a CUDA GPU; without, train over the full base")
    if find_spec("bitsandbytes") is None:
        raise ConfigError("--load-in-4bit and --load-in-8bit need bitsandbytes: `pip install bitsandbytes`")


def quantization_config(bits: int, compute: torch.dtype, whole: Sequence[str]) -> Any:
    """For `from_pretrained`.

    Args:
        bits: 4 (nf4 with double quantisation) or 8.
        compute: dtype in which a 4-bit layer multiplies.
        whole: full paths of modules that are not quantised: all that hold trained parameters.
    """
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(whole))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=list(whole),
    )


def after_loading(model: Any) -> None:
    """Keep the CPU kernels of bitsandbytes from repacking weights in evaluation: training could not go on after it.

    Raises:
        ModelError: a layer is not of a kind that adapters know.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if name.endswith("c_attn"):  # its weight is stored the other way round, and quantised it is not
            raise ModelError("a quantised base of the family gpt2 is not supported; train over the full base")


def kind_of(module: nn.Module) -> str | None:
    """`4bit`, `8bit`, or None for a module in full precision."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(module.weight).__name__)


def dense_weight(module: nn.Module) -> Tensor:
    """The module's weight in floating point."""
    weight: Any = module.get_parameter("weight")
    kind = kind_of(module)
    if kind == "4bit":
        from bitsandbytes.functional import dequantize_4bit

        dense: Tensor = dequantize_4bit(weight.data, weight.quant_state).detach()
        return dense
    if kind == "8bit":
        state: Any = module.state
        scale = state.SCB if getattr(weight, "SCB", None) is None else weight.SCB  # a forward moves it
        dense = weight.data.float() * (scale / 127.0).unsqueeze(1)
        return dense
    return weight.detach()
