"""The options of every method, and how a setting is declared."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from craft_cli.errors import ConfigError

Positive = Annotated[int, Gt(0)]

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
"""The projections of a layer: of its attention, and of its MLP."""
ALL_LINEAR = "all-linear"
"""Names every projection that a model has."""


Rate = Annotated[float, Ge(0.0), Lt(math.inf)]
Alpha = Annotated[float, Gt(0.0), Le(1e6)]


def setting(default: Any, text: str, *, free: bool = False, start: bool = False) -> Any:
    """A field with its help; the group is that of the block it stands in.

    Args:
        default: its value where it is not given.
        text: the help.
        free: a resumed run may change it: it decides when something is done or told, not what an update computes.
        start: it says where training starts: a run that starts from another adapter does not take it over.
    """
    return dataclasses.field(default=default, metadata={"help": text, "free": free, "start": start})


@dataclass(frozen=True)
class CraftOptions:
    """What `--method craft` can be told."""

    own_rate: ClassVar[float] = 3e-3
    keeps_factors: ClassVar[bool] = True

    ranks: tuple[int, int, int] = setting(
        (64, 64, 8), "Ranks of the factors; one above its dimension is reduced to it."
    )
    init_noise: bool = setting(
        False, "Start as the paper, J = I + 0.01 N(0, 0.02^2), not exactly at the base model.", start=True
    )


@dataclass(frozen=True)
class LoraOptions:
    """What `--method lora` can be told; the names are peft's."""

    own_rate: ClassVar[float] = 1e-3
    keeps_factors: ClassVar[bool] = False

    rank: Positive = setting(8, "Rank of the change of every weight.")
    alpha: Alpha = setting(16.0, "The change is scaled by alpha / rank.")
    lora_dropout: Annotated[float, Ge(0.0), Lt(1.0)] = setting(0.0, "Dropout of what goes into A.")
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(rank) instead.")


@dataclass(frozen=True)
class PissaOptions:
    """What `--method pissa` can be told."""

    own_rate: ClassVar[float] = 1e-3
    keeps_factors: ClassVar[bool] = True

    rank: Positive = setting(8, "Singular vectors of every weight that are trained.")
    alpha: Alpha = setting(16.0, "The product of A and B is scaled by alpha / rank.")
    pissa_niter: Positive | None = setting(
        None, "Iterations of a randomised SVD, as peft's pissa_niter_N; without, the exact one."
    )


@dataclass(frozen=True)
class LoraXsOptions:
    """What `--method lora-xs` can be told."""

    own_rate: ClassVar[float] = 1e-2
    keeps_factors: ClassVar[bool] = True

    rank: Positive = setting(25, "Singular vectors of every weight between which R is trained.")
    alpha: Alpha = setting(16.0, "The change is scaled by alpha / rank.")


@dataclass(frozen=True)
class LotrOptions:
    """What `--method lotr` can be told."""

    own_rate: ClassVar[float] = 3e-3
    keeps_factors: ClassVar[bool] = False

    rank: Positive = setting(8, "Rank of the change of every weight.")
    alpha: Alpha = setting(1.0, "The change is scaled by alpha / rank.")
    lotr_share: Literal["all", "projection"] = setting(
        "all", "Which weights share A and B: all where they are of one shape, or those of a projection."
    )
    lotr_start: Literal["random", "svd"] = setting(
        "random", "Where A and B start: N(0, 1), or the bases of the stacked weights (Tucker-2).", start=True
    )


@dataclass(frozen=True)
class SuperloraOptions:
    """What `--method superlora` can be told."""

    own_rate: ClassVar[float] = 1e-2
    keeps_factors: ClassVar[bool] = False

    rank: Positive = setting(8, "Rank of every factor.")
    superlora_groups: Annotated[int, Gt(0), Le(4096)] = setting(
        1, "Parts that the changes of all weights, laid end to end, are cut into."
    )
    superlora_order: Annotated[int, Ge(2), Le(8)] = setting(
        2, "Order of the tensor that a part is folded into: 2 is a product of two matrices, more is Tucker."
    )
    superlora_splits: Annotated[int, Gt(0), Le(8)] = setting(1, "Factors of a Kronecker product that a part is.")
    superlora_projection: Annotated[float, Gt(0.0), Lt(1.0)] | None = setting(
        None, "Share of a part's numbers that is built; a fixed fastfood projection makes all of these."
    )
    superlora_seed: Annotated[int, Ge(0), Lt(1 << 32)] = setting(0, "Of that projection.")


METHOD_OPTIONS: dict[str, Any] = {
    "craft": CraftOptions,
    "lora": LoraOptions,
    "pissa": PissaOptions,
    "lora-xs": LoraXsOptions,
    "lotr": LotrOptions,
    "superlora": SuperloraOptions,
}
"""The options of every method, by its name."""
MethodName = Literal["craft", "lora", "pissa", "lora-xs", "lotr", "superlora"]

LEARNING_RATES: dict[str, float] = {name: options.own_rate for name, options in METHOD_OPTIONS.items()}
"""Of every method where none is given."""
WITH_FACTORS = [name for name, options in METHOD_OPTIONS.items() if options.keeps_factors]
"""Methods that keep tensors of the base, to which an adapter may refer."""


def of_each(name: str) -> str:
    """The defaults of an option that several methods have, each with its methods."""
    found: dict[Any, list[str]] = {}
    for method, options in METHOD_OPTIONS.items():
        for field in dataclasses.fields(options):
            if field.name == name:
                found.setdefault(field.default, []).append(method)
    return "; ".join(f"{value:g} for {', '.join(methods)}" for value, methods in found.items())


@dataclass(frozen=True)
class MethodOptions(CraftOptions, LoraOptions, PissaOptions, LoraXsOptions, LotrOptions, SuperloraOptions):
    """The options of all methods, for a run that chooses one. What several have, each with a default of its own, is None."""

    rank: Positive | None = setting(None, f"Rank of the change; without: {of_each('rank')}.")  # type: ignore[assignment]
    alpha: Alpha | None = setting(  # type: ignore[assignment]
        None, f"The change is scaled by alpha / rank; without: {of_each('alpha')}."
    )


def option_names(method: str, *, start: bool = True) -> list[str]:
    """The options of a method, with those of its start or without; none where there is no such method."""
    options = METHOD_OPTIONS.get(method)
    fields = dataclasses.fields(options) if options else ()
    return [field.name for field in fields if start or not field.metadata["start"]]


def owners(name: str) -> list[str]:
    """The methods that have this option; none for a setting of every run."""
    return [method for method in METHOD_OPTIONS if name in option_names(method)]


def parse_ranks(ranks: str | Sequence[int]) -> tuple[int, int, int]:
    """OUT,IN,LAYERS from `64,64,8` or (64, 64, 8).

    Raises:
        ConfigError: not three positive whole numbers.
    """
    try:
        parts = ranks.split(",") if isinstance(ranks, str) else list(ranks)
        if any(isinstance(part, (bool, float)) for part in parts):
            raise ValueError
        out, in_, layers = (int(part) for part in parts)
        if min(out, in_, layers) < 1:
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(
            f"--ranks: expected three positive whole numbers OUT,IN,LAYERS such as 64,64,8, not '{ranks}'"
        ) from None
    return out, in_, layers


MOST_NUMBERS = 10**12
"""No model has as many."""


def parse_budget(budget: str | int) -> int:
    """A number of trained numbers; `50k` and `1.5m` are understood.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([km]?)", str(budget).strip().lower())
    number = int(float(found[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[found[2]]) if found else 0
    if not 0 < number <= MOST_NUMBERS or isinstance(budget, bool):
        raise ConfigError(f"--budget: expected a number of trained numbers such as 50000 or 50k, not '{budget}'")
    return number
