"""Read and write the weights of a checkpoint tensor by tensor, with at most one in memory at a time.

`safetensors.torch.save_file` needs all tensors of a file at once, and pages read by `safe_open` count as memory of this
process while the file is open. The format itself requires neither: it is eight bytes with the length of a JSON header, the
header (dtype, shape and offsets of every tensor), and the values in order.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from craft_cli.errors import ConfigError
from craft_cli.files import raw_bytes, write_json

INDEX = "model.safetensors.index.json"

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class _OpenFile:
    """An open file, which stays the same even if another file replaces its name; closed when no longer used."""

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._number)

    def mapped(self, start: int, stop: int) -> tuple[mmap.mmap, int]:
        """A memory map with bytes start..stop, and their offset in it."""
        skipped = start % mmap.ALLOCATIONGRANULARITY
        first = start - skipped  # copy-on-write, because torch requires a writable buffer
        return mmap.mmap(self._number, stop - first, access=mmap.ACCESS_COPY, offset=first), skipped


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, mapped on access and only as long as the result is in use.

    Attributes:
        file: the file.
        dtype: dtype name in safetensors.
        shape: shape of the tensor.
        start: offset of its first byte.
        stop: offset after its last byte.
    """

    file: _OpenFile
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def known(self) -> bool:
        """Whether the dtype can be computed with directly (scaled 8-bit floats cannot)."""
        return self.dtype in _DTYPES

    def read(self) -> Tensor:
        """The values as a view of a memory map, so that only accessed parts are read."""
        dtype = _DTYPES[self.dtype]
        if self.start == self.stop:
            return torch.empty(self.shape, dtype=dtype)
        mapped, skipped = self.file.mapped(self.start, self.stop)
        return torch.frombuffer(mapped, dtype=dtype, offset=skipped, count=prod(self.shape)).view(self.shape)

    def announce(self) -> None:
        """Let the system read it into its cache in the background."""
        if self.start < self.stop and hasattr(mmap, "MADV_WILLNEED"):
            mapped, _ = self.file.mapped(self.start, self.stop)
            with contextlib.suppress(OSError):  # this is only a hint
                mapped.madvise(mmap.MADV_WILLNEED)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a valid safetensors file, by name."""
    file = _OpenFile(path)
    head, _ = file.mapped(0, 8)
    begin = 8 + int.from_bytes(head[:8], "little")
    header, _ = file.mapped(0, begin)
    entries = json.loads(header[8:begin])
    entries.pop("__metadata__", None)
    return {
        name: StoredTensor(
            file, entry["dtype"], tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"])
        )
        for name, entry in entries.items()
    }


@dataclass(frozen=True)
class Entry:
    """A tensor to write, computed when needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """The size on disk in bytes."""
        return prod(self.shape) * self.dtype.itemsize


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


def shard_bytes(size: str | int | None) -> int:
    """Parse a size such as `500MB`, `5GB` or a number of bytes. Default: 5 GB, as in transformers.

    Raises:
        ConfigError: the size is invalid or zero.
    """
    found = _SIZE.fullmatch(str(size).strip()) if size is not None else None
    if size is None:
        return 5 * 10**9
    found_bytes = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if found_bytes < 1:
        raise ConfigError(f"--max-shard-size: expected a size such as 500MB or 5GB, not '{size}'")
    return found_bytes


def write_shards(folder: Path, entries: Mapping[str, Entry], max_shard_size: int) -> None:
    """Write `model.safetensors`, or several files and an index if it would exceed the shard size in bytes.

    Raises:
        OSError: a file cannot be written.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: entry.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        write_streamed(folder / file, {name: entries[name] for name in names})
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def write_streamed(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write one safetensors file, tensor by tensor.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(
        entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])
    )  # wide dtypes first, for alignment
    offset = 0
    for name, entry in ordered:
        place = [offset, offset + entry.bytes]
        header[name] = {"dtype": _DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in ordered:
            tensor = entry.make()
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), name
            file.write(raw_bytes(tensor))
            del tensor
