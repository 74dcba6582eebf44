"""Use-case: decompose a model's attention projections once, and keep the factors."""

from __future__ import annotations

from collections.abc import Sequence

from craft_cli.config import RunConfig
from craft_cli.methods.craft.decomposition import decompose_weights
from craft_cli.methods.craft.factors import Factors
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.stacks import find_checkpoint, read_weights


def decompose(
    model: str,
    targets: Sequence[str] = RunConfig.targets,
    ranks: str | Sequence[int] = RunConfig.ranks,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    device: str | None = None,
    force: bool = False,
) -> Factors:
    """HOSVD factors of a model's stacked attention projections, from the cache where it has them.

    Args:
        model: hub id, local folder, or `demo`.
        targets: of `query`, `key`, `value`, `output`.
        ranks: OUT,IN,LAYERS; a rank above its dimension is lowered to it.
        revision: branch, tag or commit of a hub model.
        cache_dir: folder of the factor files; `~/.cache/craft` without.
        device: where to compute; the CPU without.
        force: decompose again even if the cache has it.

    Raises:
        ConfigError: unknown targets or impossible ranks.
        ModelError: the model is missing, damaged or of an unsupported family.
        FileError: the cache cannot be written.
    """
    weights = read_weights(find_checkpoint(model, targets, revision), targets)
    return decompose_weights(weights, Ranks.parse(ranks), cache_dir=cache_dir, device=device, force=force).factors
