"""Export an adapter as a LoRA for llama.cpp and Ollama: one file, `adapter.gguf`, loaded on top of the base's GGUF.

Every adapted weight has two tensors, named after the base's tensor: `blk.7.attn_q.weight.lora_a` (r, d_in) and
`.lora_b` (d_out, r), with alpha = r, so that dW_l = B A. The rows of B are in the order that llama.cpp's converter
gives the base:

- llama.cpp rotates neighbouring rows of q and k (0 with 1, 2 with 3), transformers row i with row i + d/2 of a head.
  The converter reorders the rows for the architectures in `TURNED`; the others are rotated as in transformers.
- A fused weight of query, key and value is in blocks: the query of all heads, the key of all, the value of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.errors import CraftError, ModelError
from craft_cli.files import write_bytes
from craft_cli.methods.as_dense import AdaptedBase
from craft_cli.methods.as_lora import lora_pairs
from craft_cli.models.demo import DEMO_LLM, demo_gguf
from craft_cli.models.families import layer_views
from craft_cli.models.loading import is_language_model

GGUF_TENSORS = "adapter.gguf"
MODELFILE = "Modelfile"

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "olmo2": "olmo2", "smollm3": "smollm3", "stablelm": "stablelm", "cohere": "command-r",
    "granite": "granite", "phi": "phi2", "phi3": "phi3", "gpt2": "gpt2", "gpt_neox": "gptneox", "bloom": "bloom",
    "falcon": "falcon",
}  # fmt: skip
"""llama.cpp's architecture by model type, for the supported language models."""
TURNED = ("llama", "mistral", "smollm3", "granite")


def known(adapted: AdaptedBase) -> bool:
    """Whether llama.cpp supports this model."""
    return adapted.base.model.config.model_type in ARCHITECTURES and is_language_model(adapted.base.model)


def check_known(adapted: AdaptedBase) -> None:
    """Refuse an adapter that cannot be a LoRA for llama.cpp.

    Raises:
        ModelError: the model is not a language model, or llama.cpp does not support its architecture.
        CraftError: the package `gguf` is missing.
    """
    kind = adapted.base.model.config.model_type
    if not is_language_model(adapted.base.model):
        head = " and its trained head" if adapted.saved.head else ""
        raise ModelError(
            f"--format gguf is for language models: llama.cpp does not run a {type(adapted.base.model).__name__}"
            f"{head}; `craft merge` writes a checkpoint, --format peft a LoRA"
        )
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"--format gguf: llama.cpp does not support models of type '{kind}'; `craft merge` writes a checkpoint, "
            "--format peft a LoRA"
        )
    if find_spec("gguf") is None:
        raise CraftError("--format gguf needs the package gguf: pip install gguf")


def order_of(config: Any, name: str) -> Tensor | None:
    """The row in transformers' weight of every row in the GGUF, (d_out,) int64; None if the order is the same.

    Args:
        config: config of the model.
        name: name of the tensor in the GGUF, without `.weight`.
    """
    kind = name.rpartition(".")[2]
    if kind == "attn_qkv":
        views = [layers[0] for layers in layer_views(config, ("query", "key", "value")).values()]
        rows = [view.rows for view in views if view.rows is not None]
        total = sum(part.size * part.count for part in rows)
        return torch.cat([part.of(torch.arange(total), 0).flatten() for part in rows])
    if kind not in ("attn_q", "attn_k") or config.model_type not in TURNED:
        return None
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if kind == "attn_k":
        heads = config.num_key_value_heads or heads
    return torch.arange(heads * size).unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten()


class GgufWriter:
    """A LoRA for llama.cpp, written into `folder`.

    Args:
        adapted: the adapter and its base, of an architecture that llama.cpp supports.
        folder: the output folder.
        dtype: dtype of the matrices, float32 or float16.
        trim: see `lora_pairs`.
        tolerance: see `lora_pairs`.

    Attributes:
        changed: names of the changed weights.
        rank: rank of every pair.

    Raises:
        CraftError: a dense change has no low rank within the tolerance.
    """

    def __init__(self, adapted: AdaptedBase, folder: Path, dtype: torch.dtype, *, trim: bool, tolerance: float) -> None:
        self.dtype, self._base = dtype, adapted.base
        self.head: list[str] = []
        config = adapted.base.model.config
        pairs = lora_pairs(adapted, trim=trim, tolerance=tolerance)
        self.rank: int | None = next(len(a) for a, _ in pairs.values())
        self.changed = [f"{module}.weight" for module, (a, b) in pairs.items() if a.any() and b.any()]
        self._names = tensor_names(config, pairs, adapted.base.prefix)
        self._orders = {module: order_of(config, name) for module, name in self._names.items()}
        self._transposed = {
            name.removesuffix(".weight"): changes[0][0].transposed for name, changes in adapted.changes().items()
        }
        tensors = {}
        for module, (a, b) in pairs.items():
            order = self._orders[module]
            tensors[f"{self._names[module]}.weight.lora_a"] = a.to(dtype)
            tensors[f"{self._names[module]}.weight.lora_b"] = (b if order is None else b[order]).to(dtype)
        _write(folder / GGUF_TENSORS, ARCHITECTURES[config.model_type], float(self.rank), tensors)
        self._scale, self._written = _read(folder / GGUF_TENSORS)

    def read(self, name: str) -> Tensor:
        """Base + scale B A from the written file, with the rows in transformers' order."""
        tensor, module = self._base.read(name), name.removesuffix(".weight")
        if module not in self._names:
            return tensor
        a, b = (self._written[f"{self._names[module]}.weight.lora_{which}"] for which in "ab")
        change, order = self._scale / len(a) * (b.float() @ a.float()), self._orders[module]
        delta = change if order is None else torch.empty_like(change).index_copy_(0, order, change)
        return tensor.float() + (delta.T if self._transposed[module] else delta)


def tensor_names(config: Any, modules: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The GGUF names of modules, without `.weight`: `blk.7.attn_q` for `model.layers.7.self_attn.q_proj`.

    Args:
        config: config of the model.
        modules: modules by their path in the model.
        prefix: prefix of the base model, such as `model.`.

    Raises:
        ModelError: this version of the package gguf has no name for a module.
    """
    import gguf

    wanted = ARCHITECTURES[config.model_type]
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted), None)
    if kind is None:
        raise ModelError(
            f"this version of the package gguf does not know the architecture {wanted}: pip install -U gguf"
        )
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    names = {}
    for module in modules:
        name = table.get_name(module) or table.get_name(module.removeprefix(prefix))
        if name is None:
            raise ModelError(
                f"the package gguf has no name for {module} in the architecture {wanted}: pip install -U gguf"
            )
        names[module] = name
    return names


def _write(path: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    from gguf import GGUFType, GGUFWriter, Keys

    writer = GGUFWriter(path, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(path: Path) -> tuple[float, dict[str, Tensor]]:
    """Read alpha, and the tensors by name."""
    from gguf import GGUFReader, Keys

    reader = GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    return float(reader.fields[Keys.Adapter.LORA_ALPHA].contents()), tensors


def base_gguf(adapted: AdaptedBase) -> Path | None:
    """The GGUF of the base, if it is on this machine: only for `demo-llm`."""
    return demo_gguf() if adapted.checkpoint.name == DEMO_LLM else None


def write_modelfile(folder: Path, base: Path | None) -> None:
    """Write the Modelfile from which Ollama creates a model; its paths are relative to the file.

    Args:
        folder: folder of the LoRA.
        base: the GGUF of the base; None writes a placeholder.
    """
    lines = [f"FROM {base or './MODEL.gguf'}", f"ADAPTER ./{GGUF_TENSORS}"]
    if base is None:
        lines.insert(0, "# MODEL.gguf: the base as a GGUF, such as one from llama.cpp's convert_hf_to_gguf.py")
    write_bytes(folder / MODELFILE, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))
