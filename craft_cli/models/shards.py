"""A checkpoint's weights tensor by tensor, written and read: no more than one of them is in memory at a time.

`safetensors.torch.save_file` wants all tensors of a file at once, and what `safe_open` once read counts as this process's
memory as long as the file is open; the format itself asks for neither. It is eight bytes with the length of a JSON header,
the header (dtype, shape and place of every tensor), and the values one after the other.
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
    """A file held open, so that it stays the same one if another takes its name; closed when nobody needs it."""

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._number)

    def mapped(self, start: int, stop: int) -> tuple[mmap.mmap, int]:
        """A map that holds bytes start..stop, and where they begin in it."""
        skipped = start % mmap.ALLOCATIONGRANULARITY
        first = start - skipped  # a copy on write: torch wants a buffer that could be written
        return mmap.mmap(self._number, stop - first, access=mmap.ACCESS_COPY, offset=first), skipped


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, mapped when it is asked for and no longer than what was given of it lives.

    Attributes:
        file: it is in.
        dtype: as safetensors names it.
        shape: of the tensor.
        start: of its bytes in the file.
        stop: after its last byte.
    """

    file: _OpenFile
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def known(self) -> bool:
        """Whether its dtype is one that can be computed with as it is (scaled 8-bit floats are not)."""
        return self.dtype in _DTYPES

    def read(self) -> Tensor:
        """Its values, as the file has them: a view of a map, so that only what is looked at is read."""
        dtype = _DTYPES[self.dtype]
        if self.start == self.stop:
            return torch.empty(self.shape, dtype=dtype)
        mapped, skipped = self.file.mapped(self.start, self.stop)
        return torch.frombuffer(mapped, dtype=dtype, offset=skipped, count=prod(self.shape)).view(self.shape)

    def announce(self) -> None:
        """Have the system read it from the disk in the background: into its cache, not into this process."""
        if self.start < self.stop and hasattr(mmap, "MADV_WILLNEED"):
            mapped, _ = self.file.mapped(self.start, self.stop)
            with contextlib.suppress(OSError):  # it was a hint
                mapped.madvise(mmap.MADV_WILLNEED)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file that `safe_open` takes, by name."""
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
    """A tensor to write, made when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return prod(self.shape) * self.dtype.itemsize


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


def shard_bytes(size: str | int | None) -> int:
    """Bytes of `500MB`, `5GB` or a number of them; 5 GB without, as transformers has it.

    Raises:
        ConfigError: it is no size, or none at all.
    """
    found = _SIZE.fullmatch(str(size).strip()) if size is not None else None
    if size is None:
        return 5 * 10**9
    found_bytes = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if found_bytes < 1:
        raise ConfigError(f"--max-shard-size: expected a size such as 500MB or 5GB, not '{size}'")
    return found_bytes


def write_shards(folder: Path, entries: Mapping[str, Entry], max_shard_size: int) -> None:
    """Write `model.safetensors`, or several files and their index where one would be larger than a shard may be (bytes).

    Raises:
        OSError: it cannot be written.
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
    """One safetensors file, tensor by tensor.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # wide ones first: aligned
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
