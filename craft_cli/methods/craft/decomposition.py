"""Use-case: decompose a model's attention projections once, and keep the factors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from craft_cli.errors import ModelError
from craft_cli.methods.craft.factors import FactorCache, Factors
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.checkpoint import Checkpoint, LazyMatrix, fingerprint
from craft_cli.models.families import check_targets, layer_views
from craft_cli.models.hub import resolve
from craft_cli.tucker import hosvd, stack_shape

DEFAULT_RANKS = Ranks(64, 64, 8)
DEFAULT_TARGETS = ("query", "value")


@dataclass(frozen=True)
class Decomposition:
    """What `decompose_checkpoint` did.

    Attributes:
        factors: at the ranks asked for, lowered to the dimensions.
        seconds: time spent on each projection; nothing where all came from the cache.
        notes: what the user should know (ranks lowered, damaged entries made again).
    """

    factors: Factors
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def cached(self) -> bool:
        """Whether nothing had to be computed."""
        return not self.seconds


def find_checkpoint(model: str, targets: Sequence[str], revision: str | None = None) -> Checkpoint:
    """The checkpoint with the files that decomposing these projections needs.

    Raises:
        ConfigError: an unknown target.
        ModelError: it is missing, damaged or of an unsupported family.
    """
    check_targets(targets)
    return resolve(
        model,
        revision,
        only=lambda config: [view for layers in layer_views(config, targets).values() for view in layers],
    )


def decompose_checkpoint(
    checkpoint: Checkpoint,
    targets: Sequence[str],
    ranks: Ranks,
    *,
    cache_dir: str | None = None,
    device: str | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda target, done, total: None,
) -> Decomposition:
    """Factors of a checkpoint on this machine, from the cache where it has them.

    Args:
        progress: called with (projection, layers read, layers to read).

    Raises:
        ConfigError: unknown targets.
        ModelError: a tensor is missing, damaged or not finite, or the family is unsupported.
        FileError: the cache cannot be written.
    """
    config = checkpoint.config()
    stacks = read_stacks(checkpoint, config, targets)
    lowered = {target: ranks.lowered(stack_shape(stack)) for target, stack in stacks.items()}
    notes = [
        f"{target}: ranks {ranks} lowered to {lowered[target]}, the dimensions of its stack"
        for target in targets
        if lowered[target] != ranks
    ]
    prints = {target: fingerprint(stack) for target, stack in stacks.items()}
    cache = FactorCache(cache_dir)
    chosen = tuple(targets)
    if not force:
        found, damaged = cache.find(prints, ranks)
        if found:
            return Decomposition(_named(found, checkpoint).select(chosen, ranks), notes=notes)
        notes += [f"{line}; decomposing again" for line in damaged]

    path = cache.path_for(checkpoint.name, prints)
    with cache.lock(path):
        if not force:  # another process may have made it while we waited
            found, _ = cache.find(prints, ranks)
            if found:
                return Decomposition(_named(found, checkpoint).select(chosen, ranks), notes=notes)
            kept = cache.ranks_at(path, prints)
            lowered = {target: Ranks(*map(max, lowered[target], kept.get(target, (0, 0, 0)))) for target in targets}
        seconds, decompositions = {}, {}
        for target, stack in stacks.items():
            began = time.perf_counter()
            done, total = 0, 4 * len(stack)

            def advance(layers: int, target: str = target, total: int = total) -> None:
                nonlocal done
                done += layers
                progress(target, done, total)

            try:
                decompositions[target] = hosvd(stack, lowered[target].by_mode, device=device, advance=advance)
            except (ValueError, RuntimeError) as error:
                raise ModelError(f"{checkpoint.name}: cannot decompose {target}: {error}") from error
            seconds[target] = time.perf_counter() - began
        factors = Factors(
            model=checkpoint.name,
            revision=checkpoint.revision,
            model_type=config.model_type,
            dtype=str(stacks[chosen[0]][0][0:1].dtype).removeprefix("torch."),
            fingerprints=prints,
            decompositions=decompositions,
            path=path,
        )
        factors.save(path)
    return Decomposition(factors.select(chosen, ranks), seconds, notes)


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


def _named(found: Factors, checkpoint: Checkpoint) -> Factors:
    """The same weights may have been decomposed under another name; speak of them by the user's."""
    return replace(found, model=checkpoint.name, revision=checkpoint.revision)
