"""A checkpoint's weights tensor by tensor, written and read: no more than one of them is in memory at a time.

`safetensors.torch.save_file` wants all tensors of a file at once, and what `safe_open` once read counts as this process's
memory as long as the file is open; the format itself asks for neither. It is eight bytes with the length of a JSON header,
the header (dtype, shape and place of every tensor), and the values one after the other.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from craft_cli.errors import ConfigError
from craft_cli.files import raw_bytes, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, mapped when it is asked for and no longer than what was given of it lives."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> Tensor:
        """Its values, as the file has them: a view of a map, so that only what is looked at is read."""
        if self.start == self.stop:
            return torch.empty(self.shape, dtype=self.dtype)
        mapped, skipped = self._mapped()
        values = torch.frombuffer(mapped, dtype=self.dtype, offset=skipped, count=prod(self.shape))
        return values.view(self.shape)

    def announce(self) -> None:
        """Have the system read it from the disk in the background: into its cache, not into this process."""
        if self.start < self.stop and hasattr(mmap, "MADV_WILLNEED"):
            mapped, _ = self._mapped()
            mapped.madvise(mmap.MADV_WILLNEED)

    def _mapped(self) -> tuple[mmap.mmap, int]:
        skipped = self.start % mmap.ALLOCATIONGRANULARITY
        first = self.start - skipped
        with open(self.path, "rb") as file:  # a copy on write: torch wants a buffer that could be written
            return mmap.mmap(file.fileno(), self.stop - first, access=mmap.ACCESS_COPY, offset=first), skipped


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file that `safe_open` takes, by name; those of a dtype not known here are left out."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path,
            _DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            *(8 + length + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
        if entry["dtype"] in _DTYPES
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
