"""Use-case: which methods there are, and how many numbers each trains on a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from craft_cli.config import RunConfig, parse_budget
from craft_cli.errors import ConfigError
from craft_cli.methods import METHODS, method_named
from craft_cli.methods.base import Method
from craft_cli.models.stacks import Weights, find_checkpoint, read_weights


@dataclass(frozen=True)
class Listed:
    """A method.

    Attributes:
        name: after `--method`.
        title: as people write it.
        idea: what is trained, in a line.
        paper: `arXiv NUMBER`.
        size: its default rank or ranks.
        settings: all its defaults in words.
        parameters: numbers it trains on the model at these.
        budget_size: the rank or ranks within the budget.
        budget_settings: all its settings then.
        budget_parameters: numbers it trains at these.
        problem: why nothing fits the budget.
    """

    name: str
    title: str
    idea: str
    paper: str
    size: str
    settings: str
    parameters: int | None = None
    budget_size: str | None = None
    budget_settings: str | None = None
    budget_parameters: int | None = None
    problem: str | None = None


def list_methods(
    model: str | None = None,
    *,
    targets: Sequence[str] = RunConfig.targets,
    budget: str | int | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Listed]:
    """All adapter methods.

    Args:
        model: hub id, folder or `demo`; nothing is counted without.
        targets: the projections to adapt.
        budget: numbers trained at most, such as `16k`.
        trust_remote_code: run Python code that comes with the model.
        progress: called with what is being done.

    Raises:
        ConfigError: a budget without a model.
        CraftError: the model is missing, damaged or unsupported.
    """
    if budget is not None and model is None:
        raise ConfigError("--budget needs --model: numbers depend on its dimensions")
    most = None if budget is None else parse_budget(budget)
    weights = None
    if model is not None:
        weights = read_weights(find_checkpoint(model, targets, trust_remote_code=trust_remote_code), targets)
    return [_listed(method_named(name), weights, most, progress) for name in METHODS]


def _listed(method: Method, weights: Weights | None, most: int | None, progress: Callable[[str], None]) -> Listed:
    options = method.Options()
    words = method.describe(asdict(options))
    found: dict[str, Any] = {"size": words.size, "settings": words.settings}
    if weights is not None:
        found["parameters"] = method.count(weights.shapes, options)
    if weights is not None and most is not None:
        progress(f"{method.name} within {most:,} numbers")
        try:
            within = method.within(weights, options, most, lambda what, done, total: progress(what))
        except ConfigError as error:
            found["problem"] = str(error)
        else:
            words = method.describe(asdict(within))
            found |= {"budget_size": words.size, "budget_settings": words.settings}
            found["budget_parameters"] = method.count(weights.shapes, within)
    return Listed(method.name, method.title, method.idea, method.paper, **found)
