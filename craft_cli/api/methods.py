"""List the methods, and count their trained parameters on a model."""

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
    """A method in the list.

    Attributes:
        name: value of `--method`.
        title: display name.
        idea: one-line description.
        paper: `arXiv NUMBER`.
        size: default rank or ranks.
        settings: all default settings, as text.
        parameters: trained parameters on the model with these.
        budget_size: rank or ranks within the budget.
        budget_settings: all settings within the budget.
        budget_parameters: trained parameters with these.
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
    """List all adapter methods.

    Args:
        model: Hub id, folder or `demo`. Default: no counts.
        targets: projections to adapt.
        budget: maximum trained parameters, such as `16k`.
        trust_remote_code: run Python code from the model's repository.
        progress: called with a description of the current step.

    Raises:
        ConfigError: a budget is given without a model.
        CraftError: the model is missing, damaged or unsupported.
    """
    if budget is not None and model is None:
        raise ConfigError("--budget requires --model, because parameters depend on its dimensions")
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
        progress(f"{method.name} within {most:,} parameters")
        try:
            within = method.within(weights, options, most, lambda what, done, total: progress(what))
        except ConfigError as error:
            found["problem"] = str(error)
        else:
            words = method.describe(asdict(within))
            found |= {"budget_size": words.size, "budget_settings": words.settings}
            found["budget_parameters"] = method.count(weights.shapes, within)
    return Listed(method.name, method.title, method.idea, method.paper, **found)
