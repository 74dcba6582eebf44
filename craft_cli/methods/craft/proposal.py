"""Propose ranks: the fewest parameters that keep an energy of the weights, or the most energy within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from craft_cli.errors import ConfigError, ModelError
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.stacks import Shape
from craft_cli.tucker import EnergyTable, Matrix, energy_table, stack_shape


@dataclass(frozen=True, eq=False)
class Proposal:
    """The result of `propose`.

    Attributes:
        ranks: ranks for all projections, as in training; none exceeds the dimension of every projection.
        tables: energy kept at the candidate ranks, by projection.
        ranks_out: candidate output ranks.
        ranks_in: candidate input ranks.
    """

    ranks: Ranks
    tables: Mapping[str, EnergyTable]
    ranks_out: Sequence[int]
    ranks_in: Sequence[int]

    def energy(self, target: str) -> float:
        """The energy kept of a projection at the proposed ranks."""
        table = self.tables[target]
        out, in_ = (list(ranks) for ranks in (self.ranks_out, self.ranks_in))
        layer = min(self.ranks.layers, table.shape[0]) - 1
        return float(table.joint[layer, out.index(self.ranks.out), in_.index(self.ranks.in_)])


def propose(
    stacks: Mapping[str, Sequence[Matrix]],
    model: str,
    *,
    energy: float | None = None,
    most: int | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Proposal:
    """Choose ranks by the energy kept at all candidate ranks.

    Args:
        stacks: L matrices (d_out, d_in) per projection.
        model: model name, for messages.
        energy: share of the squared norm to keep, with the fewest parameters.
        most: if `energy` is None, maximum number of trained parameters over all projections.
        progress: called with a description of the current step.

    Raises:
        ConfigError: ranks 1,1,1 train more than `most`.
        ModelError: a weight is not finite.
    """
    shapes: list[Shape] = [stack_shape(stack) for stack in stacks.values()]
    ranks_out, ranks_in = (_grid(max(shape[mode] for shape in shapes)) for mode in (1, 2))
    tables = {}
    for target, stack in stacks.items():
        progress(f"decomposing {target} in full")
        try:
            tables[target] = energy_table(stack, ranks_out, ranks_in)
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"{model}: cannot decompose {target}: {error}") from error
    return Proposal(_choose(tables, ranks_out, ranks_in, energy, most), tables, ranks_out, ranks_in)


def _grid(size: int) -> list[int]:
    """Candidate ranks: all up to 128, then about 200 more up to the dimension."""
    return sorted(
        {*range(1, min(size, 128) + 1), *range(128, size, max(1, size // 200)), size} & set(range(1, size + 1))
    )


def _choose(
    tables: Mapping[str, EnergyTable], ranks_out: Sequence[int], ranks_in: Sequence[int],
    energy: float | None, most: int | None,
) -> Ranks:  # fmt: skip
    """The ranks that keep `energy` with the fewest parameters, or the most energy with at most `most`."""
    deepest = max(table.shape[0] for table in tables.values())
    layers, out, in_ = (torch.tensor(ranks) for ranks in (list(range(1, deepest + 1)), ranks_out, ranks_in))
    numbers = torch.zeros(deepest, len(out), len(in_), dtype=torch.int64)
    kept = torch.zeros(numbers.shape, dtype=torch.float64)
    for table in tables.values():
        count, d_out, d_in = table.shape
        squares = (layers.clamp(max=count) ** 2, out.clamp(max=d_out) ** 2, in_.clamp(max=d_in) ** 2)
        numbers += squares[0][:, None, None] + squares[1][:, None] + squares[2]
        kept += table.norm2 * table.joint[layers.clamp(max=count) - 1]
    kept /= max(sum(table.norm2 for table in tables.values()), torch.finfo(torch.float64).tiny)
    if energy is not None:
        allowed = kept >= min(energy, float(kept.max()))
        best = int(
            torch.where(allowed, numbers.double() - kept, torch.inf).argmin()
        )  # among equal counts, the most energy
    else:
        allowed = numbers <= (most or 0)
        if not allowed.any():
            raise ConfigError(f"--budget: {most} is below the {int(numbers.min())} parameters of ranks 1,1,1")
        best = int(torch.where(allowed, kept, -torch.inf).argmax())
    layer, rest = divmod(best, len(out) * len(in_))
    return Ranks(int(out[rest // len(in_)]), int(in_[rest % len(in_)]), int(layers[layer]))
