"""The identity of a base: its weights, the settings that affect its outputs, and its tokenizer files.

Weights are hashed one tensor at a time, as float32 values, so that a checkpoint and a model loaded from it in a wider dtype
agree. The hashes of a large file are cached until the file changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from craft_cli.config import MERGED_KEY
from craft_cli.errors import FileError, ModelError
from craft_cli.files import cache_folder, quoted, raw_bytes, read_json, sha256_of, stamp, write_json
from craft_cli.models.checkpoint import Checkpoint, TensorReader
from craft_cli.models.loading import base_tensors, build_empty, is_language_model, outside_base, stored_names

_NOT_COMPUTED_WITH = {
    "architectures", "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id",
    "num_labels", "problem_type", "finetuning_task", "pad_token_id", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "auto_map", "attn_implementation", "quantization_config", "chunk_size_feed_forward", "torchscript",
    "gradient_checkpointing", "task_specific_params", MERGED_KEY,
}  # fmt: skip
"""Settings to ignore; labels and padding belong to the adapter."""

_POOLER = "weights of the pooler"
_LM_HEAD = "weights of the language model's head"
_KEPT_FROM = 1 << 24
"""Minimum size of a file to cache hashes for; smaller files are hashed in milliseconds."""


@dataclass(frozen=True)
class Base:
    """The identity of a base, by parts.

    Attributes:
        weights: sha256 of its embeddings, layers and so on; unknown parts are omitted.
        config: settings that affect the outputs.
        tokenizer: sha256 of every tokenizer file; None if unknown.
    """

    weights: Mapping[str, str]
    config: Mapping[str, Any]
    tokenizer: Mapping[str, str] | None = None

    def record(self) -> dict[str, Any]:
        """The record for adapter_config.json."""
        tokenizer = None if self.tokenizer is None else dict(self.tokenizer)
        return {"weights": dict(self.weights), "config": dict(self.config), "tokenizer": tokenizer}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Parse such a record."""
        return cls(record["weights"], record["config"], record["tokenizer"])

    def differences(self, now: Base, *, training: bool = False) -> list[str]:
        """The differences from another base, in parts known to both.

        Args:
            now: the other base.
            training: whether dropout settings matter.
        """
        found = [
            f"the {part} differ"
            for part in self.weights
            if part in now.weights and self.weights[part] != now.weights[part]
        ]
        for name in sorted(self.config.keys() | now.config.keys()):
            then, this = (
                quoted(config[name]) if name in config else "the default" for config in (self.config, now.config)
            )
            if then != this and (training or not _is_dropout(name)):
                found.append(f"{quoted(name)} of its configuration was {then}, is {this}")
        if self.tokenizer is not None and now.tokenizer is not None and self.tokenizer != now.tokenizer:
            names = sorted(
                name
                for name in self.tokenizer.keys() | now.tokenizer.keys()
                if self.tokenizer.get(name) != now.tokenizer.get(name)
            )
            found.append(f"its tokenizer differs ({', '.join(names)})")
        return found

    def check(self, now: Base, what: str, *, training: bool = False) -> None:
        """Refuse a different base.

        Raises:
            ModelError: the base differs; the message starts with `what`.
        """
        if found := self.differences(now, training=training):
            raise ModelError(
                f"{what} was trained on another base: {'; '.join(found[:5])}; pass the original base, or --allow-other-base"
            )


def base_of(checkpoint: Checkpoint, class_name: str = "AutoModel", cache_dir: str | Path | None = None) -> Base:
    """The identity of a base checkpoint.

    Args:
        checkpoint: the checkpoint; its head counts only for language models.
        class_name: class of the trained model, see `models.loading.model_class`.
        cache_dir: cache folder of the hashes. Default: `~/.cache/craft`.

    Raises:
        ModelError: the checkpoint is damaged.
    """
    stored = base_tensors(checkpoint, class_name)
    reader = checkpoint.open()
    hashes = _file_hashes(reader, cache_dir)
    weights = _weights((name, hashes[there]) for name, there in stored.items())
    with torch.device("meta"):
        empty = build_empty(checkpoint.config(), class_name, trusted=checkpoint.trusted)
    if is_language_model(empty):
        head = stored_names(reader.names(), outside_base(empty), f"{empty.base_model_prefix}.")
        weights |= _lm_head((name, hashes[there]) for name, there in head.items())
    return Base(weights, _computed_with(checkpoint.config()), _tokenizer(checkpoint))


def base_in(model: Any, dtype: torch.dtype, head: Iterable[str] = ()) -> Base:
    """The identity of the base in a loaded transformers model, without an adapter on it.

    The tokenizer is that of the folder it was loaded from; for a Hub model it is unknown.

    Args:
        model: a transformers model.
        dtype: dtype of the checkpoint; for a model in a narrower dtype, or quantized, only the configuration is known.
        head: names of the parameters that are trained in full; a pooler among them is not part of the base.
    """
    outside = {name: model.get_parameter(name).detach() for name in outside_base(model)}
    parameters = [
        (name, parameter.detach())
        for name, parameter in model.base_model.named_parameters()
        if not name.startswith("craft.") and (model.base_model is not model or name not in outside)
    ]
    of_the_base = is_language_model(model) and not set(outside) & set(head)
    rounded = any(torch.promote_types(tensor.dtype, dtype) != tensor.dtype for _, tensor in parameters)
    if rounded or getattr(model, "is_quantized", False):
        parameters, of_the_base = [], False
    folder = Path(str(model.name_or_path))
    tokenizer = _tokenizer(Checkpoint(str(folder), None, folder)) if folder.is_dir() else {}
    if any(_part(name) == _POOLER for name in head):
        parameters = [(name, tensor) for name, tensor in parameters if _part(name) != _POOLER]
    weights = _weights((name, _sha256(tensor)) for name, tensor in parameters)
    if of_the_base:
        weights |= _lm_head((name, _sha256(tensor)) for name, tensor in outside.items())
    return Base(weights, _computed_with(model.config), tokenizer or None)


def _tokenizer(checkpoint: Checkpoint) -> dict[str, str]:
    """The sha256 of every tokenizer file."""
    return {path.name: sha256_of(path) for path in checkpoint.tokenizer_files()}


def _weights(hashes: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A hash of the hashes of every part's tensors."""
    digests: dict[str, Any] = {}
    for name, value in sorted(hashes):
        digests.setdefault(_part(name), hashlib.sha256()).update(f"{name} {value}\n".encode())
    return {part: digest.hexdigest() for part, digest in digests.items()}


def _lm_head(hashes: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A hash of the hashes outside the base of a language model; empty if all of these are tied to it."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(hashes))
    return {_LM_HEAD: hashlib.sha256(lines.encode()).hexdigest()} if lines else {}


def _part(name: str) -> str:
    if "pooler." in name:
        return _POOLER
    if re.search(r"(^|\.)\d+\.", name):
        return "layers"
    return "embeddings" if "embed" in name or name.startswith(("wte.", "wpe.")) else "other weights"


def _sha256(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        tensor = tensor.float()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def _file_hashes(reader: TensorReader, cache_dir: str | Path | None) -> dict[str, str]:
    """The hash of every tensor of a checkpoint, computed once per file."""
    try:
        folder: Path | None = cache_folder(cache_dir) / "hashes"
    except FileError:  # no home directory: hashes are computed every time
        folder = None
    found: dict[str, str] = {}
    for path in reader.weight_files():
        key, mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16], stamp(path)
        names = reader.names_in(path.name)
        record = folder / f"{key}.json" if folder and path.stat().st_size >= _KEPT_FROM else None
        known = _known(record, mark) if record else {}
        if known.keys() != set(names):
            known = {name: _sha256(reader.read(name)) for name in names}
            with suppress(FileError):  # the cache only saves time
                if record:
                    write_json(record, {"stamp": mark, "sha256": known})
        found |= known
    return found


def _known(record: Path, mark: list[int]) -> dict[str, str]:
    """The cached hashes of a file, if it is unchanged."""
    with suppress(FileError):
        content = read_json(record)
        if content.get("stamp") == mark and isinstance(content.get("sha256"), dict):
            return dict(content["sha256"])
    return {}


def _computed_with(config: Any) -> dict[str, Any]:
    """Settings that affect the outputs, except those at their default, since later versions of transformers may add some."""
    plain = json.loads(json.dumps(config.to_dict(), default=str))
    try:
        usual = json.loads(json.dumps(type(config)().to_dict(), default=str))
    except Exception:  # a custom class that requires arguments
        usual = {}
    return {
        name: value
        for name, value in plain.items()
        if name not in _NOT_COMPUTED_WITH and not (name in usual and usual[name] == value)
    }


def _is_dropout(name: str) -> bool:
    return "drop" in name
