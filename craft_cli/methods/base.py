"""The base class of adapter methods. A method is a way to write the change dW_l of each adapted weight.

A change is a *chain* of matrices per layer, (d_in, r) ... (r, d_out), whose product is dW_l^T. A forward adds x @ chain
to the layer's output, merging adds the product to the weight, and a chain of low rank is exported as a LoRA. Norms and
cosines are computed from it. Hooks, merging, export, files and training use chains and are independent of the method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from craft_cli.config import flag, option_names
from craft_cli.errors import ConfigError, FileError
from craft_cli.methods.frozen import Frozen, Sketch
from craft_cli.models.cards import Description
from craft_cli.models.stacks import Shape, Weights

Chain = tuple[Tensor, ...]
"""Matrices (d_in, r), ..., (r, d_out), whose product is dW_l^T."""

Progress = Callable[[str, int, int], None]
"""Called with (description, done, total)."""


def delta(chain: Chain) -> Tensor:
    """The dense dW_l (d_out, d_in)."""
    product: Tensor = reduce(torch.matmul, chain)
    return product.T


def low_rank(chain: Chain) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) with B A = dW_l, split where the chain is narrowest."""
    if len(chain) == 1:
        return torch.eye(len(chain[0]), dtype=chain[0].dtype), chain[0].T
    narrowest = min(range(1, len(chain)), key=lambda place: chain[place].shape[0])
    return delta(chain[:narrowest]), delta(chain[narrowest:])


def singular_values(chains: Iterable[Chain]) -> Iterator[Tensor]:
    """The singular values of each dW_l, descending; zeros that follow from the low rank may be omitted.

    With M_1 = Q R and M_k^T = Q' R' they are those of R M_2 ... M_k-1 R'^T. R and R' are reused while the ends are the
    same tensors, since layers share them in some methods.
    """
    ends: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for chain in chains:
        if len(chain) == 1:  # dense
            yield torch.linalg.svdvals(chain[0])
            continue
        if ends is None or ends[0] is not chain[0] or ends[1] is not chain[-1]:
            ends = chain[0], chain[-1], torch.linalg.qr(chain[0]).R, torch.linalg.qr(chain[-1].T).R
        *_, left, right = ends
        yield torch.linalg.svdvals(reduce(torch.matmul, (left, *chain[1:-1], right.T)))


def effective_rank(values: Tensor) -> float:
    """The effective rank, exp of the entropy of the singular values' shares (Roy and Vetterli 2007); 0 of zero."""
    if not values.any():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def inner(one: Chain, other: Chain) -> float:
    """<dW, dW'> of two changes of the same shape, without forming either as a dense matrix."""
    return next(inners([(one, other)]))


def inners(pairs: Iterable[tuple[Chain, Chain]]) -> Iterator[float]:
    """<dW, dW'> of each pair of changes.

    With dW^T = M_1 ... M_k and dW'^T = N_1 ... N_j, it is

        tr( (M_1^T N_1) (N_2 ... N_j-1) (N_j M_k^T) (M_2 ... M_k-1)^T )

    The products of the ends are reused while the ends are the same tensors, since layers share them in some methods.
    """
    ends: tuple[Chain, Tensor, Tensor] | None = None
    for one, other in pairs:
        if len(one) == 1 or len(other) == 1:  # dense
            yield float((delta(one) * delta(other)).sum())
            continue
        these = (one[0], one[-1], other[0], other[-1])
        if ends is None or any(mine is not theirs for mine, theirs in zip(these, ends[0], strict=True)):
            ends = these, one[0].T @ other[0], other[-1] @ one[-1].T  # (r, r'), (r', r)
        _, left, right = ends
        yield float((reduce(torch.matmul, (left, *other[1:-1])) * reduce(torch.matmul, (*one[1:-1], right.T))).sum())


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {value}"


class Change(nn.Module, ABC):
    """The change of all adapted projections, as one module; each trained parameter has one name.

    Attributes:
        shapes: shape (L, d_out, d_in) of every changed projection's stack.
        dropout: dropout probability of the input of the chain, in training only.
    """

    shapes: Mapping[str, Shape]
    dropout: float = 0.0

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by their names in an adapter's file."""
        return dict(self.named_parameters())

    @torch.no_grad()
    def load(self, trained: Mapping[str, Tensor]) -> None:
        """Load the values that `trained` returned."""
        for name, parameter in self.trained().items():
            parameter.copy_(trained[name])

    @abstractmethod
    def chains(self, projection: str, dtype: torch.dtype | None = None) -> Sequence[Chain]:
        """The chain of every layer, from the current parameters; shared parts are computed once.

        Args:
            projection: one of `shapes`.
            dtype: dtype to cast the result to. Default: that of the parameters.
        """


class Method(ABC):
    """An adapter method. The defaults here are for methods that keep no tensors of the base.

    `settings` are always the method's own entries of adapter_config.json.
    """

    name: ClassVar[str]
    """Name for `--method` and adapter_config.json."""

    title: ClassVar[str]
    """Display name."""

    idea: ClassVar[str]
    """The trained parameters, in one line."""

    paper: ClassVar[str]
    """The paper: `arXiv NUMBER`."""

    Options: ClassVar[Any]
    """Frozen dataclass of its options, from `config`."""

    training_only: ClassVar[tuple[str, ...]] = ()
    """Options that only affect training."""

    @abstractmethod
    def build(self, frozen: Any, options: Any) -> Change:
        """Create the change, which is exactly zero at the start."""

    @abstractmethod
    def describe(self, settings: Mapping[str, Any]) -> Description:
        """Describe the method; `settings` may also come from a recipe."""

    def reduced(self, frozen: Any, options: Any) -> str:
        """A suffix for the description if a requested size exceeds the weights' dimensions; empty for most methods."""
        return ""

    @abstractmethod
    def count(self, shapes: Mapping[str, Shape], options: Any) -> int:
        """The number of trained parameters for stacks of these shapes (L, d_out, d_in)."""

    def prepare(
        self, weights: Weights, options: Any, cache_dir: str | None, progress: Progress
    ) -> tuple[Frozen, Sequence[str]]:
        """Compute from the weights what the method keeps: factors, singular vectors, or only their identity.

        Returns:
            The frozen tensors, and notes for the user.

        Raises:
            ConfigError: a rank above that of every weight.
        """
        self.check_rank(weights.shapes, options)
        return Sketch.of(weights), ()

    def full_rank(self, shapes: Mapping[str, Shape], options: Any) -> int:
        """The largest rank that has an effect."""
        return max(min(shape[1:]) for shape in shapes.values())

    def check_rank(self, shapes: Mapping[str, Shape], options: Any) -> None:
        """Refuse a rank above that of every weight, since it only costs memory.

        Raises:
            ConfigError: the rank is too large.
        """
        most = self.full_rank(shapes, options)
        if options.rank > most:
            raise ConfigError(f"--rank {options.rank}: no adapted weight has a rank above {most}")

    def within(self, weights: Weights, options: Any, budget: int, progress: Progress) -> Any:
        """The options at the largest rank that trains at most `budget` parameters, up to that of the weights.

        Raises:
            ConfigError: rank 1 trains more.
        """
        numbers = lambda rank: self.count(weights.shapes, replace(options, rank=rank))  # noqa: E731
        if numbers(1) > budget:
            raise ConfigError(f"--budget: {budget:,} is below the {numbers(1):,} parameters of {self.name} at rank 1")
        rank, beyond = 1, self.full_rank(weights.shapes, options) + 1
        while beyond - rank > 1:
            middle = (rank + beyond) // 2
            rank, beyond = (middle, beyond) if numbers(middle) <= budget else (rank, middle)
        return replace(options, rank=rank)

    def fit(self, frozen: Any, targets: Sequence[str] | None, options: Mapping[str, Any]) -> tuple[Any, Any]:
        """Restrict prepared tensors to the requested projections and ranks, and complete the options.

        Args:
            frozen: result of `prepare`.
            targets: some of its projections. Default: all.
            options: given options, by name.

        Raises:
            ConfigError: the request exceeds what was prepared, or another method prepared it.
        """
        if not isinstance(frozen, Sketch):
            raise ConfigError(f"{self.name} needs no factors, but these are from another method: omit them")
        return frozen if targets is None else frozen.select(targets), self.Options(**options)

    def settings(self, frozen: Any, options: Any) -> dict[str, Any]:
        """The method's own entries of adapter_config.json."""
        return asdict(options)

    def options(self, settings: Mapping[str, Any]) -> Any:
        """Parse the options from `settings`, which may come from an untrusted source.

        Raises:
            ValueError: an option is missing or invalid.
        """
        from pydantic import TypeAdapter, ValidationError

        values, hints = {}, get_type_hints(self.Options, include_extras=True)
        for name, hint in [(field.name, hints[field.name]) for field in fields(self.Options)]:
            if name not in settings:
                raise ValueError(f"it has no {name}")
            try:
                values[name] = TypeAdapter(hint).validate_python(settings[name], strict=True)
            except ValidationError as error:
                raise ValueError(f"its {name}: {error.errors()[0]['msg']}") from error
        return self.Options(**values)

    def read(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> Frozen:
        """Read the frozen tensors from an adapter's file, which may come from an untrusted source.

        Raises:
            FileError: a tensor or a header entry is missing or invalid.
        """
        return Sketch.read(tensors, header, path)

    def unlike(self, frozen: Any, options: Any, wanted: Any) -> str | None:
        """How an adapter's options differ from those of a run, with the flags that match; None if they do not.

        Args:
            frozen: frozen tensors of the adapter.
            options: options of the adapter.
            wanted: options of the run.
        """
        theirs, ours = asdict(options), asdict(wanted)
        compared = [name for name in option_names(self.name, start=False) if name not in self.training_only]
        differing = [name for name in compared if theirs[name] != ours[name]]
        if not differing:
            return None
        has = ", ".join(f"{name} {theirs[name]}" for name in differing)
        flags = " ".join(_as_flag(name, theirs[name]) for name in differing if theirs[name] is not None)
        others = " and ".join(flag(name) for name in differing if theirs[name] is None)
        advice = [*([f"pass {flags}"] if flags else []), *([f"omit {others}"] if others else [])]
        return f"has {has}; {', '.join(advice)}"

    def recall(
        self, record: Mapping[str, Any], path: Path, cache_dir: str | None, *, make: bool, trusted: bool = False
    ) -> Frozen:
        """The tensors that an adapter only refers to: from the cache, or with `make` recomputed from its base.

        Python code in the base checkpoint runs only if it is `trusted`.

        Raises:
            FileError: they are not available.
        """
        raise FileError(f"{path} is damaged: {self.name} keeps no tensors that an adapter can refer to")

    def trained_shapes(self, frozen: Any, options: Any) -> dict[str, tuple[int, ...]]:
        """The shape of every trained parameter by name, without allocating memory."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in self.build(frozen, options).trained().items()}

    def chains_in_turn(
        self, frozen: Any, settings: Mapping[str, Any], trained: Mapping[str, Tensor], projection: str
    ) -> Iterator[Chain]:
        """Iterate over the chains of a saved adapter's layers, in float64; the adapter may be untrusted."""
        change = self.build(frozen, self.options(settings)).double().requires_grad_(False)
        change.load(trained)
        with torch.no_grad():
            chains = change.chains(projection)
        yield from chains

    def facts(
        self, frozen: Any, settings: Mapping[str, Any], trained: Mapping[str, Tensor], projection: str
    ) -> dict[str, Any]:
        """Facts about a projection of a saved adapter, for display; `parameters` is its parameter count."""
        own = [tensor.numel() for name, tensor in trained.items() if f".{projection}." in f".{name}."]
        return {"parameters": sum(own)}

    def described(self, settings: Mapping[str, Any], more: str, trained: str) -> Description:
        """The description of a method whose size is a rank.

        Args:
            settings: settings, including the rank.
            more: other settings, which follow the rank.
            trained: location of the trained parameters, as part of a sentence.
        """
        rank = settings["rank"]
        return Description(self.title, str(rank), f"rank {rank}, {more}", trained, f"{self.idea} ({self.paper})")
