"""Propose ranks, from the energy that each rank keeps, compared with a random tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_cli.config import RunConfig, parse_budget
from craft_cli.errors import ConfigError
from craft_cli.methods.adapter_folder import read_record
from craft_cli.methods.craft.factors import Factors
from craft_cli.methods.craft.proposal import propose
from craft_cli.models.stacks import find_checkpoint, read_stacks
from craft_cli.training.find import find_run
from craft_cli.training.run import find_adapter
from craft_cli.tucker import MODES, EnergyTable
from craft_cli.tucker.chance import random_by_mode, random_energy


@dataclass(frozen=True)
class Advice:
    """The result of `advise`.

    Attributes:
        base_model: the base model.
        ranks: proposed OUT,IN,LAYERS, the same for all projections as in training.
        parameters: trained parameters at these ranks, over all projections.
        energy: share of the squared norm kept at these ranks, over all projections.
        energy_random: the same for random tensors of the same shapes.
        projections: one mapping per projection, with `name`, `shape`, `energy`, `energy_random`, `parameters` at these
            ranks, and `curve`: rows with `rank`, `parameters` (its square) and for each mode the energy kept by that rank
            alone, also for a random tensor (`layer`, `layer_random`, ...); None above the dimension.
    """

    base_model: str
    ranks: str
    parameters: int
    energy: float
    energy_random: float
    projections: Sequence[Mapping[str, Any]]


def advise(
    path: str | Path | None = None,
    *,
    energy: float | None = None,
    budget: str | int | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Advice:
    """Propose ranks: the smallest that keep an energy, or those with the most energy within a parameter budget.

    Args:
        path: a model, or a run, adapter or factor file (for its base and projections). Default: the latest run.
        energy: share of the squared norm to keep, above 0 and up to 1.
        budget: maximum trained parameters over all projections, such as 50000, `50k` or `1.5m`.
        trust_remote_code: run Python code from the model's repository.
        progress: called with a description of the current step.

    Raises:
        ConfigError: not exactly one of `energy` and `budget` is given, or a value is out of range.
        CraftError: the model is missing, damaged or unsupported.
    """
    if (energy is None) == (budget is None):
        raise ConfigError("--energy and --budget cannot be combined; choose one")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy: expected a number above 0 and up to 1, not {energy:g}")
    most = None if budget is None else parse_budget(budget)
    model, revision, targets = _whose(path)
    checkpoint = find_checkpoint(model, targets, revision, trust_remote_code=trust_remote_code)
    stacks = read_stacks(checkpoint, checkpoint.config(), targets)
    found = propose(stacks, checkpoint.name, energy=energy, most=most, progress=progress)
    tables = found.tables
    progress("comparing with random tensors")
    rows: list[dict[str, Any]] = []
    for target, table in tables.items():
        ranks = found.ranks.lowered(table.shape)
        rows.append(
            {
                "name": target,
                "shape": list(table.shape),
                "parameters": ranks.count_parameters(),
                "energy": found.energy(target),
                "energy_random": random_energy(table.shape, ranks.by_mode),
                "curve": _curve(table),
            }
        )
    whole = sum(table.norm2 for table in tables.values())
    weights = {target: table.norm2 / whole if whole else 1 / len(tables) for target, table in tables.items()}
    return Advice(
        base_model=checkpoint.name,
        ranks=str(found.ranks),
        parameters=sum(row["parameters"] for row in rows),
        energy=sum(weights[row["name"]] * row["energy"] for row in rows),
        energy_random=sum(weights[row["name"]] * row["energy_random"] for row in rows),
        projections=rows,
    )


def _whose(path: str | Path | None) -> tuple[str, str | None, tuple[str, ...]]:
    """Model, revision and projections that a path refers to."""
    found = find_run(None if path is None else str(path))
    adapter = find_adapter(found)
    if adapter:
        record = read_record(adapter)
        return record["base_model"]["model"], record["base_model"]["revision"], tuple(record["targets"])
    if found.is_file():
        factors = Factors.load(found)
        return factors.model, factors.revision, factors.targets
    return str(path), None, RunConfig.targets


def _curve(table: EnergyTable) -> list[dict[str, Any]]:
    """Energy of each mode alone at ranks 1, 2, 4, ... up to the largest dimension."""
    dimensions = sorted(set(table.shape))
    doubling = [1 << power for power in range(max(table.shape).bit_length())]
    random = random_by_mode(table.shape)
    rows = []
    for rank in sorted({*doubling, *dimensions}):
        row: dict[str, Any] = {"rank": rank, "parameters": rank**2}
        for mode, size, kept, by_chance in zip(MODES, table.shape, table.by_mode, random, strict=True):
            inside = rank <= size
            row[mode] = float(kept[rank - 1]) if inside else None
            place = min(len(by_chance), max(1, round(rank * len(by_chance) / size)))
            row[f"{mode}_random"] = float(by_chance[place - 1]) if inside else None
        rows.append(row)
    return rows


# -- random baseline ----------------------------------------------------------------------------------------------------
