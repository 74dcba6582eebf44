"""The options of each method, and the `setting` helper that declares a setting."""

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
    """A dataclass field with a help text.

    Args:
        default: the default value.
        text: the help text.
        free: a resumed run may change the setting, because it does not affect what an update computes.
        start: the setting describes the initialization; a run that starts from another adapter does not inherit it.
    """
    return dataclasses.field(default=default, metadata={"help": text, "free": free, "start": start})


@dataclass(frozen=True)
class CraftOptions:
    """Options of `--method craft`."""

    own_rate: ClassVar[float] = 3e-3
    keeps_factors: ClassVar[bool] = True

    ranks: tuple[int, int, int] = setting(
        (64, 64, 8), "Multilinear ranks; a rank above its dimension is reduced to it."
    )
    init_noise: bool = setting(
        False,
        "Initialize as in the paper, J = I + 0.01 N(0, 0.02^2), instead of exactly at the base model.",
        start=True,
    )


@dataclass(frozen=True)
class LoraOptions:
    """Options of `--method lora`, named as in peft."""

    own_rate: ClassVar[float] = 1e-3
    keeps_factors: ClassVar[bool] = False

    rank: Positive = setting(8, "Rank of the update of each weight.")
    alpha: Alpha = setting(16.0, "Scale of the update: alpha / rank.")
    lora_dropout: Annotated[float, Ge(0.0), Lt(1.0)] = setting(0.0, "Dropout on the input of A.")
    use_rslora: bool = setting(False, "Scale the update by alpha / sqrt(rank) (rsLoRA).")


@dataclass(frozen=True)
class PissaOptions:
    """Options of `--method pissa`."""

    own_rate: ClassVar[float] = 1e-3
    keeps_factors: ClassVar[bool] = True

    rank: Positive = setting(8, "Leading singular vectors of each weight to train.")
    alpha: Alpha = setting(16.0, "Scale of the update: alpha / rank.")
    pissa_niter: Positive | None = setting(
        None, "Iterations of the randomized SVD, as in peft's pissa_niter_N. Default: exact SVD."
    )


@dataclass(frozen=True)
class LoraXsOptions:
    """Options of `--method lora-xs`."""

    own_rate: ClassVar[float] = 1e-2
    keeps_factors: ClassVar[bool] = True

    rank: Positive = setting(25, "Leading singular vectors of each weight; R is rank x rank.")
    alpha: Alpha = setting(16.0, "Scale of the update: alpha / rank.")


@dataclass(frozen=True)
class LotrOptions:
    """Options of `--method lotr`."""

    own_rate: ClassVar[float] = 3e-3
    keeps_factors: ClassVar[bool] = False

    rank: Positive = setting(8, "Rank of the update of each weight.")
    alpha: Alpha = setting(1.0, "Scale of the update: alpha / rank.")
    lotr_share: Literal["all", "projection"] = setting(
        "all", "Weights that share A and B: all (they must have one shape) or those of a projection."
    )
    lotr_start: Literal["random", "svd"] = setting(
        "random",
        "Initialization of A and B: random, N(0, 1); svd, the bases of the stacked weights (Tucker-2).",
        start=True,
    )


@dataclass(frozen=True)
class SuperloraOptions:
    """Options of `--method superlora`."""

    own_rate: ClassVar[float] = 1e-2
    keeps_factors: ClassVar[bool] = False

    rank: Positive = setting(8, "Rank of each factor.")
    superlora_groups: Annotated[int, Gt(0), Le(4096)] = setting(
        1, "Groups that the concatenated updates of all weights are split into."
    )
    superlora_order: Annotated[int, Ge(2), Le(8)] = setting(
        2, "Order of the tensor each group is folded into: 2 is a product of two matrices, 3 or more is Tucker."
    )
    superlora_splits: Annotated[int, Gt(0), Le(8)] = setting(1, "Kronecker factors of each group.")
    superlora_projection: Annotated[float, Gt(0.0), Lt(1.0)] | None = setting(
        None, "Share of a group's entries that is trained; a fixed fastfood projection maps them to all entries."
    )
    superlora_seed: Annotated[int, Ge(0), Lt(1 << 32)] = setting(0, "Random seed of the fastfood projection.")


METHOD_OPTIONS: dict[str, Any] = {
    "craft": CraftOptions,
    "lora": LoraOptions,
    "pissa": PissaOptions,
    "lora-xs": LoraXsOptions,
    "lotr": LotrOptions,
    "superlora": SuperloraOptions,
}
"""Options class by method name."""
MethodName = Literal["craft", "lora", "pissa", "lora-xs", "lotr", "superlora"]

LEARNING_RATES: dict[str, float] = {name: options.own_rate for name, options in METHOD_OPTIONS.items()}
"""Default learning rate by method name."""
WITH_FACTORS = [name for name, options in METHOD_OPTIONS.items() if options.keeps_factors]
"""Methods with factors of the base, which an adapter can store by reference."""


def of_each(name: str) -> str:
    """The defaults of an option shared by several methods, as help text."""
    methods_by_default: dict[Any, list[str]] = {}
    for method, options in METHOD_OPTIONS.items():
        for field in dataclasses.fields(options):
            if field.name == name:
                methods_by_default.setdefault(field.default, []).append(method)
    return "; ".join(f"{value:g} for {', '.join(methods)}" for value, methods in methods_by_default.items())


@dataclass(frozen=True)
class MethodOptions(CraftOptions, LoraOptions, PissaOptions, LoraXsOptions, LotrOptions, SuperloraOptions):
    """The options of all methods. One that several methods share, with different defaults, is None until the method is known."""

    rank: Positive | None = setting(None, f"Rank of the update. Default: {of_each('rank')}.")  # type: ignore[assignment]
    alpha: Alpha | None = setting(  # type: ignore[assignment]
        None, f"Scale of the update: alpha / rank. Default: {of_each('alpha')}."
    )


def option_names(method: str, *, start: bool = True) -> list[str]:
    """The option names of a method, with or without those of its initialization; empty for an unknown method."""
    options = METHOD_OPTIONS.get(method)
    fields = dataclasses.fields(options) if options else ()
    return [field.name for field in fields if start or not field.metadata["start"]]


def owners(name: str) -> list[str]:
    """The methods that have this option; empty for a setting shared by all methods."""
    return [method for method in METHOD_OPTIONS if name in option_names(method)]


def parse_ranks(ranks: str | Sequence[int]) -> tuple[int, int, int]:
    """Parse OUT,IN,LAYERS from `64,64,8` or (64, 64, 8).

    Raises:
        ConfigError: not three positive integers.
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
            f"--ranks: expected three positive integers OUT,IN,LAYERS such as 64,64,8, not {ranks!r}"
        ) from None
    return out, in_, layers


MOST_NUMBERS = 10**12
"""More than any model has."""


def parse_budget(budget: str | int) -> int:
    """Parse a number of trainable parameters, such as 50000, `50k` or `1.5m`.

    Raises:
        ConfigError: it is not a positive number.
    """
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([km]?)", str(budget).strip().lower())
    number = int(float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2]]) if match else 0
    if not 0 < number <= MOST_NUMBERS or isinstance(budget, bool):
        raise ConfigError(f"--budget: expected a number of parameters such as 50000 or 50k, not '{budget}'")
    return number
