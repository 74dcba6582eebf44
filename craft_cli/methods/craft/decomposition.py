"""HOSVD of a model's stacked weights, from the cache or newly computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from craft_cli.errors import ModelError
from craft_cli.methods.cache import recall
from craft_cli.methods.craft.factors import FactorCache, Factors, serving
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.stacks import Weights
from craft_cli.tucker import hosvd


@dataclass(frozen=True)
class Decomposition:
    """The result of `decompose_weights`.

    Attributes:
        factors: factors at the requested ranks, reduced to the dimensions.
        seconds: seconds per projection; empty if all came from the cache.
        notes: notes for the user, about damaged cache entries.
    """

    factors: Factors
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def cached(self) -> bool:
        """Whether all factors came from the cache."""
        return not self.seconds


def decompose_weights(
    weights: Weights,
    ranks: Ranks,
    *,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda target, done, total: None,
) -> Decomposition:
    """The factors of a model's weights, from the cache or newly computed.

    Args:
        weights: weights of the projections to decompose.
        ranks: ranks to keep; a rank above its dimension is reduced to it.
        cache_dir: cache folder. Default: `~/.cache/craft`.
        device: device for the computation. Default: the CPU.
        force: decompose again even if the factors are cached.
        progress: called with (projection, layers read, layers to read).

    Raises:
        ModelError: a weight is not finite.
        FileError: the cache is not writable.
    """
    prints, targets = weights.fingerprints, weights.targets
    lowered = {target: ranks.lowered(shape) for target, shape in weights.shapes.items()}
    notes: list[str] = []
    cache = FactorCache(cache_dir)
    if not force:
        entry, damaged = cache.find(weights, serving(prints, ranks))
        if entry:
            return Decomposition(_named(entry, weights).select(targets, ranks), notes=notes)
        notes += [f"{line}; decomposing again" for line in damaged]

    path = cache.path_for(weights.model, prints)
    with cache.lock(path):
        if not force:  # another process may have computed it in the meantime
            entry, _ = cache.find(weights, serving(prints, ranks))
            if entry:
                return Decomposition(_named(entry, weights).select(targets, ranks), notes=notes)
            kept = cache.ranks_at(path, prints)
            lowered = {target: Ranks(*map(max, lowered[target], kept.get(target, (0, 0, 0)))) for target in targets}
        seconds, decompositions = {}, {}
        for target, stack in weights.stacks.items():
            began = time.perf_counter()
            done, total = 0, 4 * len(stack)

            def advance(layers: int, target: str = target, total: int = total) -> None:
                nonlocal done
                done += layers
                progress(target, done, total)

            try:
                decompositions[target] = hosvd(stack, lowered[target].by_mode, device=device, advance=advance)
            except (ValueError, RuntimeError) as error:
                raise ModelError(f"{weights.model}: cannot decompose {target}: {error}") from error
            seconds[target] = time.perf_counter() - began
        factors = Factors(**weights.origin(), decompositions=decompositions, path=path)
        cache.keep(factors, path)
    return Decomposition(factors.select(targets, ranks), seconds, notes)


def recall_factors(
    record: Mapping[str, Any], path: Path, cache_dir: str | None, *, make: bool, trusted: bool = False
) -> Factors:
    """The factors that an adapter refers to; see `recall`.

    Raises:
        FileError: the factors are not cached, and cannot be computed or `make` is off.
    """
    targets = tuple(record["targets"])
    ranks = Ranks(*(max(sizes) for sizes in zip(*record["ranks"].values(), strict=True)))
    return recall(
        FactorCache(cache_dir),
        serving(record["base_model"]["sha256"], ranks),
        lambda entry: entry.select(targets, ranks),
        lambda weights: decompose_weights(weights, ranks, cache_dir=cache_dir).factors,
        record,
        path,
        make=make,
        trusted=trusted,
    )


def _named(factors: Factors, weights: Weights) -> Factors:
    """Set the model name given by the user; the same weights may have been decomposed under another name."""
    return replace(factors, model=weights.model, revision=weights.revision)
