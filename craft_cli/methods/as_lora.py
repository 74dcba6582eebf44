"""Export an adapter as a LoRA in PEFT's layout, written directly, so that peft is not needed and nested heads are kept.

A chain (d_in, r) ... (r, d_out) of low rank is a LoRA, split where it is narrowest, with alpha = r:

    A = (left part)^T   (r, d_in)        B = (right part)^T   (d_out, r)        dW_l = B A

If one weight holds several projections (GPT-2's c_attn), their A are stacked, and each B fills its own rows. All layers
get the same rank, which servers require; smaller ones are padded with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.errors import CraftError
from craft_cli.files import write_json
from craft_cli.methods.as_dense import AdaptedBase
from craft_cli.methods.base import low_rank
from craft_cli.models.cards import peft_type
from craft_cli.models.demo import DEMOS
from craft_cli.models.shards import Entry, write_streamed
from craft_cli.models.views import View, layer_of

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"

_ROOT = "base_model.model."  # PEFT's names start with its wrappers
_EPSILON = 1e-6
EXACT = 1e-6
"""Relative error that counts as none: the rounding of float32."""


def lora_pairs(
    adapted: AdaptedBase, *, trim: bool = False, tolerance: float = EXACT
) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, d_in) and B (d_out, r) of every adapted module, by its path in the model; float32.

    Args:
        adapted: the adapter and its base.
        trim: whether to omit directions with a singular value below 1e-6 of the largest one of all modules.
        tolerance: allowed error of a dense change, relative to its norm.

    Raises:
        CraftError: a dense change has no low rank within the tolerance.
    """
    factored: dict[str, list[tuple[Tensor, Tensor]]] = {}
    errors: dict[str, float] = {}
    for target in adapted.views:
        factored[target] = []
        for layer, chain in enumerate(adapted.saved.chains(target)):
            pair, error = _approximated(chain[0], tolerance) if len(chain) == 1 else (low_rank(chain), 0.0)
            factored[target].append(pair)
            errors[f"{target} of layer {layer}"] = error
    worst = max(errors, key=lambda what: errors[what])
    if errors[worst] > tolerance:
        raise CraftError(
            f"the change of {worst} is dense: a smaller LoRA has a relative error of {errors[worst]:.2g}, more than "
            f"{tolerance:g}; merge it into a checkpoint, or allow the error: "
            f"--tolerance {math.ceil(errors[worst] * 1e3) / 1e3:g}"
        )
    if trim:
        spectral = [_singular(a, b)[1] for pairs in factored.values() for a, b in pairs]
        floor = _EPSILON * max((float(values.max()) for values in spectral if len(values)), default=0.0)
        factored = {target: [_trimmed(a, b, floor) for a, b in pairs] for target, pairs in factored.items()}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, changes in adapted.changes().items():
        parts = [factored[target][layer] for _, target, layer in changes]
        a = torch.cat([a for a, _ in parts])  # (sum of ranks, d_in)
        stored = adapted.base.shapes[name]
        b = torch.cat(
            [_in_rows(view, b, stored) for (view, _, _), (_, b) in zip(changes, parts, strict=True)], dim=1
        )  # (d_out, sum of ranks)
        pairs[name.removesuffix(".weight")] = a, b
    rank = max(max(len(a) for a, _ in pairs.values()), 1)
    return {name: (_filled(a, 0, rank).float(), _filled(b, 1, rank).float()) for name, (a, b) in pairs.items()}


def _approximated(change: Tensor, tolerance: float) -> tuple[tuple[Tensor, Tensor], float]:
    """A (r, d_in) and B (d_out, r) with ||dW - B A|| <= tolerance ||dW|| for dW^T (d_in, d_out), at the smallest r.

    Returns:
        A and B, and 0; or, if they would be as large as dW, the largest that are smaller, and their error.
    """
    u, values, vh = torch.linalg.svd(change.T, full_matrices=False)
    left_out = values.square().flip(0).cumsum(0).flip(0).sqrt()  # for ranks 0, 1, ...
    d_in, d_out = change.shape
    needed, most = int((left_out > tolerance * left_out[0]).sum()), d_in * d_out // (d_in + d_out)
    rank = min(needed, most)
    return (vh[:rank], u[:, :rank] * values[:rank]), float(left_out[most] / left_out[0]) if needed > most else 0.0


def _singular(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of B A: U (d_out, r), values (r,), V^T (r, d_in)."""
    q_in, r_in = torch.linalg.qr(a.T)
    q_out, r_out = torch.linalg.qr(b)
    left, values, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    return q_out @ left, values, right @ q_in.T


def _trimmed(a: Tensor, b: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The product, with only the directions whose singular value is above `floor`."""
    left, values, right = _singular(a, b)
    kept = int((values > floor).sum())
    return right[:kept], left[:, :kept] * values[:kept]


def _in_rows(view: View, b: Tensor, stored: Sequence[int]) -> Tensor:
    """B (d_out of the view, r) in the view's rows of the whole weight, zero elsewhere."""
    if view.rows is None:
        return b
    whole = b.new_zeros(stored[1 if view.transposed else 0], b.shape[1])
    view.rows.of(whole, 0).copy_(b.unflatten(0, (view.rows.count, view.rows.size)))
    return whole


def _filled(tensor: Tensor, dim: int, size: int) -> Tensor:
    missing = list(tensor.shape)
    missing[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=dim)


def peft_tensors(
    adapted: AdaptedBase, pairs: Mapping[str, tuple[Tensor, Tensor]], *, head: bool = True
) -> dict[str, Tensor]:
    """All tensors of adapter_model.safetensors by PEFT's names, with or without the trained head."""
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{_ROOT}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{_ROOT}{module}.lora_B.weight"] = b.contiguous()
    kept = adapted.saved.head if head else {}
    return tensors | {f"{_ROOT}{name}": tensor.contiguous() for name, tensor in kept.items()}


def peft_config(
    adapted: AdaptedBase, pairs: Mapping[str, tuple[Tensor, Tensor]], *, head: bool = True
) -> dict[str, Any]:
    """PEFT's adapter_config.json; without the head it is for feature extraction, or PEFT would add a new head."""
    rank, checkpoint = next(len(a) for a, _ in pairs.values()), adapted.checkpoint
    transposed = any(view.transposed for changes in adapted.changes().values() for view, _, _ in changes)
    return {
        "peft_type": "LORA",
        "task_type": peft_type(adapted.saved.record["model"]["architecture"]) if head else "FEATURE_EXTRACTION",
        "base_model_name_or_path": str(checkpoint.folder) if checkpoint.name in DEMOS else checkpoint.name,
        "revision": checkpoint.revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": transposed,
        "target_modules": _shortest_names(adapted, list(pairs)),
        "modules_to_save": (_head_modules(adapted) or None) if head else None,
        "inference_mode": True,
    }


def _shortest_names(adapted: AdaptedBase, modules: Sequence[str]) -> list[str]:
    """The shortest path endings that match only the adapted modules of a projection; if there are none, the paths."""
    everywhere = [name for name, _ in adapted.base.model.named_modules()]
    chosen = []
    for ending in dict.fromkeys(_after_layer(module) for module in modules):
        parts = ending.split(".")
        wanted = {module for module in modules if _after_layer(module) == ending}
        for length in range(1, len(parts) + 1):
            short = ".".join(parts[-length:])
            if {name for name in everywhere if name == short or name.endswith(f".{short}")} == wanted:
                chosen.append(short)
                break
        else:  # the decoder of T5 has the same names
            chosen += sorted(wanted)
    return chosen


def _after_layer(module: str) -> str:
    return module.removeprefix(f"{layer_of(module)}.")


def _head_modules(adapted: AdaptedBase) -> list[str]:
    """The outermost modules that hold only the trained head."""
    modules: dict[str, None] = {}
    head = set(adapted.saved.head)
    for name in adapted.saved.head:
        parts = name.split(".")
        for length in range(1, len(parts)):
            path = ".".join(parts[:length])
            inside = {other for other in adapted.base.shapes if other.startswith(f"{path}.")}
            if inside <= head:
                modules[path] = None
                break
    return list(modules)


class LoraWriter:
    """A LoRA in PEFT's layout, written into `folder`.

    Attributes:
        head: names of the trained head's parameters, if the LoRA includes it.
    """

    dtype = torch.float32

    def __init__(self, adapted: AdaptedBase, folder: Path, *, trim: bool, tolerance: float, head: bool) -> None:
        from safetensors.torch import load_file

        pairs = lora_pairs(adapted, trim=trim, tolerance=tolerance)
        config = peft_config(adapted, pairs, head=head)
        tensors = peft_tensors(adapted, pairs, head=head)
        self.head = list(adapted.saved.head) if head else []
        self.rank: int | None = config["r"]
        entries = {name: Entry(tuple(t.shape), t.dtype, partial(_itself, t)) for name, t in tensors.items()}
        write_streamed(folder / PEFT_TENSORS, entries)
        write_json(folder / PEFT_CONFIG, config)
        self.changed = [f"{module}.weight" for module, (a, b) in pairs.items() if a.any() and b.any()]
        self._base, self._transposed = adapted.base, config["fan_in_fan_out"]
        self._written = load_file(folder / PEFT_TENSORS)

    def read(self, name: str) -> Tensor:
        """Base + B A from the written file; an omitted head is read from the adapter."""
        own = self._written.get(f"{_ROOT}{name}")
        if own is not None:
            return own
        tensor = self._base.read(name)
        module = f"{_ROOT}{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in self._written:
            return tensor
        delta = self._written[f"{module}.lora_B.weight"] @ self._written[f"{module}.lora_A.weight"]
        return tensor.float() + (delta.T if self._transposed else delta)


def _itself(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
