"""Decompose a model's projections once, and cache the factors."""

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
    """Compute the HOSVD factors of a model's stacked projections, or read them from the cache.

    Args:
        model: hub id, local folder, `demo`, or a loaded transformers model.
        targets: `query`, `key`, `value`, `output`, `gate`, `up`, `down`, or `all-linear`; a list, or comma-separated.
        ranks: OUT,IN,LAYERS; a rank above its dimension is reduced to it.
        revision: branch, tag or commit of a Hub model.
        cache_dir: cache folder for factors. Default: `~/.cache/craft`.
        device: device for the computation. Default: the CPU.
        force: decompose again even if the factors are cached.
        trust_remote_code: run Python code from the model's repository.

    Raises:
        TypeError: `model` is neither a name nor a model.
        ConfigError: targets are unknown, ranks are invalid, or a revision is given for a loaded model.
        ModelError: the model is missing, damaged or of an unsupported family.
        FileError: the cache cannot be written.
    """
    targets = parse_settings({"targets": targets})["targets"]
    if isinstance(model, (str, Path)):
        found = find_checkpoint(str(model), targets, revision, trust_remote_code=trust_remote_code)
        weights = read_weights(found, targets)
    else:
        check_model(model, "craft.decompose expects a model, or the name of a checkpoint")
        if revision is not None:
            raise ConfigError("--revision is for Hub models, but this model is already loaded; remove it")
        weights = weights_in(model, targets)
    return decompose_weights(weights, Ranks.parse(ranks), cache_dir=cache_dir, device=device, force=force).factors
