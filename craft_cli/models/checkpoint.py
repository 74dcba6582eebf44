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
from typing import Any, cast

import torch
from torch import Tensor

from craft_cli.errors import FileError, ModelError
from craft_cli.files import quoted, raw_bytes, read_json, reason_of
from craft_cli.models.damage import told_in_one_line
from craft_cli.models.shards import StoredTensor, stored_tensors
from craft_cli.models.views import View

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
TOKENIZER_FILES = (
    *VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*",
)  # fmt: skip
GENERATION, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
"""How a language model answers where nothing else is asked for."""
CARD = "README.md"
"""Its licence is that of what is made of it."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In the order in which transformers takes them, each before the shards of which an .index.json tells."""
CONFIG, ADAPTER = "config.json", "adapter_config.json"
MOST_LAYERS = 1024
"""No model has as many; what is computed from a stranger's file grows with them."""
_MOST_LABELS = 1 << 20
_SIZES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_labels")
"""Of these, transformers makes something for each before it looks at any weight."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    Attributes:
        name: hub id, absolute folder or `demo`; finds it again from anywhere.
        revision: commit of a hub checkpoint.
        folder: where its files lie.
        trusted: whether the user lets Python code in it run.
    """

    name: str
    revision: str | None
    folder: Path
    trusted: bool = False

    def config(self) -> Any:
        """Its `PretrainedConfig`.

        Raises:
            ModelError: config.json is damaged or of a type transformers does not know.
        """
        from transformers import AutoConfig

        path = self.folder / CONFIG
        try:
            content = read_json(path)
        except FileError as error:
            raise ModelError(str(error)) from error
        for name in _SIZES:
            size = content.get(name, 1)
            if not (type(size) is int and 0 < size <= _MOST_LABELS):
                raise ModelError(f"{path}: {name} cannot be {quoted(size)}")
        for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            if "/" in str(content.get(name)) and not self.trusted:  # transformers would fetch and run it
                raise ModelError(f"{path}: {name} names code on the hub, which runs only with --trust-remote-code")
        with told_in_one_line(str(path)):
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trusted)
        layers = getattr(config, "num_hidden_layers", 1)
        if not (type(layers) is int and 0 < layers <= MOST_LAYERS):
            raise ModelError(f"{path}: no model has {quoted(layers)} layers")
        config.id2label = output_names(config.id2label)
        return config

    def tokenizer_files(self) -> list[Path]:
        """The files a tokenizer is made of; of one that the user trusts, its code too."""
        names = tokenizer_patterns(self.folder, trusted=self.trusted)
        return sorted(path for path in self.folder.iterdir() if path.is_file() and matches(path.name, names))

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
            stored = self._stored(names[0])
            if not view.fits(tuple(stored.shape)):
                raise ModelError(
                    f"{self._checkpoint.name}: {names[0]} is {tuple(stored.shape)} in the weights, which {CONFIG} contradicts"
                )
            found.append(LazyMatrix(stored, view))
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

    def names_in(self, file: str) -> list[str]:
        """Of the tensors in one of its files."""
        return [name for name, where in self._file_of.items() if where == file]

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
                open(path, "rb").close()  # safetensors says "no such file" of one that may not be read
            except OSError as error:
                raise ModelError(f"cannot read {path}: {error.strerror}") from error
            if file.endswith(".safetensors"):
                try:
                    self._open[file] = safe_open(path, framework="pt")
                except (OSError, SafetensorError) as error:
                    raise ModelError(f"{path} is damaged or truncated ({reason_of(error)})") from error
            else:
                self._open[file] = _unpickled(path)
        return self._open[file]


def output_names(id2label: Mapping[int, Any] | None) -> dict[int, str]:
    """The names of a head's outputs as text; LABEL_0, LABEL_1, ... where a configuration does not name each of them."""
    names = {number: str(name) for number, name in (id2label or {}).items() if isinstance(name, (str, int, float))}
    count = len(id2label or ()) or 2
    if sorted(names) != list(range(count)) or len(set(names.values())) != count:
        return {number: f"LABEL_{number}" for number in range(count)}
    return dict(sorted(names.items()))


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


def _unpickled(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a pickled checkpoint; nothing else is unpickled.

    Raises:
        ModelError: it holds anything else, or tensors larger than the file.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a pickle may fail in any way
        raise ModelError(f"{path} is damaged or truncated ({reason_of(error)})") from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} is damaged: it holds no tensors by name")
    size = path.stat().st_size
    for name, tensor in content.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)) or tensor.is_sparse or tensor.nbytes > size:
            raise ModelError(f"{path} is damaged: {quoted(name)} is no tensor that it holds")
    return content


def tokenizer_patterns(folder: Path, *, trusted: bool = False) -> tuple[str, ...]:
    """How the files of a tokenizer are called: as usual, or as its class in transformers calls them."""
    import transformers

    try:
        name = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    except FileError:  # without one, or with a damaged one that loading tells of
        name = None
    own = getattr(getattr(transformers, str(name), None), "vocab_files_names", None)
    code = ("*.py",) if trusted else ()
    return (*TOKENIZER_FILES, *(own.values() if isinstance(own, dict) else ()), *code)


def _weight_files(folder: Path) -> list[str]:
    """The names of all weight files that belong to the checkpoint, present or not.

    Raises:
        ModelError: there are none.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [name]
        if (folder / f"{name}.index.json").is_file():
            return sorted(set(weight_map(folder / f"{name}.index.json").values()))
    raise ModelError(f"{folder} holds no weights ({' or '.join(WEIGHTS)}, single or sharded)")


def weight_map(index: Path) -> dict[str, str]:
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


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name is one of these patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)
