"""The weights that an adapter changes: the matrices of all layers of each projection, with their origin.

`Weights` come from a checkpoint, read lazily, or from a loaded model. A method stores their `Origin`, by which the base is
recognized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import torch

from craft_cli.errors import ModelError
from craft_cli.models.checkpoint import Checkpoint, LazyMatrix, fingerprint
from craft_cli.models.families import check_targets, layer_views
from craft_cli.models.hub import resolve
from craft_cli.models.quantization import dense_weight, kind_of
from craft_cli.tucker import Matrix, stack_shape

DTYPES = ("float64", "float32", "float16", "bfloat16")
Shape = tuple[int, int, int]
"""Shape (L, d_out, d_in) of a stack."""


@dataclass(frozen=True, eq=False)
class Origin:
    """The origin of weights.

    Attributes:
        model: Hub id, folder or `demo`, as given.
        revision: commit of a Hub model.
        model_type: model family.
        dtype: dtype of the weights, such as `float32`.
        fingerprints: sha256 of every projection's stack.
    """

    model: str
    revision: str | None
    model_type: str
    dtype: str
    fingerprints: Mapping[str, str]

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections."""
        return tuple(self.fingerprints)

    def origin(self) -> dict[str, Any]:
        """The fields by name, to build another origin of the same weights."""
        return {field.name: getattr(self, field.name) for field in fields(Origin)}

    def identity(self) -> dict[str, Any]:
        """The entries for file headers."""
        return {
            "model": self.model,
            "revision": self.revision,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "sha256": dict(self.fingerprints),
        }


@dataclass(frozen=True, eq=False)
class Weights(Origin):
    """The stacked weights of some projections.

    Attributes:
        stacks: L matrices (d_out, d_in) per projection, read when indexed.
    """

    stacks: Mapping[str, Sequence[Matrix]]

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shape (L, d_out, d_in) of every stack."""
        return {target: stack_shape(stack) for target, stack in self.stacks.items()}


def read_identity(header: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the fields of an `Origin` from an untrusted file header.

    Raises:
        KeyError: an entry is missing.
        ValueError: an entry is invalid.
    """
    targets, prints = header["targets"], header["sha256"]
    if not (isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets)):
        raise ValueError("its header names no projections")
    if len(set(targets)) != len(targets) or not all(re.fullmatch(r"[a-z_]{1,32}", target) for target in targets):
        raise ValueError("its header names invalid projections")
    if not (isinstance(prints, dict) and all(re.fullmatch(r"[0-9a-f]{64}", str(prints[target])) for target in targets)):
        raise ValueError("its header has no sha256 of the weights")
    for name in ("model", "model_type", "dtype"):
        if not (isinstance(header[name], str) and header[name].isprintable()):
            raise ValueError(f"its header's {name} is not a line of text")
    if not (header["revision"] is None or (isinstance(header["revision"], str) and header["revision"].isprintable())):
        raise ValueError("its header's revision is not a line of text")
    if header["dtype"] not in DTYPES:
        raise ValueError("its header names no valid dtype")
    told = {name: header[name] for name in ("model", "revision", "model_type", "dtype")}
    return told | {"fingerprints": {target: prints[target] for target in targets}}


def find_checkpoint(
    model: str, targets: Sequence[str], revision: str | None = None, *, trust_remote_code: bool = False
) -> Checkpoint:
    """Resolve a checkpoint, with only the files of these projections.

    Args:
        model: Hub id, folder or `demo`.
        targets: projections.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: whether Python code in the checkpoint may run.

    Raises:
        ConfigError: a target is unknown.
        ModelError: the checkpoint is missing, damaged or of an unsupported family.
    """
    check_targets(targets)
    return resolve(
        model,
        revision,
        only=lambda config: [view for layers in layer_views(config, targets).values() for view in layers],
        trust_remote_code=trust_remote_code,
    )


def read_stacks(checkpoint: Checkpoint, config: Any, targets: Sequence[str]) -> dict[str, list[LazyMatrix]]:
    """The stacked weight of every target as L lazily read matrices (d_out, d_in).

    Raises:
        ModelError: a tensor is missing or layers differ in shape, or the family is unsupported.
    """
    all_views = layer_views(config, targets)
    reader = checkpoint.open()
    stacks = {}
    for target, views in all_views.items():
        stacks[target] = reader.matrices(views)
        try:
            stack_shape(stacks[target])
        except ValueError as error:
            raise ModelError(f"{checkpoint.name}: {target}: {error}") from error
    return stacks


def read_weights(checkpoint: Checkpoint, targets: Sequence[str]) -> Weights:
    """The weights of these projections in a checkpoint.

    Raises:
        ConfigError: a target is unknown.
        ModelError: a tensor is missing or layers differ in shape, or the family is unsupported.
    """
    config = checkpoint.config()
    stacks = read_stacks(checkpoint, config, targets)
    return _weights(checkpoint.name, checkpoint.revision, config.model_type, stacks)


def weights_in(model: Any, targets: Sequence[str]) -> Weights:
    """The weights of these projections in a loaded transformers model.

    They keep the name that the model was loaded by, so that its checkpoint can be found.

    Raises:
        ConfigError: a target is unknown.
        ModelError: the family is unsupported, or the model is quantized.
    """
    stacks: dict[str, list[torch.Tensor]] = {}
    for target, views in layer_views(model.config, targets).items():
        modules = [view.module_of(model.base_model) for view in views]
        if any(kind_of(module) for module in modules):
            raise ModelError("the weights of a quantized model are rounded; prepare the method from its checkpoint")
        stacks[target] = [view.read(dense_weight(module)).cpu() for view, module in zip(views, modules, strict=True)]
    revision = getattr(model.config, "_commit_hash", None)
    return _weights(model.name_or_path, revision, model.config.model_type, stacks)


def _weights(name: str, revision: str | None, model_type: str, stacks: Mapping[str, Sequence[Matrix]]) -> Weights:
    dtypes = [layer[0:1].dtype for stack in stacks.values() for layer in stack]
    dtype = reduce(torch.promote_types, dtypes)  # a checkpoint may hold several; this one holds all values
    return Weights(
        model=name,
        revision=revision,
        model_type=model_type,
        dtype=str(dtype).removeprefix("torch."),
        fingerprints={target: fingerprint(stack, dtype) for target, stack in stacks.items()},
        stacks=stacks,
    )
