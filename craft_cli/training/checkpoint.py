"""Training checkpoints: everything needed to resume exactly as an uninterrupted run.

    checkpoints/step-120/
        adapter_config.json, adapter_model.safetensors   the current adapter, usable with `craft eval` and `craft merge`
        training_state.safetensors                       optimizer, best adapter so far, and a record of everything else
        metrics.jsonl                                    the log up to here

A checkpoint appears under its name only when it is complete and flushed to disk. Its contents have checksums; a damaged
checkpoint is reported and skipped in favour of the previous one. The base model's weights are not saved.
"""

from __future__ import annotations

import base64
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from craft_cli.data.tokens import Encoded
from craft_cli.errors import FileError, OtherVersion
from craft_cli.files import (
    CHECKPOINT,
    cannot_change,
    delete_folder,
    read_content,
    read_tensors,
    whole_folder,
    write_bytes,
    write_tensors,
)
from craft_cli.methods.adapter_folder import HEAD, TENSOR_FILE, read_adapter
from craft_cli.methods.frozen import Frozen
from craft_cli.methods.model_adapter import ModelAdapter
from craft_cli.models.identity import Base
from craft_cli.training.run import Run, checkpoints

KIND = "the state of a training"
STATE_FILE = "training_state.safetensors"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class TrainingState:
    """The contents of a checkpoint.

    Attributes:
        step: updates made.
        record: everything that is not a tensor: `step`, `settings` (the resolved recipe), `update_size` (rows), `data` (a
            checksum), `held_out` (see `data.holdout`), `seconds`, `journal`, `rng` (of every process), `scaler`, `tracker_id`, `metrics_sha256`.
        frozen: what the method keeps of the base's weights.
        base: identity of the base model.
        trained: trained parameters including the head, by their names in an adapter file.
        optimizer: optimizer state by `NUMBER.KEY`, with parameters numbered in the optimizer's order.
        best: trained parameters and head of the best evaluation so far; empty before the first.
        metrics: metrics.jsonl up to here.
    """

    step: int
    record: Mapping[str, Any]
    frozen: Frozen
    base: Base
    trained: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    metrics: bytes

    def restore(self, adapter: ModelAdapter, optimizer: Any, scaler: Any, process: int, device: torch.device) -> None:
        """Restore adapter, optimizer, gradient scaler and random number generators of this process."""
        adapter.load_trained_state(self.trained)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.optimizer.items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor.clone()
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        if scaler is not None and self.record["scaler"]:
            scaler.load_state_dict(self.record["scaler"])
        if process < len(self.record["rng"]):  # an additional process keeps its seed
            restore_rng(self.record["rng"][process], device)


def save_checkpoint(
    run: Run, record: Mapping[str, Any], adapter: ModelAdapter, optimizer: Any, best: Mapping[str, Tensor], keep: int
) -> Path:
    """Write `checkpoints/step-N` and delete the oldest checkpoints.

    Args:
        run: the run.
        record: see `TrainingState.record`.
        adapter: the current adapter.
        optimizer: the torch optimizer.
        best: trained parameters and head of the best evaluation so far.
        keep: number of checkpoints to keep, including this one.

    Raises:
        FileError: the checkpoint cannot be written; earlier ones are unchanged.
    """
    metrics = read_content(run.metrics_file) if run.metrics_file.is_file() else b""
    record = {**record, "metrics_sha256": sha256(metrics).hexdigest()}
    tensors = {f"best.{name}": tensor for name, tensor in best.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in values.items()}
    tensors["record"] = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    path = run.checkpoints / f"step-{record['step']}"
    with whole_folder(path, CHECKPOINT, overwrite=True) as folder:
        adapter.write(folder)
        write_tensors(folder / STATE_FILE, KIND, tensors, {})
        write_bytes(folder / METRICS_FILE, metrics)
    try:
        for former in checkpoints(run)[keep:]:
            delete_folder(former)
    except OSError as error:
        raise cannot_change(former, error) from error
    return path


def newest_state(run: Run) -> tuple[TrainingState | None, list[str]]:
    """The state in the newest intact checkpoint, with a note about each damaged one, which is renamed.

    Raises:
        OtherVersion: another version of craft wrote a checkpoint.
    """
    notes: list[str] = []
    for path in checkpoints(run):
        try:
            state = read_checkpoint(path)
        except OtherVersion:
            raise
        except FileError as error:
            notes.append(f"{error}; resuming from the previous checkpoint")
            aside, number = (
                path.with_name(f"{path.name}.damaged"),
                2,
            )  # so that it does not count among the checkpoints to keep
            try:
                if aside.exists():
                    delete_folder(aside)
                while os.path.lexists(aside):  # it holds files of the user's
                    aside, number = path.with_name(f"{path.name}.damaged-{number}"), number + 1
                path.rename(aside)
            except OSError as failure:
                raise cannot_change(path, failure) from failure
        else:
            return state, notes
    return None, notes


def read_checkpoint(path: Path) -> TrainingState:
    """Read and verify a checkpoint.

    Raises:
        FileError: a part is missing, truncated, modified or unreadable.
        OtherVersion: another version of craft wrote it.
    """
    for name in (TENSOR_FILE, STATE_FILE, METRICS_FILE):
        if not (path / name).is_file():
            raise FileError(f"{path} is damaged: {name} is missing")
    saved = read_adapter(path)
    tensors, _ = read_tensors(path / STATE_FILE, KIND)
    metrics = read_content(path / METRICS_FILE)
    record = json.loads(tensors.pop("record").numpy().tobytes())
    if sha256(metrics).hexdigest() != record["metrics_sha256"]:
        raise FileError(f"{path / METRICS_FILE} is damaged: its contents do not match the checksum")
    return TrainingState(
        step=record["step"],
        record=record,
        frozen=saved.frozen,
        base=saved.base,
        trained=dict(saved.trained) | {HEAD + name: tensor for name, tensor in saved.head.items()},
        optimizer=_below(tensors, "optimizer."),
        best=_below(tensors, "best."),
        metrics=metrics,
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def data_checksum(parts: Sequence[Encoded]) -> str:
    """The sha256 of token ids and labels of all rows, to detect changed data."""
    digest = sha256()
    for part in parts:
        for features, label in zip(part.features, part.labels or [None] * len(part), strict=True):
            digest.update(json.dumps([features, label]).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every random number generator of this process, as JSON."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _text(torch.cuda.get_rng_state(device))
    return state


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore every random number generator of this process."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


@contextmanager
def untouched_rng(device: torch.device) -> Iterator[None]:
    """Preserve the random state of the training inside the block, even if a first import draws random numbers."""
    state = rng_state(device)
    yield
    restore_rng(state, device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
