"""The CRAFT method: its preparation, options, change and description."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from craft_cli.config import CraftOptions
from craft_cli.errors import ConfigError
from craft_cli.methods.base import Chain, Method, Progress
from craft_cli.methods.craft.change import PAPER_NOISE, CraftChange, slices_in_turn
from craft_cli.methods.craft.decomposition import decompose_weights, recall_factors
from craft_cli.methods.craft.factors import Factors, from_tensors
from craft_cli.methods.craft.proposal import propose
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.cards import Description
from craft_cli.models.stacks import Shape, Weights
from craft_cli.tucker import MODES


class Craft(Method):
    """The CRAFT method; it keeps the factors of the stacked weights. Its settings are the ranks of every projection."""

    name, title, paper = "craft", "CRAFT", "arXiv 2602.17510"
    idea = "frozen Tucker factors of the stacked attention weights, one small trained matrix for each mode"
    Options = CraftOptions

    def prepare(
        self, weights: Weights, options: CraftOptions, cache_dir: str | None, progress: Progress
    ) -> tuple[Factors, Sequence[str]]:
        """The factors, from the cache or newly computed."""
        done = decompose_weights(
            weights,
            Ranks.parse(options.ranks),
            cache_dir=cache_dir,
            progress=lambda target, done, total: progress(f"decomposing {target}", done, total),
        )
        return done.factors, done.notes

    def fit(
        self, frozen: Factors, targets: Sequence[str] | None, options: Mapping[str, Any]
    ) -> tuple[Factors, CraftOptions]:
        """Select projections of the factors, at the requested ranks."""
        if not isinstance(frozen, Factors):
            raise ConfigError(
                "craft needs the factors of craft.decompose, but these are from another method: omit them"
            )
        chosen = frozen.targets if targets is None else tuple(targets)
        missing = [target for target in chosen if target not in frozen.targets]
        if missing:
            raise ConfigError(
                f"the factors are for {', '.join(frozen.targets)}, not for {', '.join(missing)}: decompose these too"
            )
        given = {name: value for name, value in options.items() if value is not None}
        ranks = Ranks.parse(given["ranks"]) if "ranks" in given else _largest(frozen)
        try:
            return frozen.select(chosen, ranks), CraftOptions(**given | {"ranks": tuple(ranks)})
        except ValueError as error:
            raise ConfigError(f"--ranks: {error}; decompose at these ranks first") from error

    def build(self, frozen: Factors, options: CraftOptions) -> CraftChange:
        """Initialize K at zero, or as in the paper."""
        return CraftChange(frozen.decompositions, PAPER_NOISE * options.init_noise)

    def count(self, shapes: Mapping[str, Shape], options: CraftOptions) -> int:
        """r_layer^2 + r_out^2 + r_in^2 per projection, with the ranks reduced to the dimensions."""
        return sum(Ranks.parse(options.ranks).lowered(shape).count_parameters() for shape in shapes.values())

    def within(self, weights: Weights, options: CraftOptions, budget: int, progress: Progress) -> CraftOptions:
        """The ranks that keep the most energy of the weights with at most `budget` parameters.

        Raises:
            ConfigError: ranks 1,1,1 train more.
            ModelError: the weights cannot be decomposed.
        """
        ranks = propose(weights.stacks, weights.model, most=budget, progress=lambda what: progress(what, 0, 1)).ranks
        return replace(options, ranks=(ranks.out, ranks.in_, ranks.layers))

    def settings(self, frozen: Factors, options: CraftOptions) -> dict[str, Any]:
        """The ranks OUT,IN,LAYERS of every projection."""
        return {"ranks": {target: list(frozen.ranks(target)) for target in frozen.targets}}

    def reduced(self, frozen: Factors, options: CraftOptions) -> str:
        """The requested ranks, if a dimension is smaller."""
        asked = Ranks.parse(options.ranks)
        return "" if all(frozen.ranks(it) == asked for it in frozen.targets) else f", reduced from {asked}"

    def options(self, settings: Mapping[str, Any]) -> CraftOptions:
        """The largest ranks of all projections; other options do not apply to a trained adapter."""
        ranks = settings.get("ranks")
        if not (isinstance(ranks, dict) and ranks and all(_are_ranks(each) for each in ranks.values())):
            raise ValueError("its ranks are not three positive integers per projection")
        if set(ranks) != set(settings["targets"]):
            raise ValueError("its ranks do not match its targets")
        out, in_, layers = (max(sizes) for sizes in zip(*ranks.values(), strict=True))
        return CraftOptions(ranks=(out, in_, layers))

    def unlike(self, frozen: Factors, options: CraftOptions, wanted: CraftOptions) -> str | None:
        """How the ranks differ from those of the run; see `Method`."""
        for target, shape in frozen.shapes.items():
            if Ranks.parse(wanted.ranks).lowered(shape) != frozen.ranks(target):
                return f"has ranks {frozen.ranks(target)}; pass --ranks {_largest(frozen)}"
        return None

    def read(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> Factors:
        """Read the factors from an adapter's file."""
        return from_tensors(tensors, header, path)

    def recall(
        self, record: Mapping[str, Any], path: Path, cache_dir: str | None, *, make: bool, trusted: bool = False
    ) -> Factors:
        """The factors that an adapter refers to."""
        return recall_factors(record, path, cache_dir, make=make, trusted=trusted)

    def trained_shapes(self, frozen: Factors, options: CraftOptions) -> dict[str, tuple[int, ...]]:
        """K (r, r) of every projection and mode."""
        return {
            f"transform.{target}.{mode}": (rank, rank)
            for target, decomposition in frozen.decompositions.items()
            for mode, rank in zip(MODES, decomposition.ranks, strict=True)
        }

    def chains_in_turn(
        self, frozen: Factors, settings: Mapping[str, Any], trained: Mapping[str, Tensor], projection: str
    ) -> Iterator[Chain]:
        """Iterate over U_in, S_l^T, U_out^T in float64, without computing the slices of all layers at once."""
        decomposition = frozen.decompositions[projection]
        u_in, u_out_t = decomposition.factors[2].double(), decomposition.factors[1].double().T
        for s in slices_in_turn(decomposition, _transforms(trained, projection)):
            yield u_in, s.T, u_out_t

    def facts(
        self, frozen: Factors, settings: Mapping[str, Any], trained: Mapping[str, Tensor], projection: str
    ) -> dict[str, Any]:
        """Ranks OUT,IN,LAYERS, number of trained parameters, and the norm of every K."""
        ranks = frozen.ranks(projection)
        norms = {mode: float(k.double().norm()) for mode, k in _transforms(trained, projection).items()}
        return {"ranks": list(ranks), "parameters": ranks.count_parameters(), "k_norms": norms}

    def describe(self, settings: Mapping[str, Any]) -> Description:
        """Describe it by the ranks, without repetition."""
        ranks = settings["ranks"]
        each = ranks.values() if isinstance(ranks, Mapping) else [Ranks.parse(ranks)]
        size = " | ".join(dict.fromkeys(",".join(map(str, one)) for one in each))
        return Description(
            title=self.title,
            size=size,
            settings=f"ranks {size} (OUT,IN,LAYERS)",
            trained="in the transforms of",
            source=f"{self.idea} ({self.paper})",
        )


def _transforms(trained: Mapping[str, Tensor], projection: str) -> dict[str, Tensor]:
    return {mode: trained[f"transform.{projection}.{mode}"] for mode in MODES}


def _are_ranks(ranks: object) -> bool:
    """Whether these are valid ranks OUT,IN,LAYERS."""
    return isinstance(ranks, list) and len(ranks) == 3 and all(type(n) is int and 0 < n <= 1 << 20 for n in ranks)


def _largest(frozen: Factors) -> Ranks:
    return Ranks(*(max(sizes) for sizes in zip(*(frozen.ranks(target) for target in frozen.targets), strict=True)))


METHOD = Craft()
