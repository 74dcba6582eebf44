"""The search space of each method: values of `--set`, a range, or the default space."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from craft_cli.config import GROUPS, METHOD_OPTIONS, RunConfig, flag, parse_settings
from craft_cli.config.names import join_names
from craft_cli.config.options import LEARNING_RATES, owners
from craft_cli.errors import ConfigError, nearest

_AROUND = 10.0
"""Factors of the default learning rates: from a tenth to ten times the method's default."""
DEFAULT_RATES = ("learning_rate", "head_learning_rate")
"""Settings in every default space, around the method's own value."""
DEFAULT_CHOICES: dict[str, tuple[Any, ...]] = {"ranks": ("32,32,4", "64,64,8", "128,128,8"), "rank": (2, 4, 8, 16)}
"""Further choices in the default space, for methods that have the option; the method's own value is added."""
_MEASURED_BY = (
    "task", "task_type", "data_dir", "dataset_name", "dataset_config_name", "validation_file", "validation_split",
    "validation_share", "max_eval_samples", "label_column", "label_separator", "problem_type", "metric_for_best_model",
)  # fmt: skip
"""Settings that define the score or its rows, which a sweep cannot vary."""


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, on a logarithmic scale if `low` is above zero."""

    low: float
    high: float
    whole: bool = False

    @property
    def log(self) -> bool:
        """Whether the scale is logarithmic."""
        return self.low > 0

    def rounded(self, value: float) -> float:
        """Round a sampled number for readability."""
        return value if self.whole else min(max(float(f"{value:.4g}"), self.low), self.high)

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


Values = tuple[Any, ...] | Range
"""Choices or a range of one setting, with values as in a recipe."""
Space = dict[str, Values]
"""Values by setting name."""


def parse_sets(words: Sequence[str]) -> Space:
    """Parse `learning_rate=1e-3,3e-3`, `ranks=64,64,8/32,32,4` or `learning_rate=1e-4..1e-2`.

    Raises:
        ConfigError: a value is invalid; one line for each problem.
    """
    space: Space = {}
    problems = []
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        try:
            if not equals or not text.strip():
                raise ConfigError(f"--set {word}: expected NAME=VALUE,VALUE such as learning_rate=1e-3,3e-3")
            if name in space:
                raise ConfigError(f"--set {name}: given twice; list all values in one --set")
            space[name] = _parse(name, text)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return space


def _parse(name: str, text: str) -> Values:
    groups = RunConfig.groups()
    if name not in groups:
        raise ConfigError(f"--set {name}: no such setting{nearest(name, groups)}")
    if name == "seed":
        raise ConfigError("--set seed: pass --seeds, whose runs are averaged")
    if name in _MEASURED_BY:
        raise ConfigError(f"--set {name}: scores would not be comparable; pass {flag(name)} for all trials")
    if groups[name] == GROUPS[-1]:
        raise ConfigError(f"--set {name}: a sweep cannot vary this setting; pass {flag(name)}, or remove it")
    hint = str(get_type_hints(RunConfig)[name])
    low, dots, high = text.partition("..")
    if dots and ("int" in hint or "float" in hint) and "tuple" not in hint:
        ends = [_value(name, end) for end in (low, high)]
        if not all(isinstance(end, (int, float)) and math.isfinite(end) for end in ends) or ends[0] >= ends[1]:
            raise ConfigError(f"--set {name}={text}: expected two numbers LOW..HIGH, the lower one first")
        return Range(ends[0], ends[1], whole="float" not in hint)
    parts = text.split("/" if "tuple" in hint else ",")
    return tuple(dict.fromkeys(_value(name, part) for part in parts))


def _value(name: str, text: str) -> Any:
    """Parse one value in recipe form; None for `none`, if the setting is optional."""
    default = next(field.default for field in dataclasses.fields(RunConfig) if field.name == name)
    if text.strip() == "none" and default is None:
        return None
    try:
        value = parse_settings({name: text.strip()})[name]
    except ConfigError as error:
        raise ConfigError(str(error).replace(flag(name), f"--set {name}", 1)) from None
    return plain(value)


def plain(value: Any) -> Any:
    """Convert a value to its recipe form."""
    return join_names(map(str, value)) if isinstance(value, tuple) else value


def methods_of(space: Space, base: str) -> tuple[str, ...]:
    """The methods to try.

    Args:
        space: result of `parse_sets`.
        base: the method, if `space` does not name one.

    Raises:
        ConfigError: an option belongs to none of the methods.
    """
    named = space.get("method", (base,))
    methods = named if isinstance(named, tuple) else (base,)
    for name in space:
        if owners(name) and not set(owners(name)) & set(methods):
            raise ConfigError(f"--set {name} is for --method {' or '.join(owners(name))}, not {' or '.join(methods)}")
    return methods


def own(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings that apply to this method, without its name."""
    kept = {name: value for name, value in settings.items() if not owners(name) or method in owners(name)}
    return kept | {"method": method}


def space_of(method: str, sets: Space) -> Space:
    """The space of one method, without the options of other methods."""
    return {name: values for name, values in own(sets, method).items() if name != "method"}


def default_space(recipe: Mapping[str, Any]) -> Space:
    """The default space of a method: learning rates, and options that set the number of trained parameters.

    Args:
        recipe: the given settings, including the method. Choices that cannot be combined with them are dropped.
    """
    given = RunConfig.build(recipe=recipe)
    config = given.completed()
    usual = {"learning_rate": LEARNING_RATES[config.method], "head_learning_rate": RunConfig.head_learning_rate}
    space: Space = {}
    for name in DEFAULT_RATES:
        rate = getattr(config, name) or usual[name]
        space[name] = Range(rate / _AROUND, rate * _AROUND)
    for name, choices in () if given.budget else DEFAULT_CHOICES.items():
        if name not in {field.name for field in dataclasses.fields(METHOD_OPTIONS[config.method])}:
            continue
        mine = plain(getattr(config, name))
        with_mine = choices if mine in choices else (mine, *choices)
        if all(_fits(recipe, {name: value}) for value in with_mine):
            space[name] = with_mine
    return space


def _fits(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    try:
        RunConfig.build(recipe=recipe, flags=settings)
    except ConfigError:
        return False
    return True


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """All combinations of the values, the last setting changing fastest.

    Raises:
        ConfigError: the space contains a range.
    """
    for name, values in space.items():
        if isinstance(values, Range):
            raise ConfigError(f"--set {name}={values}: a grid requires values; list them, or pass --trials")
    for combination in itertools.product(*space.values()):  # type: ignore[arg-type]
        yield dict(zip(space, combination, strict=True))


def size(space: Space) -> float:
    """The number of combinations."""
    return math.prod(math.inf if isinstance(values, Range) else len(values) for values in space.values())


def build(recipe: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> RunConfig:
    """Build the configuration of a run from a setting and a seed.

    Args:
        recipe: settings shared by all trials of the method.
        settings: settings of the trial; None removes a setting of the recipe.
        seed: seed of the run.

    Raises:
        ConfigError: the settings cannot be combined.
    """
    shared = {name: value for name, value in recipe.items() if name not in settings}
    return RunConfig.build(recipe=shared, flags={**settings, "seed": seed})
