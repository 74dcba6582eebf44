"""The frozen tensors that a method keeps of the base's weights, and how it recognizes these weights.

`Sketch` is for methods that keep no tensors of the base: a few random projections of each layer identify the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from craft_cli.errors import ConfigError, ModelError
from craft_cli.files import entries_of
from craft_cli.models.checkpoint import MOST_LAYERS, fingerprint
from craft_cli.models.quantization import TOLERANCE, dense_weight, kind_of
from craft_cli.models.stacks import Origin, Shape, Weights, read_identity
from craft_cli.models.views import View
from craft_cli.tucker import Matrix


class Frozen(Origin, ABC):
    """The frozen tensors of a method, and the origin of their weights."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, Shape]:
        """Shape (L, d_out, d_in) of every projection's stack."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The frozen tensors, by their names in an adapter's file."""

    @abstractmethod
    def resembles(self, target: str, layers: Sequence[Tensor], tolerance: float) -> bool:
        """Whether L matrices (d_out, d_in) are the weights of this origin, up to rounding when they were loaded.

        Args:
            target: the projection.
            layers: matrices of the expected shapes, of any floating-point dtype.
            tolerance: allowed relative error.
        """

    def check_targets(self, targets: Sequence[str]) -> None:
        """Refuse projections that were not prepared.

        Raises:
            ConfigError: a projection was not prepared.
        """
        missing = [target for target in targets if target not in self.targets]
        if missing:
            raise ConfigError(f"prepared only for {', '.join(self.targets)}, not for {', '.join(missing)}")

    def spectra(self, target: str) -> Mapping[str, tuple[Tensor, int]]:
        """Singular values of a projection, descending, and the number kept, by mode; empty if the method has none."""
        return {}

    def __repr__(self) -> str:
        """One line with the model and the shapes."""
        stacks = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes.items())
        return f"<{type(self).__name__} of {self.model}: {stacks}>"

    def sha256(self) -> str | None:
        """The sha256 by which an adapter can refer to these tensors; None if they cannot be referred to."""
        return None


NUMBERS = 16
"""Random projections per layer. Those of 24 layers distinguish weights at any tolerance that loading needs."""
MOST = 1 << 24
"""Upper bound of a stack's dimensions; it limits the work that an untrusted file can cause."""


def sketch(layers: Sequence[Matrix] | Sequence[Tensor]) -> Tensor:
    """a_k^T W_l b_k of every layer W_l (d_out, d_in) for fixed random unit vectors, (L, NUMBERS), float32.

    The relative rounding error is about the same as that of the weights.
    """
    d_out, d_in = layers[0].shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(NUMBERS, size, generator=generator, dtype=torch.float64) for size in (d_out, d_in))
    a, b = a / d_out**0.5, b / d_in**0.5  # (NUMBERS, d_out), (NUMBERS, d_in)
    rows = []
    for layer in layers:
        weight = layer[:].to("cpu", torch.float64)
        rows.append((a @ weight * b).sum(1))
    return torch.stack(rows).float()


def sketches(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """A few numbers per tensor, by which another machine recognizes it; see `sketch`."""
    return {name: sketch([tensor.reshape(-1, tensor.shape[-1])])[0].tolist() for name, tensor in tensors.items()}


def alike(tensors: Mapping[str, Tensor], known: Mapping[str, Sequence[float]]) -> bool:
    """Whether tensors have these sketches, up to rounding; signs and order matter."""
    mine = sketches(tensors)
    if mine.keys() != known.keys() or any(len(known[name]) != NUMBERS for name in mine):
        return False
    pairs = [(torch.tensor(mine[name]), torch.tensor(known[name])) for name in mine]
    return all((one - other).norm() <= 1e-5 * other.norm() for one, other in pairs)


@dataclass(frozen=True, eq=False, repr=False)
class Sketch(Frozen):
    """The identity of the weights and their sketches.

    Attributes:
        sizes: shape (L, d_out, d_in) of every projection's stack.
        sketches: sketch (L, NUMBERS) of every projection.
    """

    sizes: Mapping[str, Shape]
    sketches: Mapping[str, Tensor]

    @classmethod
    def of(cls, weights: Weights) -> Self:
        """Compute the sketches of weights."""
        return cls(
            **weights.origin(),
            sizes=weights.shapes,
            sketches={name: sketch(stack) for name, stack in weights.stacks.items()},
        )

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> Self:
        """Read the sketches from an adapter's file, which may come from an untrusted source.

        Raises:
            FileError: an entry is missing or invalid.
        """
        with entries_of(path):
            identity = read_identity(header)
            sizes, sketches = {}, {}
            for target in header["targets"]:
                size, stored = header["shapes"][target], tensors[f"{target}.sketch"]
                if len(size) != 3 or not all(type(n) is int and 0 < n < MOST for n in size):
                    raise ValueError(f"{target} has an invalid shape")
                if size[0] > MOST_LAYERS:
                    raise ValueError(f"{target} has {size[0]} layers, more than {MOST_LAYERS}")
                if tuple(stored.shape) != (size[0], NUMBERS) or stored.dtype != torch.float32:
                    raise ValueError(f"{target}.sketch is {stored.dtype} {tuple(stored.shape)}")
                sizes[target], sketches[target] = (size[0], size[1], size[2]), stored
        return cls(**identity, sizes=sizes, sketches=sketches)

    def select(self, targets: Sequence[str]) -> Sketch:
        """Select projections.

        Raises:
            ConfigError: a projection was not prepared.
        """
        self.check_targets(targets)
        return replace(
            self,
            fingerprints={target: self.fingerprints[target] for target in targets},
            sizes={target: self.sizes[target] for target in targets},
            sketches={target: self.sketches[target] for target in targets},
        )

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape (L, d_out, d_in) of every projection's stack."""
        return self.sizes

    def tensors(self) -> dict[str, Tensor]:
        """The sketches, by their names in an adapter's file."""
        return {f"{target}.sketch": tensor for target, tensor in self.sketches.items()}

    def identity(self) -> dict[str, Any]:
        """The entries for the header of an adapter's file."""
        return super().identity() | {"shapes": {target: list(size) for target, size in self.sizes.items()}}

    def resembles(self, target: str, layers: Sequence[Tensor], tolerance: float) -> bool:
        """See `Frozen`."""
        expected = self.sketches[target]
        return bool((sketch(layers) - expected).norm() <= tolerance * expected.norm())


def check_base(model: Any, frozen: Frozen, views: Mapping[str, Sequence[View]], *, allow_other: bool = False) -> None:
    """Refuse a model whose weights differ from the prepared ones, because the trained parameters belong to these.

    With `allow_other`, only the shapes must be the same.

    The sha256 is compared in the dtype of the checkpoint, to which a model loaded in a wider dtype converts exactly. A
    model loaded in a narrower dtype, or quantized, is rounded, so its weights must agree within that precision.

    Raises:
        ModelError: the weights differ.
    """
    checkpoint_dtype = getattr(torch, frozen.dtype)
    for target, shape in frozen.shapes.items():
        try:
            modules = [view.module_of(model.base_model) for view in views[target]]
            weights = [dense_weight(module) for module in modules]
        except AttributeError as error:
            raise ModelError(f"this model does not have the projection '{target}' of its family: {error}") from error
        layers = [view.read(weight) for view, weight in zip(views[target], weights, strict=True)]
        same_shape = (len(layers), *layers[0].shape) == shape
        kind = kind_of(modules[0])
        if allow_other:
            same = same_shape
        elif kind:
            same = same_shape and frozen.resembles(target, layers, TOLERANCE[kind])
        elif same_shape and torch.promote_types(layers[0].dtype, checkpoint_dtype) == layers[0].dtype:
            same = fingerprint(layers, checkpoint_dtype) == frozen.fingerprints[target]
        else:
            same = same_shape and frozen.resembles(target, layers, torch.finfo(layers[0].dtype).eps)
        if not same:
            raise ModelError(
                f"the weights of this model ({target}) differ from those of {frozen.model}, which the "
                "adapter belongs to"
            )
