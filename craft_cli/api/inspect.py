"""Inspect a model, a factor file, a run or an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from craft_cli.config import ALL_LINEAR, RunConfig
from craft_cli.errors import ConfigError, FileError
from craft_cli.methods.adapter_folder import SavedAdapter, read_adapter
from craft_cli.methods.base import effective_rank, inners, singular_values
from craft_cli.methods.craft.factors import Factors
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.cards import learned
from craft_cli.models.stacks import Origin, find_checkpoint, read_stacks
from craft_cli.plots import spectra
from craft_cli.training.find import find_run
from craft_cli.training.run import Run, find_adapter
from craft_cli.tucker import MODES, TuckerTensor, stack_shape
from craft_cli.tucker.chance import random_curves, random_energy

_MOST_PRODUCTS = 1 << 34
"""Largest matrix size for singular values, which take seconds at this size."""


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`.

    Attributes:
        kind: `model`, `factors`, `adapter` or `run`.
        path: the inspected path.
        facts: general facts, by name.
        projections: one mapping per projection, with `name`, `shape` (L, d_out, d_in), `ranks` (OUT,IN,LAYERS) and more.
        decompositions: factors by projection; empty for a model.
    """

    kind: str
    path: str
    facts: Mapping[str, Any]
    projections: Sequence[Mapping[str, Any]] = field(default_factory=list)
    decompositions: Mapping[str, TuckerTensor] = field(default_factory=dict, repr=False)


def inspect(
    path: str | Path | None = None,
    *,
    ranks: str | Sequence[int] | None = None,
    plot: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Inspect a model, a factor file, a run or an adapter.

    Args:
        path: folder, file or Hub id. Default: the latest run.
        ranks: for a model, ranks to count trained parameters at.
        plot: plot the spectra to this file (png, svg, pdf).
        trust_remote_code: run Python code from the model's repository.

    Raises:
        ConfigError: `plot` is given for a model, or `ranks` for anything else.
        CraftError: the path is missing, damaged or unsupported.
    """
    found = find_run(None if path is None else str(path))
    adapter = find_adapter(found)
    if ranks is not None and (adapter or found.is_file()):
        raise ConfigError(f"--ranks is for models; {found} has its own ranks, remove it")
    if adapter:
        inspection = _adapter(found, adapter)
    elif found.is_file():
        factors = Factors.load(found)
        rows = [_kept(*item) for item in factors.decompositions.items()]
        inspection = Inspection("factors", str(found), _identity(factors), rows, factors.decompositions)
    elif path is None or found.suffix == ".safetensors":
        raise FileError(f"{found}: no such file")
    else:
        inspection = _model(str(path), Ranks.parse(ranks or RunConfig.ranks), trusted=trust_remote_code)
    if plot:
        if not inspection.decompositions:
            raise ConfigError(f"--plot: {path} is a model; decompose it and plot the factor file")
        chance = {name: random_curves(kept.shape) for name, kept in inspection.decompositions.items()}
        title = f"Singular values of the stacked weights of {inspection.facts['base_model']}"
        spectra(inspection.decompositions, chance, Path(plot).expanduser(), title)
    return inspection


def _model(model: str, ranks: Ranks, *, trusted: bool) -> Inspection:
    checkpoint = find_checkpoint(model, (ALL_LINEAR,), trust_remote_code=trusted)
    config = checkpoint.config()
    projections: list[dict[str, Any]] = []
    for target, stack in read_stacks(checkpoint, config, (ALL_LINEAR,)).items():
        lowered = ranks.lowered(stack_shape(stack))
        projections.append(
            {
                "name": target,
                "shape": list(stack_shape(stack)),
                "ranks": list(lowered),
                "parameters": lowered.count_parameters(),
            }
        )
    facts = {
        "base_model": model,
        "revision": checkpoint.revision,
        "family": config.model_type,
        "default_targets": ", ".join(RunConfig.targets),
        "parameters": {"adapter": sum(row["parameters"] for row in projections if row["name"] in RunConfig.targets)},
    }
    return Inspection("model", model, facts, projections)


def _adapter(path: Path, folder: Path) -> Inspection:
    saved = read_adapter(folder)
    record, frozen = saved.record, saved.frozen
    method = saved.method.describe(record)
    run = Run(path) if Run(path).is_run() else None
    training = record.get("training", {})
    data = training.get("data", {})
    facts = _identity(frozen) | {
        "method": f"{method.title}, {method.settings}",
        "parameters": record["parameters"],
        "model_class": record["model"]["architecture"],
        "task_type": record.get("task_type"),
        "labels": None if learned(training) else ", ".join(record["model"]["id2label"].values()),
        "learned": learned(training),
    }
    if training:
        where = data.get("data_dir") or data.get("train_file")
        facts["trained_on"] = training.get("task", "") + (f" from {where}" if where else "")
        facts["epoch"] = training.get("epoch")
        facts["metrics"] = training.get("metrics") or None
        facts |= training.get("baselines") or {}
    if run and run.results():
        facts["examples"] = run.results().get("examples")
    if run:
        facts["state"] = run.state()
    projections = []
    for name, shape in frozen.shapes.items():
        row = {"name": name, "shape": list(shape)} | saved.facts(name)
        if isinstance(frozen, Factors):
            row |= _kept(name, frozen.decompositions[name])
        projections.append(row | _changes(saved, name, shape[0]))
    decompositions = frozen.decompositions if isinstance(frozen, Factors) else {}
    return Inspection("run" if run else "adapter", str(path), facts, projections, decompositions)


def _changes(saved: SavedAdapter, target: str, layers: int) -> dict[str, Any]:
    """Norm and effective rank of every dW_l; only the norm for large matrices."""
    first = next(saved.chains(target))
    if layers * min(size for matrix in first for size in matrix.shape) ** 3 > _MOST_PRODUCTS:
        squares = inners((chain, chain) for chain in saved.chains(target))
        return {"change_by_layer": [math.sqrt(max(square, 0.0)) for square in squares]}
    norms, directions = [], []
    for values in singular_values(saved.chains(target)):
        norms.append(float(values.norm()))
        directions.append(effective_rank(values))
    return {"change_by_layer": norms, "effective_rank_by_layer": directions}


def _identity(frozen: Origin) -> dict[str, Any]:
    return {
        "base_model": frozen.model,
        "revision": frozen.revision,
        "family": frozen.model_type,
        "dtype": frozen.dtype,
    }


def _kept(name: str, decomposition: TuckerTensor) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(decomposition.shape),
        "ranks": list(Ranks.of_modes(decomposition.ranks)),
        "parameters": Ranks.of_modes(decomposition.ranks).count_parameters(),
        "energy": decomposition.energy,
        "energy_by_mode": dict(zip(MODES, decomposition.energy_by_mode, strict=True)),
        "energy_random": random_energy(decomposition.shape, decomposition.ranks),
    }
