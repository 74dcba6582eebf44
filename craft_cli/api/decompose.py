"""Use-case: decompose a model's attention projections once, and keep the factors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from craft_cli.config import RunConfig, parse_settings
from craft_cli.errors import ConfigError
from craft_cli.methods.craft.decomposition import decompose_weights
from craft_cli.methods.craft.factors import Factors
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.loading import check_model
from craft_cli.models.stacks import find_checkpoint, read_weights, weights_in


def decompose(
    model: Any,
    targets: str | Sequence[str] = RunConfig.targets,
    ranks: str | Sequence[int] = RunConfig.ranks,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Factors:
    """HOSVD factors of a model's stacked attention projections, from the cache where it has them.

    Args:
        model: hub id, local folder, `demo`, or a loaded transformers model.
        targets: of `query`, `key`, `value`, `output`, `gate`, `up`, `down`, or `all-linear`; also with commas between them.
        ranks: OUT,IN,LAYERS; a rank above its dimension is lowered to it.
        revision: branch, tag or commit of a hub model.
        cache_dir: folder of the factor files; `~/.cache/craft` without.
        device: where to compute; the CPU without.
        force: decompose again even if the cache has it.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        TypeError: `model` is something else.
        ConfigError: unknown targets or impossible ranks, or a revision of a loaded model.
        ModelError: the model is missing, damaged or of an unsupported family.
        FileError: the cache cannot be written.
    """
    targets = parse_settings({"targets": targets})["targets"]
    if isinstance(model, (str, Path)):
        found = find_checkpoint(str(model), targets, revision, trust_remote_code=trust_remote_code)
        weights = read_weights(found, targets)
    else:
        check_model(model, "craft.decompose takes one, or the name of a checkpoint")
        if revision is not None:
            raise ConfigError("--revision is for a checkpoint of the hub, and this model is loaded: leave it out")
        weights = weights_in(model, targets)
    return decompose_weights(weights, Ranks.parse(ranks), cache_dir=cache_dir, device=device, force=force).factors
