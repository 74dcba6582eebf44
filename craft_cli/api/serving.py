"""Commands to run the output of `craft merge` in other programs, and their limitations."""

from __future__ import annotations

import shlex
from pathlib import Path

from craft_cli.methods.as_dense import AdaptedBase
from craft_cli.methods.as_gguf import GGUF_TENSORS, MODELFILE, base_gguf, known
from craft_cli.models.demo import DEMOS
from craft_cli.models.loading import is_language_model

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank in vLLM; an adapter can have any rank up to it."""
VLLM_FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3", "cohere", "granite", "phi",
    "phi3", "opt",
)  # fmt: skip
"""Model families that vLLM lists with LoRA support."""
CONVERTER = "convert_hf_to_gguf.py"
"""The script of llama.cpp that converts a checkpoint to GGUF."""


def checkpoint_commands(adapted: AdaptedBase, folder: str) -> dict[str, str]:
    """Commands to serve a merged checkpoint, by program, if the architecture is supported."""
    found = {}
    if adapted.base.model.config.model_type in VLLM_FAMILIES:
        pooling = "" if is_language_model(adapted.base.model) else " --runner pooling"
        found["vLLM"] = f"vllm serve {shlex.quote(folder)}{pooling}"
    if known(adapted):
        found["llama.cpp"] = _conversion(folder)
    return found


def lora_commands(adapted: AdaptedBase, rank: int, folder: str, *, head: bool = True) -> dict[str, str]:
    """The vLLM command for a LoRA in PEFT's format, if vLLM supports the architecture and the adapter.

    Args:
        adapted: the adapter and its base.
        rank: rank of the LoRA.
        folder: the output folder.
        head: whether it includes the trained head.
    """
    served = adapted.base.model.config.model_type in VLLM_FAMILIES
    if not served or (adapted.saved.head and head) or rank > VLLM_RANKS[-1]:
        return {}
    size = next(size for size in VLLM_RANKS if size >= rank)
    checkpoint = adapted.checkpoint
    name = shlex.quote(str(checkpoint.folder) if checkpoint.name in DEMOS else checkpoint.name)
    lora = shlex.quote(f"tuned={folder}")
    runner = " --runner pooling" if adapted.saved.head else ""
    return {"vLLM": f"vllm serve {name}{runner} --enable-lora --max-lora-rank {size} --lora-modules {lora}"}


def lora_hint(adapted: AdaptedBase, rank: int, *, head: bool = True) -> str:
    """The ranks that vLLM accepts, and why it cannot serve this LoRA, if so."""
    line = f"vLLM accepts --max-lora-rank {', '.join(map(str, VLLM_RANKS))}"
    fitting = [size for size in VLLM_RANKS if size >= rank]
    line += (
        f": rank {rank} needs {fitting[0]}"
        if fitting
        else f": rank {rank} is too large (--trim, or train at a smaller rank)"
    )
    if adapted.base.model.config.model_type not in VLLM_FAMILIES:
        line = f"{line}; it serves no {adapted.base.model.config.model_type} with LoRA"
    elif adapted.saved.head and head:
        line = (
            f"{line}; vLLM takes a trained head from a LoRA (modules_to_save) only in versions with vllm-project/vllm#53555, and "
            "only if the served base has a head with the same number of labels; otherwise serve the checkpoint that `craft merge` "
            "writes, or for embeddings a LoRA with --no-head"
        )
    if adapted.saved.head and not head:
        line = (
            "the trained head is omitted, so this LoRA gives embeddings; for predictions, "
            f"serve the checkpoint that `craft merge` writes; {line}"
        )
    return line


def gguf_commands(adapted: AdaptedBase, folder: str) -> dict[str, str]:
    """Commands to run a GGUF LoRA with llama.cpp and Ollama."""
    model = shlex.quote(str(base_gguf(adapted) or "MODEL.gguf"))
    return {
        "llama.cpp": f"llama-server -m {model} --lora {shlex.quote(str(Path(folder) / GGUF_TENSORS))}",
        "Ollama": f"ollama create tuned -f {shlex.quote(str(Path(folder) / MODELFILE))}",
    }


def gguf_hint(adapted: AdaptedBase) -> str | None:
    """How to get the GGUF of the base; None if it is already available."""
    if base_gguf(adapted):
        return None
    name = adapted.checkpoint.name if Path(adapted.checkpoint.name).is_absolute() else "BASE"
    return (
        f"MODEL.gguf is the base as a GGUF, quantized or not; llama.cpp creates it with {_conversion(name, 'MODEL.gguf')}"
        + (", where BASE is its folder" if name == "BASE" else "")
        + f"; put its name into {MODELFILE} too"
    )


def _conversion(checkpoint: str, output: str = "model.gguf") -> str:
    return f"python {CONVERTER} {shlex.quote(checkpoint)} --outfile {output}"
