"""Checkpoints of a training: all it needs to go on as if it had never been cut.

    checkpoints/step-120/
        adapter_config.json, adapter_model.safetensors   the adapter as it is: `craft eval` and `craft merge` take it
        training_state.safetensors                       optimizer, best adapter so far, and a record of everything else
        metrics.jsonl                                    the log up to here

A checkpoint appears under its name only when it is whole and on disk. All numbers are guarded by checksums: a damaged one
is told and passed over for the one before. The base model's weights are not in it.
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
    """What a checkpoint holds.

    Attributes:
        step: updates made.
        record: everything that is no tensor: `step`, `settings` (the resolved recipe), `update_size` (rows), `data` (a
            checksum), `held_out` (see `data.holdout`), `seconds`, `journal`, `rng` (of every process), `scaler`, `tracker_id`, `metrics_sha256`.
        frozen: what the method keeps of the base's weights.
        base: that is trained on.
        trained: what is trained, the head too, by its names in an adapter's file.
        optimizer: its state by `NUMBER.KEY`, parameters numbered in the optimizer's order.
        best: trained numbers and head of the best evaluation so far; empty before the first.
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
        """Put adapter, optimizer, gradient scaler and random numbers of this process back as they were."""
        adapter.load_trained_state(self.trained)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.optimizer.items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor.clone()
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        if scaler is not None and self.record["scaler"]:
            scaler.load_state_dict(self.record["scaler"])
        if process < len(self.record["rng"]):  # more processes than before: a new one starts as seeded
            restore_rng(self.record["rng"][process], device)


def save_checkpoint(
    run: Run, record: Mapping[str, Any], adapter: ModelAdapter, optimizer: Any, best: Mapping[str, Tensor], keep: int
) -> Path:
    """Write `checkpoints/step-N` and delete all but the newest ones.

    Args:
        run: whose.
        record: see `TrainingState.record`.
        adapter: as it is now.
        optimizer: of torch.
        best: trained numbers and head of the best evaluation so far.
        keep: checkpoints to keep, this one counted.

    Raises:
        FileError: it cannot be written; the former ones are untouched.
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
    """The state in the newest checkpoint that is whole, and a note about each newer one; those are set aside.

    Raises:
        OtherVersion: a checkpoint was written by one.
    """
    notes: list[str] = []
    for path in checkpoints(run):
        try:
            state = read_checkpoint(path)
        except OtherVersion:
            raise
        except FileError as error:
            notes.append(f"{error}; going on from the checkpoint before")
            aside, number = path.with_name(f"{path.name}.damaged"), 2  # or they would be kept in place of whole ones
            try:
                if aside.exists():
                    delete_folder(aside)
                while os.path.lexists(aside):  # it holds something that is not ours
                    aside, number = path.with_name(f"{path.name}.damaged-{number}"), number + 1
                path.rename(aside)
            except OSError as failure:
                raise cannot_change(path, failure) from failure
        else:
            return state, notes
    return None, notes


def read_checkpoint(path: Path) -> TrainingState:
    """All of a checkpoint, checked.

    Raises:
        FileError: a part is missing, cut, changed or unreadable.
        OtherVersion: it was written by one.
    """
    for name in (TENSOR_FILE, STATE_FILE, METRICS_FILE):
        if not (path / name).is_file():
            raise FileError(f"{path} is damaged: it holds no {name}")
    saved = read_adapter(path)
    tensors, _ = read_tensors(path / STATE_FILE, KIND)
    metrics = read_content(path / METRICS_FILE)
    record = json.loads(tensors.pop("record").numpy().tobytes())
    if sha256(metrics).hexdigest() != record["metrics_sha256"]:
        raise FileError(f"{path / METRICS_FILE} is damaged: its contents do not match their checksum")
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
    """sha256 over token ids and gold of all rows, to notice that the data has changed."""
    digest = sha256()
    for part in parts:
        for features, label in zip(part.features, part.labels or [None] * len(part), strict=True):
            digest.update(json.dumps([features, label]).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def rng_state(device: torch.device) -> dict[str, Any]:
    """Every random number generator of this process, as JSON."""
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
    """Put every random number generator of this process back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


@contextmanager
def untouched_rng(device: torch.device) -> Iterator[None]:
    """What happens inside draws no random numbers from the training, whatever libraries it imports for the first time."""
    state = rng_state(device)
    yield
    restore_rng(state, device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
