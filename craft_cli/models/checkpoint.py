"""Base checkpoints in Hugging Face format: read single tensors from their shards.

Nothing here builds a model. A checkpoint is resolved once to a local folder, and everything, including transformers, reads
from this folder, so that all parts of a run use the same revision.
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
"""Default generation settings of a language model."""
CARD = "README.md"
"""The license of a base also applies to merged models."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weight files in the order in which transformers prefers them, each before its sharded form."""
CONFIG, ADAPTER = "config.json", "adapter_config.json"
MOST_LAYERS = 1024
"""Maximum number of layers: work grows with it, and the file may be untrusted."""
_MOST_LABELS = 1 << 20
_SIZES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_labels")
"""Sizes for which transformers allocates objects before it reads any weight."""


@dataclass(frozen=True)
class Checkpoint:
    """A local base checkpoint.

    Attributes:
        name: Hub id, absolute folder or `demo`.
        revision: commit of a Hub checkpoint.
        folder: the local folder.
        trusted: whether the user allows Python code in it to run.
    """

    name: str
    revision: str | None
    folder: Path
    trusted: bool = False

    def config(self) -> Any:
        """The `PretrainedConfig`.

        Raises:
            ModelError: config.json is damaged, or of a model type unknown to transformers.
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
            if "/" in str(content.get(name)) and not self.trusted:  # transformers would download and run it
                raise ModelError(f"{path}: {name} refers to code on the Hub, which runs only with --trust-remote-code")
        with told_in_one_line(str(path)):
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trusted)
        layers = getattr(config, "num_hidden_layers", 1)
        if not (type(layers) is int and 0 < layers <= MOST_LAYERS):
            raise ModelError(f"{path}: invalid number of layers: {quoted(layers)}")
        config.id2label = output_names(config.id2label)
        return config

    def tokenizer_files(self) -> list[Path]:
        """The files of the tokenizer, including its code if the user trusts it."""
        names = tokenizer_patterns(self.folder, trusted=self.trusted)
        return sorted(path for path in self.folder.iterdir() if path.is_file() and matches(path.name, names))

    def open(self) -> TensorReader:
        """A reader of its tensors by name."""
        return TensorReader(self)


class LazyMatrix:
    """A view into a stored weight, (d_out, d_in), whose rows are read when indexed."""

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
        """Prefetch the weight, because it is needed next."""
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
        """One lazily read matrix per view; a model with a head stores them under a prefix.

        Raises:
            ModelError: a weight is missing, ambiguous, or of an unsupported dtype.
        """
        found = []
        for view in views:
            wanted = f"{view.module}.weight"
            names = [name for name in self._file_of if name == wanted or name.endswith(f".{wanted}")]
            if len(names) != 1:
                problem = "no tensor" if not names else f"{len(names)} tensors named"
                raise ModelError(f"{self._checkpoint.name}: the checkpoint has {problem} {wanted}")
            stored = self._stored(names[0])
            if not view.fits(tuple(stored.shape)):
                raise ModelError(
                    f"{self._checkpoint.name}: {names[0]} is {tuple(stored.shape)} in the weights, which {CONFIG} contradicts"
                )
            found.append(LazyMatrix(stored, view))
        return found

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._file_of

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape of a tensor, without reading it."""
        stored = self._opened(self._file_of[name])
        if isinstance(stored, dict):
            return tuple(stored[name].shape), stored[name].dtype
        part = stored.get_slice(name)
        return tuple(part.get_shape()), part[tuple(slice(0, 0) for _ in part.get_shape())].dtype

    def read(self, name: str) -> Tensor:
        """Read a whole tensor. Its file is mapped only for this read, because read pages count as memory while a map is open."""
        file = self._file_of[name]
        if not file.endswith(".safetensors"):
            tensor: Tensor = self._opened(file)[name]
            return tensor
        from safetensors import safe_open

        with safe_open(self._checkpoint.folder / file, framework="pt") as stored:
            return cast(Tensor, stored.get_tensor(name))

    def names_in(self, file: str) -> list[str]:
        """The tensors in one of its files."""
        return [name for name, where in self._file_of.items() if where == file]

    def weight_files(self) -> list[Path]:
        """The files with the weights."""
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
                open(path, "rb").close()  # safetensors reports an unreadable file as missing
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
    """The label names of a head; LABEL_0, LABEL_1, ... if the configuration does not name all of them."""
    names = {number: str(name) for number, name in (id2label or {}).items() if isinstance(name, (str, int, float))}
    count = len(id2label or ()) or 2
    if sorted(names) != list(range(count)) or len(set(names.values())) != count:
        return {number: f"LABEL_{number}" for number in range(count)}
    return dict(sorted(names.items()))


def fingerprint(layers: Iterable[Any], dtype: torch.dtype | None = None) -> str:
    """The sha256 of the matrices (d_out, d_in) of a stack: dtype, shapes and bytes, layer by layer.

    Args:
        layers: lazily read matrices or tensors.
        dtype: convert to this dtype first, to compare a model loaded in a wider dtype with its checkpoint.
    """
    digest = hashlib.sha256()
    for layer in layers:
        weight = layer[:] if dtype is None else layer[:].to(dtype)
        digest.update(f"{weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(raw_bytes(weight))
    return digest.hexdigest()


def _unpickled(path: Path) -> Mapping[str, Tensor]:
    """Read the tensors of a pickled checkpoint, without unpickling other objects.

    Raises:
        ModelError: the file has other objects, or tensors larger than the file.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # unpickling can raise anything
        raise ModelError(f"{path} is damaged or truncated ({reason_of(error)})") from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} is damaged: it has no named tensors")
    size = path.stat().st_size
    for name, tensor in content.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)) or tensor.is_sparse or tensor.nbytes > size:
            raise ModelError(f"{path} is damaged: {quoted(name)} is not a tensor in the file")
    return content


def tokenizer_patterns(folder: Path, *, trusted: bool = False) -> tuple[str, ...]:
    """File names of a tokenizer: the usual ones, and those of its class in transformers."""
    import transformers

    try:
        name = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    except FileError:  # missing, or damaged, which loading reports
        name = None
    own = getattr(getattr(transformers, str(name), None), "vocab_files_names", None)
    code = ("*.py",) if trusted else ()
    return (*TOKENIZER_FILES, *(own.values() if isinstance(own, dict) else ()), *code)


def _weight_files(folder: Path) -> list[str]:
    """The names of all weight files of the checkpoint, whether they exist or not.

    Raises:
        ModelError: there are no weights.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [name]
        if (folder / f"{name}.index.json").is_file():
            return sorted(set(weight_map(folder / f"{name}.index.json").values()))
    raise ModelError(f"{folder} has no weights ({' or '.join(WEIGHTS)}, single or sharded)")


def weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, from the index of a sharded checkpoint.

    Raises:
        ModelError: the index is invalid, or names files outside the folder.
    """
    try:
        content = read_json(index).get("weight_map")
    except FileError as error:
        raise ModelError(str(error)) from error
    if not isinstance(content, dict) or any(
        not isinstance(file, str) or Path(file).name != file for file in content.values()
    ):
        raise ModelError(f"{index} is damaged: it does not map tensors to files in its folder")
    return content


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name matches one of these patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)
