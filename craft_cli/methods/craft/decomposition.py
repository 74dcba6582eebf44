"""HOSVD of a model's stacked weights, once: from the cache of factors where it has them."""

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
    """What `decompose_weights` did.

    Attributes:
        factors: at the ranks asked for, lowered to the dimensions.
        seconds: time spent on each projection; nothing where all came from the cache.
        notes: what the user should know (damaged entries made again).
    """

    factors: Factors
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def cached(self) -> bool:
        """Whether nothing had to be computed."""
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
    """Factors of a model's weights, from the cache where it has them.

    Args:
        weights: of the projections to decompose.
        ranks: to keep; one above its dimension is lowered to it.
        cache_dir: folder of the factor files; `~/.cache/craft` without.
        device: where to compute; the CPU without.
        force: decompose again even if the cache has it.
        progress: called with (projection, layers read, layers to read).

    Raises:
        ModelError: a weight is not finite.
        FileError: the cache cannot be written.
    """
    prints, targets = weights.fingerprints, weights.targets
    lowered = {target: ranks.lowered(shape) for target, shape in weights.shapes.items()}
    notes: list[str] = []
    cache = FactorCache(cache_dir)
    if not force:
        found, damaged = cache.find(weights, serving(prints, ranks))
        if found:
            return Decomposition(_named(found, weights).select(targets, ranks), notes=notes)
        notes += [f"{line}; decomposing again" for line in damaged]

    path = cache.path_for(weights.model, prints)
    with cache.lock(path):
        if not force:  # another process may have made it while we waited
            found, _ = cache.find(weights, serving(prints, ranks))
            if found:
                return Decomposition(_named(found, weights).select(targets, ranks), notes=notes)
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
        FileError: they are not in the cache, and cannot or may not be made.
    """
    targets = tuple(record["targets"])
    ranks = Ranks(*(max(sizes) for sizes in zip(*record["ranks"].values(), strict=True)))
    return recall(
        FactorCache(cache_dir),
        serving(record["base_model"]["sha256"], ranks),
        lambda found: found.select(targets, ranks),
        lambda weights: decompose_weights(weights, ranks, cache_dir=cache_dir).factors,
        record,
        path,
        make=make,
        trusted=trusted,
    )


def _named(found: Factors, weights: Weights) -> Factors:
    """The same weights may have been decomposed under another name; speak of them by the user's."""
    return replace(found, model=weights.model, revision=weights.revision)
