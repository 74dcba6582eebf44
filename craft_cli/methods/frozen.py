"""What a method keeps of the base's weights, and by what it knows them again.

`Sketch` is for methods that keep no tensor of the base: its weights, recognised by a few random projections of each layer.
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
    """What a method keeps of the base's weights, and which weights they are."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, Shape]:
        """(L, d_out, d_in) of every projection's stack."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is frozen, by the names in an adapter's file."""

    @abstractmethod
    def resembles(self, target: str, layers: Sequence[Tensor], tolerance: float) -> bool:
        """Whether L matrices (d_out, d_in) are the weights of this origin, rounded by loading them.

        Args:
            target: the projection.
            layers: in any floating-point dtype, of the shapes expected.
            tolerance: relative error allowed.
        """

    def check_targets(self, targets: Sequence[str]) -> None:
        """Refuse projections that were not prepared.

        Raises:
            ConfigError: one is not here.
        """
        missing = [target for target in targets if target not in self.targets]
        if missing:
            raise ConfigError(f"this was prepared for {', '.join(self.targets)}, not for {', '.join(missing)}")

    def spectra(self, target: str) -> Mapping[str, tuple[Tensor, int]]:
        """Singular values of a projection, descending, and how many are kept, by the name of a mode; none without."""
        return {}

    def __repr__(self) -> str:
        """One line: whose weights, and of what size."""
        stacks = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes.items())
        return f"<{type(self).__name__} of {self.model}: {stacks}>"

    def sha256(self) -> str | None:
        """Of what an adapter may refer to instead of including it; None where there is nothing of that kind."""
        return None


NUMBERS = 16
"""Of each layer; 24 layers of these tell weights from others at any tolerance that loading needs."""
MOST = 1 << 24
"""A dimension that no stack has: what is computed from a stranger's file grows with it."""


def sketch(layers: Sequence[Matrix] | Sequence[Tensor]) -> Tensor:
    """a_k^T W_l b_k of every layer W_l (d_out, d_in) for fixed random unit vectors, (L, NUMBERS), float32.

    Rounding moves it, relative to its own size, about as much as it moves the weights.
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
    """A few numbers of every tensor, by which another machine knows it again: see `sketch`."""
    return {name: sketch([tensor.reshape(-1, tensor.shape[-1])])[0].tolist() for name, tensor in tensors.items()}


def alike(tensors: Mapping[str, Tensor], known: Mapping[str, Sequence[float]]) -> bool:
    """Whether tensors are those that some sketches were made of, but for rounding; a sign or an order matters."""
    found = sketches(tensors)
    if found.keys() != known.keys() or any(len(known[name]) != NUMBERS for name in found):
        return False
    pairs = [(torch.tensor(found[name]), torch.tensor(known[name])) for name in found]
    return all((mine - theirs).norm() <= 1e-5 * theirs.norm() for mine, theirs in pairs)


@dataclass(frozen=True, eq=False, repr=False)
class Sketch(Frozen):
    """The identity of the weights and their sketches.

    Attributes:
        sizes: (L, d_out, d_in) of every projection's stack.
        sketches: (L, NUMBERS) of every projection.
    """

    sizes: Mapping[str, Shape]
    sketches: Mapping[str, Tensor]

    @classmethod
    def of(cls, weights: Weights) -> Self:
        """Of weights at hand."""
        return cls(
            **weights.origin(),
            sizes=weights.shapes,
            sketches={name: sketch(stack) for name, stack in weights.stacks.items()},
        )

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> Self:
        """Out of an adapter's file; nothing in it is believed.

        Raises:
            FileError: an entry is missing or of the wrong kind.
        """
        with entries_of(path):
            identity = read_identity(header)
            sizes, sketches = {}, {}
            for target in header["targets"]:
                size, found = header["shapes"][target], tensors[f"{target}.sketch"]
                if len(size) != 3 or not all(type(n) is int and 0 < n < MOST for n in size):
                    raise ValueError(f"{target} is of no size")
                if size[0] > MOST_LAYERS:
                    raise ValueError(f"{target} has {size[0]} layers, more than {MOST_LAYERS}")
                if tuple(found.shape) != (size[0], NUMBERS) or found.dtype != torch.float32:
                    raise ValueError(f"{target}.sketch is {found.dtype} {tuple(found.shape)}")
                sizes[target], sketches[target] = (size[0], size[1], size[2]), found
        return cls(**identity, sizes=sizes, sketches=sketches)

    def select(self, targets: Sequence[str]) -> Sketch:
        """Only these projections.

        Raises:
            ConfigError: one is not here.
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
        """(L, d_out, d_in) of every projection's stack."""
        return self.sizes

    def tensors(self) -> dict[str, Tensor]:
        """The sketches, by their names in an adapter's file."""
        return {f"{target}.sketch": tensor for target, tensor in self.sketches.items()}

    def identity(self) -> dict[str, Any]:
        """For the header of an adapter's file."""
        return super().identity() | {"shapes": {target: list(size) for target, size in self.sizes.items()}}

    def resembles(self, target: str, layers: Sequence[Tensor], tolerance: float) -> bool:
        """See `Frozen`."""
        expected = self.sketches[target]
        return bool((sketch(layers) - expected).norm() <= tolerance * expected.norm())


def check_base(model: Any, frozen: Frozen, views: Mapping[str, Sequence[View]], *, allow_other: bool = False) -> None:
    """Refuse a model with other weights than those that a method prepared: what was trained belongs to these.

    With `allow_other` only their shapes must be the same.

    The sha256 is compared in the dtype of the checkpoint, which a model loaded in a wider one converts to exactly. A
    model loaded in a narrower dtype or quantised is rounded, so there its weights must resemble them to that precision.

    Raises:
        ModelError: other weights.
    """
    checkpoint_dtype = getattr(torch, frozen.dtype)
    for target, shape in frozen.shapes.items():
        try:
            modules = [view.module_of(model.base_model) for view in views[target]]
            weights = [dense_weight(module) for module in modules]
        except AttributeError as error:
            raise ModelError(f"this model has no projection '{target}' where its family keeps it: {error}") from error
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
                f"this model has other weights ({target}) than {frozen.model}, whose weights were prepared for the adapter"
            )
