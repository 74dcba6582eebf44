"""`--load-in-4bit`, `--load-in-8bit`: quantize the frozen base with bitsandbytes, but not adapter and head.

The factors come from the full-precision checkpoint, which is verified when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from craft_cli.errors import ConfigError, ModelError

TOLERANCE = {"4bit": 0.25, "8bit": 0.05}
"""Maximum relative distance between the cores of quantized and original weights. Measured: 0.04 (4 bits) and 0.003 (8 bits);
about 1.4 for another model."""


def check_available() -> None:
    """Check that a quantized base can be used here.

    Raises:
        ConfigError: there is no CUDA GPU, or bitsandbytes is missing.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "--load-in-4bit and --load-in-8bit require a CUDA GPU; remove them to train on the full-precision base"
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError("--load-in-4bit and --load-in-8bit require bitsandbytes: `pip install bitsandbytes`")


def quantization_config(bits: int, compute: torch.dtype, whole: Sequence[str]) -> Any:
    """Quantization arguments of `from_pretrained`.

    Args:
        bits: 4 (nf4 with double quantization) or 8.
        compute: compute dtype of a 4-bit layer.
        whole: full paths of modules to skip: all with trained parameters.
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
    """Prevent the CPU kernels of bitsandbytes from repacking weights in evaluation, which would break further training.

    Raises:
        ModelError: a layer type is not supported by adapters.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if name.endswith("c_attn"):  # its weight is transposed, but its quantized form is not
            raise ModelError("a quantized base of the family gpt2 is not supported; train on the full-precision base")


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
        scale = state.SCB if getattr(weight, "SCB", None) is None else weight.SCB  # a forward moves it there
        dense = weight.data.float() * (scale / 127.0).unsqueeze(1)
        return dense
    return weight.detach()
