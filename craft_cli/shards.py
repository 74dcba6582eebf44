"""Writing a checkpoint's weights tensor by tensor: no more than one of them is in memory at a time.

`safetensors.torch.save_file` wants all tensors of a file at once; the format itself does not. It is eight bytes with the
length of a JSON header, the header (dtype, shape and place of every tensor), and the values one after the other.
"""

from __future__ import annotations

import json
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
