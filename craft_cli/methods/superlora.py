"""SuperLoRA (Chen et al. 2024, arXiv 2403.11887): the changes of all weights as one vector, in a few factored groups.

The changes of all layers and projections are concatenated row by row, one projection after the other, into a vector of
N entries. It is split evenly into G groups of n = ceil(N / G); excess entries of the last group are dropped. A group is

    dW_g = F( T_1 (x) ... (x) T_K )                  (x): Kronecker product, K splits
    T_k  = C_k x1 A_k1 ... xM A_kM                   a tensor of order M, read row by row

For M = 2, C is the identity and T = A_1 A_2^T. A tensor of order M has M nearly equal dimensions whose product is at
least n; excess entries are dropped. The dimensions of its K splits are nearly equal too. F is the identity, or with a
ratio rho < 1 a fixed map from ceil(rho n) entries to n (fastfood, Le et al. 2013, as in the paper). With the
orthonormal Walsh-Hadamard transform H of the next power of two, Gaussian Z, a permutation P and signs B (one seed),

    F(x) = (size / len(x))^1/2 (H Z P H B [x; 0])[:n]

so that the entries of F(x) and x have the same magnitude. Example: query and value of 12 layers of 768 x 768 have
N = 14,155,776 entries. One group of order 2 is a matrix 3,763 x 3,762 of rank r; 24 groups are 768 x 768 each, which is
LoRA without its scale; one group of order 3 is 242 x 242 x 242. A group that is exactly one weight keeps the shape of
that weight.

The first factor of the last split starts at zero, the others as LoRA's A, and C with ones on its diagonal, so the
change is exactly zero at the start. The change of a layer is dense: its chain is one matrix (d_in, d_out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from craft_cli.config import SuperloraOptions
from craft_cli.errors import ConfigError
from craft_cli.methods.base import Chain, Change, Method, Progress
from craft_cli.methods.frozen import Frozen, Sketch
from craft_cli.models.cards import Description
from craft_cli.models.stacks import Shape, Weights
from craft_cli.tucker import multi_mode_product

MOST = 1 << 40
"""Upper bound of the entries in all weights, since an untrusted file can have sizes that do not fit in memory."""


def near_equal(numbers: int, parts: int) -> list[int]:
    """Nearly equal dimensions whose product is at least `numbers`."""
    dimensions = []
    for left in range(parts, 0, -1):
        size = max(1, round(numbers ** (1 / left)))
        while size**left < numbers:
            size += 1
        while size > 1 and (size - 1) ** left >= numbers:
            size -= 1
        dimensions.append(size)
        numbers = -(-numbers // size)
    return dimensions


def plan(shapes: Mapping[str, Shape], options: SuperloraOptions) -> tuple[int, list[int], list[list[int]]]:
    """Entries per group, the dimensions of the group's tensor, and those of its splits, (K, M)."""
    total = sum(math.prod(shape) for shape in shapes.values())
    numbers = -(-total // options.superlora_groups)
    built = math.ceil(numbers * (options.superlora_projection or 1))
    weights = {shape[1:] for shape in shapes.values()}
    only = next(iter(weights))
    if options.superlora_order == 2 and len(weights) == 1 and built == math.prod(only):
        dimensions = list(only)
    else:
        dimensions = near_equal(built, options.superlora_order)
    by_mode = [near_equal(size, options.superlora_splits) for size in dimensions]
    return numbers, dimensions, [list(sizes) for sizes in zip(*by_mode, strict=True)]


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of a vector of 2^k entries."""
    size = len(x)
    left = size.bit_length() - 1
    while left:
        step = min(left, 6)
        left -= step
        matrix = x.new_ones(1, 1)
        for _ in range(step):
            matrix = torch.kron(matrix, x.new_tensor([[1.0, 1.0], [1.0, -1.0]]))
        # moves this dimension to the end; after the last one, the order is restored
        x = (matrix @ x.reshape(1 << step, -1)).T.reshape(-1)
    return x / math.sqrt(size)


def kron(one: Tensor, other: Tensor) -> Tensor:
    """The Kronecker product of two tensors of the same order (torch's does not support every layout)."""
    apart = one.reshape([n for size in one.shape for n in (size, 1)])
    product = apart * other.reshape([n for size in other.shape for n in (1, size)])
    return product.reshape([a * b for a, b in zip(one.shape, other.shape, strict=True)])


class Split(nn.Module):
    """T = C x1 A_1 ... xM A_M.

    Args:
        dimensions: dimensions of T.
        rank: rank of every mode; reduced to the dimension.
        zero: whether T starts at zero.
    """

    def __init__(self, dimensions: Sequence[int], rank: int, *, zero: bool) -> None:
        super().__init__()
        self.dimensions = dimensions
        if len(dimensions) == 2:
            ranks = [min(rank, *dimensions)] * 2
            self.register_parameter("core", None)
        else:
            ranks = [min(rank, size) for size in dimensions]
            core = torch.zeros(*ranks)
            core[tuple(torch.arange(min(ranks)) for _ in ranks)] = 1
            self.core = nn.Parameter(core)
        factors = [torch.empty(size, r) for size, r in zip(dimensions, ranks, strict=True)]
        for factor in factors:
            nn.init.uniform_(factor, -1 / math.sqrt(len(factor)), 1 / math.sqrt(len(factor)))  # as LoRA's A
        if zero:
            factors[0].zero_()
        self.factors = nn.ParameterList(factors)

    def rows(self, first: int, last: int) -> Tensor:
        """The rows T[first:last]."""
        lead, *others = self.factors
        if self.core is None:
            return lead[first:last] @ others[0].T
        return multi_mode_product(self.core, [lead[first:last], *others])


class SuperloraChange(Change):
    """The splits of every group.

    Args:
        shapes: shape (L, d_out, d_in) of every projection's stack.
        options: groups, order, splits, rank and projection.
    """

    def __init__(self, shapes: Mapping[str, Shape], options: SuperloraOptions) -> None:
        super().__init__()
        self.shapes = shapes
        self.numbers, self.dimensions, splits = plan(shapes, options)
        self.superlora = nn.ModuleList(
            nn.ModuleList(Split(sizes, options.rank, zero=k == len(splits) - 1) for k, sizes in enumerate(splits))
            for _ in range(options.superlora_groups)
        )
        self.projected = options.superlora_projection is not None
        if self.projected:
            size = 1 << (self.numbers - 1).bit_length()
            generator = torch.Generator().manual_seed(options.superlora_seed)
            signs = torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2 - 1
            order = torch.randperm(size, generator=generator, device="cpu")
            gauss = torch.randn(size, generator=generator, device="cpu")
            for name, tensor in (("signs", signs.to(torch.int8)), ("order", order), ("gauss", gauss)):
                self.register_buffer(name, tensor, persistent=False)

    def chains(self, projection: str, dtype: torch.dtype | None = None) -> Sequence[Chain]:
        """dW_l^T (d_in, d_out) of every layer; without gradients, each is computed when it is indexed."""

        def made(number: int) -> Chain:
            return (self.layer(projection, number).T.to(dtype),)

        layers = self.shapes[projection][0]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return [made(number) for number in range(layers)]
        return _Layers(layers, made, next(self.parameters()).device.type)

    def layer(self, projection: str, number: int) -> Tensor:
        """dW_l (d_out, d_in)."""
        names = list(self.shapes)
        _, d_out, d_in = self.shapes[projection]
        before = sum(math.prod(self.shapes[name]) for name in names[: names.index(projection)])
        first = before + number * d_out * d_in
        return torch.cat(list(self._numbers(first, first + d_out * d_in))).reshape(d_out, d_in)

    def _numbers(self, first: int, last: int) -> Iterator[Tensor]:
        """Iterate over the entries first:last of the whole vector, group by group."""
        while first < last:
            group, start = divmod(first, self.numbers)
            stop = min(self.numbers, start + last - first)
            yield self._projected(group)[start:stop] if self.projected else self._built(group, start, stop)
            first += stop - start

    def _built(self, group: int, start: int, stop: int) -> Tensor:
        """The entries start:stop of a group's tensor, computed from the rows that contain them."""
        width = math.prod(self.dimensions[1:])
        first, last = start // width, -(-stop // width)
        leading, *others = self._splits(group)
        each = math.prod(other.dimensions[0] for other in others)  # rows of the product per row of the first split
        tensor = leading.rows(first // each, -(-last // each))
        for other in others:
            tensor = kron(tensor, other.rows(0, other.dimensions[0]))
        skipped = first - first // each * each
        tensor = tensor[skipped : skipped + last - first]
        for mode, size in enumerate(self.dimensions[1:], start=1):
            tensor = tensor.narrow(mode, 0, size)
        return tensor.reshape(-1)[start - first * width : stop - first * width]

    def _projected(self, group: int) -> Tensor:
        """F of a group's tensor, (n,)."""
        built = self._built(group, 0, min(math.prod(self.dimensions), self.numbers))
        signs, order, gauss = (self.get_buffer(name) for name in ("signs", "order", "gauss"))
        padded = torch.cat([built, built.new_zeros(len(signs) - len(built))])
        mixed = hadamard(signs * padded)[order]
        return math.sqrt(len(padded) / len(built)) * hadamard(gauss * mixed)[: self.numbers]

    def _splits(self, group: int) -> list[Split]:
        splits: Any = self.superlora[group]
        return list(splits)


class _Layers(Sequence[Chain]):
    """The chains of a projection, each computed when it is indexed, without gradients."""

    def __init__(self, layers: int, made: Callable[[int], Chain], device: str) -> None:
        self._layers, self._made, self._device = layers, made, device

    def __len__(self) -> int:
        return self._layers

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._layers:
            raise IndexError(number)
        with torch.no_grad(), torch.autocast(self._device, enabled=False):
            return self._made(number)


class Superlora(Method):
    """The SuperLoRA method; it keeps no tensors of the base."""

    name, title, paper = "superlora", "SuperLoRA", "arXiv 2403.11887"
    idea = "the changes of all adapted weights as one vector, split into groups that are products of trained factors"
    Options = SuperloraOptions

    def prepare(
        self, weights: Weights, options: SuperloraOptions, cache_dir: str | None, progress: Progress
    ) -> tuple[Frozen, Sequence[str]]:
        """The identity of the weights, and a note on the memory of an update.

        Raises:
            ConfigError: more groups than entries.
        """
        total = sum(math.prod(shape) for shape in weights.shapes.values())
        if options.superlora_groups > total:
            raise ConfigError(f"--superlora-groups {options.superlora_groups}: the weights have only {total:,} entries")
        held = (
            f"superlora: an update needs memory for the dense changes of all adapted weights, {4 * total / 1e6:,.0f} MB"
        )
        if options.superlora_projection:
            held += ", and time to transform each group for every weight"
        return Sketch.of(weights), [held]

    def build(self, frozen: Frozen, options: SuperloraOptions) -> SuperloraChange:
        """Initialize the first factor of each group's last split at zero."""
        return SuperloraChange(frozen.shapes, options)

    def trained_shapes(self, frozen: Frozen, options: SuperloraOptions) -> dict[str, tuple[int, ...]]:
        """See `Method`.

        Raises:
            OverflowError: the sizes exceed those of any model.
        """
        if sum(math.prod(shape) for shape in frozen.shapes.values()) > MOST:
            raise OverflowError("its weights are larger than those of any model")
        return super().trained_shapes(frozen, options)

    def count(self, shapes: Mapping[str, Shape], options: SuperloraOptions) -> int:
        """Per group and split, r times the sum of its dimensions, and r^M for a core."""
        *_, splits = plan(shapes, options)
        numbers = 0
        for sizes in splits:
            pair = len(sizes) == 2
            ranks = [min(options.rank, *sizes)] * 2 if pair else [min(options.rank, size) for size in sizes]
            numbers += sum(map(math.prod, zip(sizes, ranks, strict=True))) + (0 if pair else math.prod(ranks))
        return options.superlora_groups * numbers

    def full_rank(self, shapes: Mapping[str, Shape], options: SuperloraOptions) -> int:
        """The largest rank of a group's factors; see `Method`."""
        *_, splits = plan(shapes, options)
        return max(min(sizes) if len(sizes) == 2 else max(sizes) for sizes in splits)

    def facts(
        self, frozen: Any, settings: Mapping[str, Any], trained: Mapping[str, Tensor], projection: str
    ) -> dict[str, Any]:
        """The number of parameters in all groups, since a group does not belong to one projection."""
        return {"parameters": 0, "shared": sum(tensor.numel() for tensor in trained.values())}

    def describe(self, settings: Mapping[str, Any]) -> Description:
        """Describe it by groups and order, and by splits and ratio if they are used."""
        options = self.Options(**{name: settings[name] for name in asdict(self.Options()) if name in settings})
        groups, order, splits = options.superlora_groups, options.superlora_order, options.superlora_splits
        words = f"{groups} {'groups' if groups > 1 else 'group'} of order {order}"
        words += f", {splits} Kronecker splits" if splits > 1 else ""
        words += f", projected from {options.superlora_projection:g}" if options.superlora_projection else ""
        return self.described(settings, words, "in the factors of")


METHOD = Superlora()
