"""The options of every method, and how a setting is declared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from craft_cli.errors import ConfigError

Positive = Annotated[int, Gt(0)]


Rate = Annotated[float, Ge(0.0), Lt(math.inf)]


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

    ranks: tuple[int, int, int] = setting((64, 64, 8), "OUT,IN,LAYERS; a rank above its dimension is lowered.")
    init_noise: bool = setting(
        False, "Start as the paper, J = I + 0.01 N(0, 0.02^2), not exactly at the base model.", start=True
    )


@dataclass(frozen=True)
class LoraOptions:
    """What `--method lora` can be told; the names are peft's."""

    rank: Positive = setting(8, "Rank of the change of every weight.")
    alpha: Annotated[float, Gt(0.0), Le(1e6)] = setting(16.0, "The change is scaled by alpha / rank.")
    lora_dropout: Annotated[float, Ge(0.0), Lt(1.0)] = setting(0.0, "Dropout of what goes into A.")
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(rank) instead.")


@dataclass(frozen=True)
class MethodOptions(LoraOptions, CraftOptions):
    """The options of all methods, for a run that chooses one."""


MethodName = Literal["craft", "lora"]
METHOD_OPTIONS: dict[str, Any] = {"craft": CraftOptions, "lora": LoraOptions}
"""The options of every method, by its name."""


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
