"""Hugging Face checkpoints: finding them (folder, hub, demo) and reading single tensors out of their shards.

Nothing here builds a model. A checkpoint is resolved once to a local folder; whatever reads from it later, transformers
included, reads that folder, so that all parts of a run see the same revision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor

from craft_cli.errors import FileError, ModelError
from craft_cli.files import raw_bytes, read_json
from craft_cli.models.shards import StoredTensor, stored_tensors
from craft_cli.models.views import View

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
TOKENIZER_FILES = (
    *VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*",
)  # fmt: skip
CARD = "README.md"
"""Its licence is that of what is made of it."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference; sharded ones have an .index.json


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    Attributes:
        name: hub id, absolute folder or `demo`; finds it again from anywhere.
        revision: commit of a hub checkpoint.
        folder: where its files lie.
    """

    name: str
    revision: str | None
    folder: Path

    def config(self) -> Any:
        """Its `PretrainedConfig`.

        Raises:
            ModelError: config.json is damaged or of a type transformers does not know.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{self.folder / 'config.json'}: {str(error).splitlines()[0]}") from error

    def tokenizer_files(self) -> list[Path]:
        """The files a tokenizer is made of."""
        return sorted(path for path in self.folder.iterdir() if _matches(path.name, TOKENIZER_FILES))

    def open(self) -> TensorReader:
        """Its tensors, by name."""
        return TensorReader(self)


class LazyMatrix:
    """One view into a stored weight, (d_out, d_in), whose rows are read from the file when asked for."""

    def __init__(self, stored: Tensor | StoredTensor, view: View) -> None:
        self._stored = stored
        self._view = view
        self.shape = view.shape(tuple(stored.shape))

    def __getitem__(self, rows: slice, /) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        stored = self._stored if isinstance(self._stored, Tensor) else self._stored.read()
        weight = stored.T if self._view.transposed else stored
        ranges = self._view.rows.ranges(len(weight), start, stop) if self._view.rows else [slice(start, stop)]
        parts = [weight[part] for part in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def announce(self) -> None:
        """It will be asked for next: the disk may begin."""
        if isinstance(self._stored, StoredTensor):
            self._stored.announce()


class TensorReader:
    """Reads tensors of a checkpoint by name, through its shard index."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._open: dict[str, Any] = {}
        self._places: dict[str, dict[str, StoredTensor]] = {}
        self._file_of: dict[str, str] = {}
        for file in _weight_files(checkpoint.folder):
            path = checkpoint.folder / file
            if path.is_file():
                self._file_of.update(dict.fromkeys(self._opened(file).keys(), file))

    def matrices(self, views: Sequence[View]) -> list[LazyMatrix]:
        """One lazily read matrix for each view; a model with a head keeps them below a prefix.

        Raises:
            ModelError: a weight is not in the checkpoint, in several places, or of a dtype not known here.
        """
        found = []
        for view in views:
            wanted = f"{view.module}.weight"
            names = [name for name in self._file_of if name == wanted or name.endswith(f".{wanted}")]
            if len(names) != 1:
                problem = "no tensor" if not names else f"{len(names)} tensors named"
                raise ModelError(f"{self._checkpoint.name}: the checkpoint holds {problem} {wanted}")
            found.append(LazyMatrix(self._stored(names[0]), view))
        return found

    def names(self) -> Iterable[str]:
        """Of all its tensors."""
        return self._file_of

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a tensor, without reading it."""
        stored = self._opened(self._file_of[name])
        if isinstance(stored, dict):
            return tuple(stored[name].shape), stored[name].dtype
        part = stored.get_slice(name)
        return tuple(part.get_shape()), part[tuple(slice(0, 0) for _ in part.get_shape())].dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor. Its file is mapped for it alone: pages once read would count as long as a map is held."""
        file = self._file_of[name]
        if not file.endswith(".safetensors"):
            tensor: Tensor = self._opened(file)[name]
            return tensor
        from safetensors import safe_open

        with safe_open(self._checkpoint.folder / file, framework="pt") as stored:
            return cast(Tensor, stored.get_tensor(name))

    def weight_files(self) -> list[Path]:
        """The files that hold them."""
        return [self._checkpoint.folder / file for file in sorted(set(self._file_of.values()))]

    def _stored(self, name: str) -> Tensor | StoredTensor:
        file = self._file_of[name]
        if not file.endswith(".safetensors"):
            return cast(Tensor, self._opened(file)[name])
        if file not in self._places:
            self._places[file] = stored_tensors(self._checkpoint.folder / file)
        stored = self._places[file][name]
        if not stored.known:
            raise ModelError(f"{self._checkpoint.name}: {name} is stored as {stored.dtype}, which cannot be decomposed")
        return stored

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            from safetensors import SafetensorError, safe_open

            path = self._checkpoint.folder / file
            try:
                if file.endswith(".safetensors"):
                    self._open[file] = safe_open(path, framework="pt")
                else:
                    self._open[file] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ModelError(f"{path} is damaged or truncated ({reason})") from error
            if not isinstance(self._open[file], Mapping) and not file.endswith(".safetensors"):
                raise ModelError(f"{path} is damaged: it holds no tensors by name")
        return self._open[file]


def fingerprint(layers: Iterable[Any], dtype: torch.dtype | None = None) -> str:
    """sha256 over the matrices (d_out, d_in) of a stack as stored: dtype, shapes and bytes, layer by layer.

    Args:
        layers: lazily read matrices or tensors.
        dtype: convert to this one first, to compare a model loaded in a wider dtype with its checkpoint.
    """
    digest = hashlib.sha256()
    for layer in layers:
        weight = layer[:] if dtype is None else layer[:].to(dtype)
        digest.update(f"{weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(raw_bytes(weight))
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[str]:
    """The names of all weight files that belong to the checkpoint, present or not.

    Raises:
        ModelError: there are none.
    """
    for name in _WEIGHTS:
        if (folder / f"{name}.index.json").is_file():
            return sorted(set(_weight_map(folder / f"{name}.index.json").values()))
        if (folder / name).is_file():
            return [name]
    raise ModelError(f"{folder} holds no weights ({' or '.join(_WEIGHTS)}, single or sharded)")


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, as the index of a sharded checkpoint says.

    Raises:
        ModelError: it says nothing of that kind, or names files elsewhere.
    """
    try:
        content = read_json(index).get("weight_map")
    except FileError as error:
        raise ModelError(str(error)) from error
    if not isinstance(content, dict) or any(
        not isinstance(file, str) or Path(file).name != file for file in content.values()
    ):
        raise ModelError(f"{index} is damaged: it does not tell which file beside it holds each tensor")
    return content


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
