"""Which base it is: all its weights, the settings that change what it computes, and the files of its tokenizer.

Weights are hashed one tensor at a time, by their values in float32, so that a checkpoint and a model loaded from it in a
wider dtype agree. The hashes of a large file are kept in the cache folder for as long as the file stays what it is.
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
"""Of a configuration; labels and padding are the adapter's own."""

_POOLER = "weights of the pooler"
_LM_HEAD = "weights of the language model's head"
_KEPT_FROM = 1 << 24
"""Bytes of a file whose hashes are kept: smaller ones are hashed in milliseconds."""


@dataclass(frozen=True)
class Base:
    """A base by its parts.

    Attributes:
        weights: sha256 of its embeddings, its layers and so on; of what is not known nothing.
        config: settings that change what is computed.
        tokenizer: sha256 of every file of its tokenizer; None where that is not known.
    """

    weights: Mapping[str, str]
    config: Mapping[str, Any]
    tokenizer: Mapping[str, str] | None = None

    def record(self) -> dict[str, Any]:
        """For adapter_config.json."""
        tokenizer = None if self.tokenizer is None else dict(self.tokenizer)
        return {"weights": dict(self.weights), "config": dict(self.config), "tokenizer": tokenizer}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Out of such a record."""
        return cls(record["weights"], record["config"], record["tokenizer"])

    def differences(self, now: Base, *, training: bool = False) -> list[str]:
        """What of another base is not as it is here, where both know it.

        Args:
            now: the other one.
            training: whether dropout matters.
        """
        found = [
            f"the {part} differ"
            for part in self.weights
            if part in now.weights and self.weights[part] != now.weights[part]
        ]
        for name in sorted(self.config.keys() | now.config.keys()):
            then, this = self.config.get(name), now.config.get(name)
            if then != this and (training or not _is_dropout(name)):
                found.append(f"{quoted(name)} of its configuration was {quoted(then)}, is {quoted(this)}")
        if self.tokenizer is not None and now.tokenizer is not None and self.tokenizer != now.tokenizer:
            names = sorted(
                name
                for name in self.tokenizer.keys() | now.tokenizer.keys()
                if self.tokenizer.get(name) != now.tokenizer.get(name)
            )
            found.append(f"its tokenizer differs ({', '.join(names)})")
        return found

    def check(self, now: Base, what: str, *, training: bool = False) -> None:
        """Refuse another base.

        Raises:
            ModelError: it differs; `what` is what needs it.
        """
        if found := self.differences(now, training=training):
            raise ModelError(
                f"{what} was trained on another base: {'; '.join(found[:5])}; give the former base, or --allow-other-base"
            )


def base_of(checkpoint: Checkpoint, class_name: str = "AutoModel", cache_dir: str | Path | None = None) -> Base:
    """The base that a checkpoint is.

    Args:
        checkpoint: with or without a head, which counts of a language model only.
        class_name: of the model that is trained, see `models.loading.model_class`.
        cache_dir: where hashes of files are kept; `~/.cache/craft` without.

    Raises:
        ModelError: it is damaged.
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
    """The base in a transformers model in memory, an adapter on it left out.

    Its tokenizer is the one in the folder that it was loaded from; of a hub model it is not known.

    Args:
        model: of transformers.
        dtype: of the checkpoint: of a model in a narrower one, or quantised, only the configuration is known.
        head: names of the parameters that are trained in full; a pooler among them is no part of the base.
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
    """The sha256 of every file of the tokenizer."""
    return {path.name: sha256_of(path) for path in checkpoint.tokenizer_files()}


def _weights(hashes: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A hash of the hashes of every part's tensors."""
    digests: dict[str, Any] = {}
    for name, value in sorted(hashes):
        digests.setdefault(_part(name), hashlib.sha256()).update(f"{name} {value}\n".encode())
    return {part: digest.hexdigest() for part, digest in digests.items()}


def _lm_head(hashes: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A hash of the hashes of what a language model has outside of its base; nothing where all of that is tied to it."""
    told = "".join(f"{name} {value}\n" for name, value in sorted(hashes))
    return {_LM_HEAD: hashlib.sha256(told.encode()).hexdigest()} if told else {}


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
    """The hash of every tensor in the files of a checkpoint, computed once for each file."""
    try:
        folder: Path | None = cache_folder(cache_dir) / "hashes"
    except FileError:  # a user without a home: they are computed each time
        folder = None
    found: dict[str, str] = {}
    for path in reader.weight_files():
        key, mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16], stamp(path)
        names = reader.names_in(path.name)
        record = folder / f"{key}.json" if folder and path.stat().st_size >= _KEPT_FROM else None
        known = _known(record, mark) if record else {}
        if known.keys() != set(names):
            known = {name: _sha256(reader.read(name)) for name in names}
            with suppress(FileError):  # they are only kept to save time
                if record:
                    write_json(record, {"stamp": mark, "sha256": known})
        found |= known
    return found


def _known(record: Path, mark: list[int]) -> dict[str, str]:
    """The hashes kept of a file, where it has not changed since."""
    with suppress(FileError):
        content = read_json(record)
        if content.get("stamp") == mark and isinstance(content.get("sha256"), dict):
            return dict(content["sha256"])
    return {}


def _computed_with(config: Any) -> dict[str, Any]:
    """Settings that change what is computed, but those at their default: a later transformers may add some."""
    plain = json.loads(json.dumps(config.to_dict(), default=str))
    try:
        usual = json.loads(json.dumps(type(config)().to_dict(), default=str))
    except Exception:  # a class of its own that needs to be told something
        usual = {}
    return {
        name: value
        for name, value in plain.items()
        if name not in _NOT_COMPUTED_WITH and not (name in usual and usual[name] == value)
    }


def _is_dropout(name: str) -> bool:
    return "drop" in name
