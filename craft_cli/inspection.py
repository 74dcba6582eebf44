"""Use-case: look into a model, a file of factors, a run or an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from craft_cli.decomposition import DEFAULT_RANKS, DEFAULT_TARGETS, find_checkpoint, read_stacks
from craft_cli.errors import ConfigError, FileError
from craft_cli.factors import Factors
from craft_cli.plots import spectra
from craft_cli.projections import TARGETS
from craft_cli.ranks import Ranks
from craft_cli.runs import Run, find_adapter, find_run
from craft_cli.saved import read_adapter
from craft_cli.tucker import MODES, TuckerTensor, hosvd, mode_product, stack_shape

_WIDEST = 768


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        kind: `model`, `factors`, `adapter` or `run`.
        path: what was inspected.
        facts: what holds for the whole, by name.
        projections: for each a mapping with `name`, `shape` (L, d_out, d_in), `ranks` (OUT,IN,LAYERS) and more.
    """

    kind: str
    path: str
    facts: Mapping[str, Any]
    projections: Sequence[Mapping[str, Any]] = field(default_factory=list)


def inspect(
    path: str | Path | None = None, *, ranks: str | Sequence[int] | None = None, plot: str | Path | None = None
) -> Inspection:
    """Look into a model, a file of factors, a run or an adapter.

    Args:
        path: folder, file or hub id; the latest run without.
        ranks: of a model, to count the numbers trained.
        plot: draw the spectra into this file (png, svg, pdf).

    Raises:
        ConfigError: `plot` of something without spectra, or `ranks` of something that has its own.
        CraftError: it is missing, damaged or unsupported.
    """
    found = find_run(None if path is None else str(path))
    adapter = find_adapter(found)
    if ranks is not None and (adapter or found.is_file()):
        raise ConfigError(f"--ranks is for models; {found} has ranks of its own")
    if adapter:
        inspection, decompositions = _adapter(found, adapter)
    elif found.is_file():
        factors = Factors.load(found)
        decompositions = factors.decompositions
        inspection = Inspection(
            "factors", str(found), _identity(factors), [_kept(*item) for item in decompositions.items()]
        )
    elif path is None or found.suffix == ".safetensors":
        raise FileError(f"{found}: no such file")
    else:
        inspection, decompositions = _model(str(path), Ranks.parse(ranks or DEFAULT_RANKS)), {}
    if plot:
        if not decompositions:
            raise ConfigError(f"--plot: {path} is a model; decompose it and plot the file of factors")
        spectra(decompositions, Path(plot), f"Spectra of {inspection.facts['base_model']}")
    return inspection


@lru_cache
def random_energy(shape: tuple[int, int, int], ranks: tuple[int, int, int]) -> float:
    """Energy that HOSVD at these ranks keeps of a Gaussian random tensor of this shape: what no structure looks like.

    A real tensor (fixed seed) is decomposed. One wider than 768 is scaled down, ranks with it: in high dimensions the
    energy depends on the proportions alone.
    """
    layers, d_out, d_in = shape
    r_layer, r_out, r_in = ranks
    scale = min(1.0, _WIDEST / max(d_out, d_in))
    d_out, d_in = round(d_out * scale), round(d_in * scale)
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(layers, d_out, d_in, generator=generator)
    scaled = (r_layer, min(d_out, max(1, round(r_out * scale))), min(d_in, max(1, round(r_in * scale))))
    return hosvd(stack, scaled).energy


def _model(model: str, ranks: Ranks) -> Inspection:
    checkpoint = find_checkpoint(model, DEFAULT_TARGETS)
    config = checkpoint.config()
    projections: list[dict[str, Any]] = []
    for target, stack in read_stacks(checkpoint, config, TARGETS).items():
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
        "default_targets": ", ".join(DEFAULT_TARGETS),
        "parameters": {"adapter": sum(row["parameters"] for row in projections if row["name"] in DEFAULT_TARGETS)},
    }
    return Inspection("model", model, facts, projections)


def _adapter(path: Path, folder: Path) -> tuple[Inspection, Mapping[str, TuckerTensor]]:
    saved = read_adapter(folder)
    record, factors = saved.record, saved.factors
    run = Run(path) if path != folder else None
    training = record.get("training", {})
    data = training.get("data", {})
    facts = _identity(factors) | {
        "parameters": record["parameters"],
        "labels": ", ".join(record["model"]["id2label"].values()),
    }
    if training:
        where = data.get("data_dir") or data.get("train_file")
        facts["trained_on"] = training.get("task", "") + (f" from {where}" if where else "")
        facts["epoch"] = training.get("epoch")
        facts["metrics"] = training.get("metrics")
    if run and run.results():
        facts["examples"] = run.results()["examples"]
    if run:
        facts["state"] = "finished" if run.results() else "not finished"
    projections = []
    for name, decomposition in factors.decompositions.items():
        k = {mode: matrix.double() for mode, matrix in saved.transforms[name].items()}
        norms = _change_norms(decomposition, k)
        projections.append(
            _kept(name, decomposition)
            | {"k_norms": {mode: float(matrix.norm()) for mode, matrix in k.items()}, "change_by_layer": norms}
        )
    return Inspection("run" if run else "adapter", str(path), facts, projections), factors.decompositions


def _change_norms(decomposition: TuckerTensor, k: Mapping[str, torch.Tensor]) -> list[float]:
    """||dW_l|| of every layer: that of its slice, because U_out and U_in are orthonormal."""
    core = decomposition.core.double()
    u_layer = decomposition.factors[0].double()
    identity = {mode: torch.eye(len(matrix), dtype=torch.float64) for mode, matrix in k.items()}
    adapted = mode_product(core, u_layer @ (identity["layer"] + k["layer"]), 0)
    slices = (identity["out"] + k["out"]) @ adapted @ (identity["in"] + k["in"]).T - mode_product(core, u_layer, 0)
    return slices.flatten(1).norm(dim=1).tolist()


def _identity(factors: Factors) -> dict[str, Any]:
    return {
        "base_model": factors.model,
        "revision": factors.revision,
        "family": factors.model_type,
        "dtype": factors.dtype,
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
