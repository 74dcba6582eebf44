"""The memory of a training step: estimated before it, measured after it.

The estimate counts the tensors that autograd saves, with torch's hooks, in forward passes of one and of two rows of the
maximum length. The difference gives the part that grows with the batch.
"""

from __future__ import annotations

import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from torch import Tensor, nn

from craft_cli.data.batches import collate
from craft_cli.models.loading import keep_activations, recompute_activations
from craft_cli.training.checkpoint import untouched_rng
from craft_cli.training.progress import Memory

if TYPE_CHECKING:
    from craft_cli.training.setup import Training

_ON_CPU = 1.6
"""Measured growth of the glibc heap per byte of activations; it exceeds 1 because freed memory is kept."""
_IN_4_BIT = 0.5 + 4 / 64
"""Bytes per parameter in NF4, with one float32 scale per 64 parameters."""


@dataclass(frozen=True)
class _Kept:
    """Bytes saved for the backward pass: a fixed part, a part per row, the largest tensor of a row, and the heap growth."""

    fixed: int
    row: int
    largest: int

    growth: float

    def of(self, rows: int, layers: int = 1, inputs: int = 0) -> int:
        """Bytes for a batch; with gradient checkpointing, given `inputs` bytes per row and layer."""
        row = self.row if layers == 1 else inputs * layers + self.row // layers
        return self.fixed + int(self.growth * rows * (row + self.largest))


def estimate(training: Training, *, savings: bool = False) -> Memory | None:
    """Estimate the memory of an update on the longest batch; None if it cannot be counted (compiled or sharded).

    Args:
        training: the training, set up.
        savings: whether to estimate what other flags would save.
    """
    config = training.config
    if training.sharded or config.torch_compile:
        return None
    model, data = training.accelerator.unwrap_model(training.model), training.prepared.train
    rows = min(training.prepared.train_batch, len(data))
    length = max(data.lengths)
    layers, inputs = _layers(model), model.dtype.itemsize * length * _width(model)
    training.model.train()
    if config.gradient_checkpointing:
        keep_activations(model)
    try:
        kept = _kept(training, training.accelerator.autocast)
        recomputed = kept.of(rows, layers, inputs)
        activations = recomputed if config.gradient_checkpointing else kept.of(rows)
        own = {id(tensor) for tensor in training.trainable}
        weights = sum(tensor.nbytes for tensor in model.parameters() if id(tensor) not in own)
        numbers = sum(tensor.nbytes for tensor in training.trainable)
        saved = {}
        if savings:
            if not config.gradient_checkpointing and model.supports_gradient_checkpointing:
                saved["--gradient-checkpointing"] = activations - recomputed
            if training.accelerator.mixed_precision == "no":
                half = _kept(training, lambda: torch.autocast(training.accelerator.device.type, torch.bfloat16))
                saved["--bf16"] = kept.of(rows) - half.of(rows)
            if not (config.load_in_4bit or config.load_in_8bit):
                saved["--load-in-4bit"] = _quantised(model, own)
            if rows > 1:
                saved[f"--per-device-train-batch-size {rows // 2}"] = activations - activations * (rows // 2) // rows
    finally:
        if config.gradient_checkpointing:
            recompute_activations(model)
    held = _held(training.accelerator.device)
    return Memory(
        peak=held + 3 * numbers + activations,
        weights=weights,
        trained=4 * numbers,
        activations=activations,
        other=max(held - weights - numbers, 0),
        rows=rows,
        length=length,
        savings={flag: size for flag, size in saved.items() if size > 0},
    )


def peak(device: torch.device) -> int:
    """Peak memory of this process so far, on the GPU if it trains there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # Linux; a process can reset this value
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of_process() -> int:
    """Peak memory, without knowing the training device."""
    return peak(torch.device("cuda" if torch.cuda.is_available() and torch.cuda.memory_allocated() else "cpu"))


def _held(device: torch.device) -> int:
    """Current memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak(device)


def _kept(training: Training, precision: Callable[[], AbstractContextManager[Any]]) -> _Kept:
    """Measure forward passes of the longest row, alone and twice, without training and without changing the random state."""
    data = training.prepared.train
    row = max(range(len(data)), key=data.lengths.__getitem__)
    (one, largest), (two, _) = (_forward(training, [row] * count, precision) for count in (1, 2))
    growth = _ON_CPU if training.accelerator.device.type == "cpu" else 1.0
    return _Kept(fixed=max(2 * one - two, 0), row=two - one, largest=largest, growth=growth)


def _forward(
    training: Training, rows: list[int], precision: Callable[[], AbstractContextManager[Any]]
) -> tuple[int, int]:
    """Bytes that autograd saves for these rows, at most, and bytes of the largest tensor at the end.

    The loss of a language model runs small backward passes of its own. What these save is gone before the forward pass ends.
    """
    prepared, device = training.prepared, training.accelerator.device
    model = training.accelerator.unwrap_model(training.model)
    own = set(
        _storages([*model.parameters(), *model.buffers(), *training.adapter.parameters(), *training.adapter.buffers()])
    )
    tally = _Tally(own)
    batch = collate(prepared.train, rows, prepared.tokenizer).to(device)
    with untouched_rng(device), precision(), torch.autograd.graph.saved_tensors_hooks(tally.pack, _Saved.unpack):
        loss = prepared.task.loss(model, batch)
    largest = max(tally.sizes.values(), default=0)
    del loss  # until here, its graph holds them
    return tally.most, largest


class _Tally:
    """The storages that autograd holds, without those that the model owns.

    Attributes:
        sizes: bytes of each, by address.
        most: the largest sum of them so far.
    """

    def __init__(self, own: set[int]) -> None:
        self.own, self.sizes, self.holders, self.most = own, dict[int, int](), Counter[int](), 0

    def pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor, self)

    def hold(self, place: int, size: int) -> None:
        self.holders[place] += 1
        self.sizes[place] = size
        self.most = max(self.most, sum(self.sizes.values()))

    def release(self, place: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.sizes[place]


class _Saved:
    """A tensor that autograd holds, until its graph is gone."""

    def __init__(self, tensor: Tensor, tally: _Tally) -> None:
        self.tensor = tensor
        for place in set(_storages([tensor])) - tally.own:
            tally.hold(place, tensor.untyped_storage().nbytes())
            finalize(self, tally.release, place)

    def unpack(self) -> Tensor:
        return self.tensor


def _storages(tensors: Iterable[Tensor]) -> Iterable[int]:
    with suppress(NotImplementedError, RuntimeError):  # a tensor without storage
        yield from (tensor.untyped_storage().data_ptr() for tensor in tensors)


def _layers(model: Any) -> int:
    text = model.config.get_text_config()
    return int(getattr(text, "num_hidden_layers", 1))


def _width(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "hidden_size", 0))


def _quantised(model: Any, own: set[int]) -> int:
    """Bytes that 4-bit loading saves in the base's linear layers; the head of a language model stays as it is."""
    head = model.get_output_embeddings()
    weights = [
        layer.weight
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer is not head and id(layer.weight) not in own
    ]
    return sum(int(weight.nbytes - _IN_4_BIT * weight.numel()) for weight in weights)
