"""The plan of a sweep: shared settings, search spaces and sampling. It does not change when the sweep is resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from craft_cli.config import RunConfig, flag
from craft_cli.config.options import owners
from craft_cli.errors import ConfigError, nearest
from craft_cli.files import read_json, write_json
from craft_cli.sweeps.space import (
    Range,
    Space,
    Values,
    build,
    default_space,
    grid,
    methods_of,
    own,
    size,
    space_of,
)
from craft_cli.training.resume import comparable

SAMPLERS = ("grid", "random", "tpe")
PRUNERS = ("none", "median", "hyperband")
TRIALS = 20
"""Default number of trials of a sampled sweep without a time limit."""
PLAN_FILE = "sweep.json"


@dataclass(frozen=True)
class Plan:
    """The settings that a sweep compares.

    Attributes:
        recipes: settings shared by all trials of a method, as in a recipe, by method.
        spaces: search space by method.
        seeds: seeds of the runs of each setting.
        sampler: `grid`, `random` or `tpe`.
        pruner: `none`, `median` or `hyperband`.
        metric: metric on the validation rows that chooses the best setting.
    """

    recipes: Mapping[str, Mapping[str, Any]]
    spaces: Mapping[str, Space]
    seeds: tuple[int, ...]
    sampler: str
    pruner: str
    metric: str = ""

    @property
    def methods(self) -> list[str]:
        """The compared methods."""
        return list(self.recipes)

    @property
    def varied(self) -> list[str]:
        """The settings that differ between trials, without the method."""
        varied = [name for space in self.spaces.values() for name in space]
        return list(dict.fromkeys(name for name in varied if any(size({name: s[name]}) > 1 for s in self.having(name))))

    def having(self, name: str) -> list[Space]:
        """The spaces that have this setting."""
        return [space for space in self.spaces.values() if name in space]

    def settings(self) -> list[tuple[str, dict[str, Any]]]:
        """All combinations of a grid, method by method."""
        return [(method, setting) for method, space in self.spaces.items() for setting in grid(space)]

    def start_of(self, method: str) -> dict[str, Any]:
        """The recipe's values of the searched settings, if they are in the space; a sampled sweep starts with them."""
        config = build(self.recipes[method], {}, self.seeds[0])
        own_values = {name: config.recipe().get(name) for name in self.spaces[method]}
        return {name: value for name, value in own_values.items() if value in self.spaces[method][name]}

    def run(self, method: str, setting: Mapping[str, Any], seed: int) -> RunConfig:
        """The settings of one run."""
        return build(self.recipes[method], setting, seed)

    def record(self) -> dict[str, Any]:
        """The plan as JSON."""
        spaces = {
            method: {name: asdict(it) if isinstance(it, Range) else list(it) for name, it in space.items()}
            for method, space in self.spaces.items()
        }
        return asdict(self) | {"spaces": spaces, "seeds": list(self.seeds)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Plan:
        """Parse the result of `record`."""
        read = lambda it: Range(**it) if isinstance(it, Mapping) else tuple(it)  # noqa: E731
        spaces = {method: {name: read(it) for name, it in space.items()} for method, space in record["spaces"].items()}
        return cls(**{**record, "spaces": spaces, "seeds": tuple(record["seeds"])})

    def differences(self, other: Plan) -> list[str]:
        """Differences from another plan, such as `--seeds was 1,2, is 1,2,3`."""
        mine, theirs = _told(self), _told(other)
        names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
        return [f"{name} was {mine.get(name, 'not given')}, is {theirs.get(name, 'not given')}" for name in names]


def _told(plan: Plan) -> dict[str, str]:
    """A plan as command-line flags."""
    flags_of_plan = {
        "--set method": ",".join(plan.methods),
        "--seeds": ",".join(map(str, plan.seeds)),
        "--sampler": plan.sampler,
        "--pruner": plan.pruner,
    }
    for method, recipe in plan.recipes.items():
        flags_of_plan |= {flag(name): str(value) for name, value in recipe.items() if name != "method"}
        flags_of_plan |= {f"--set {name}": shown(values) for name, values in plan.spaces[method].items()}
    return flags_of_plan


def shown(values: Values) -> str:
    """Values in the syntax of --set."""
    if isinstance(values, Range):
        return str(values)
    return ("/" if any("," in str(value) for value in values) else ",").join(map(str, values))


def make_plan(
    flags: Mapping[str, Any],
    recipe: Mapping[str, Any],
    sets: Space,
    *,
    seeds: Sequence[int] | None = None,
    trials: int | None = None,
    timed: bool = False,
    sampler: str | None = None,
    pruner: str | None = None,
    former: Plan | None = None,
) -> Plan:
    """Make a plan and check it: every setting that is known in advance is validated, and the data is read.

    Args:
        flags: settings of all trials, by field name.
        recipe: settings of a recipe; flags override them.
        sets: result of `parse_sets`.
        seeds: seeds of each setting. Default: the seed of the recipe.
        trials: requested number of trials.
        timed: whether a time limit is given.
        sampler: Default: a grid, if values are listed and no number of trials is given.
        pruner: Default: `median` for sampled trials.
        former: plan of the sweep to resume, which completes what is not given.

    Raises:
        ConfigError: settings cannot be combined, or are unknown.
    """
    flags = {name: value for name, value in flags.items() if value is not None}
    for kind, asked, known in (("--sampler", sampler, SAMPLERS), ("--pruner", pruner, PRUNERS)):
        if asked is not None and asked not in known:
            raise ConfigError(f"{kind}: unknown value '{asked}'{nearest(asked, known)}")
    if former and not (flags or recipe):
        methods = methods_of(sets, former.methods[0]) if "method" in sets else tuple(former.methods)
        first = next(iter(former.recipes.values()))
        recipes = {method: dict(former.recipes.get(method, own(first, method))) for method in methods}
    else:
        methods = methods_of(sets, str(flags.get("method") or recipe.get("method") or RunConfig.method))
        recipes = {method: _shared(flags, recipe, method) for method in methods}
        for name in flags:
            if owners(name) and not set(owners(name)) & set(methods):
                raise ConfigError(
                    f"{flag(name)} is for --method {' or '.join(owners(name))}, not {' or '.join(methods)}"
                )
    if sampler is None and former is None:
        sampler = "grid" if _is_grid(sets, trials, timed) else "tpe"
    sampler = sampler or (former.sampler if former else "tpe")
    if pruner is None:
        pruner = former.pruner if former else "none" if sampler == "grid" else "median"
    if former and not sets:
        spaces: Mapping[str, Space] = former.spaces
    elif sampler == "grid" or set(sets) - {"method"}:
        spaces = {method: space_of(method, sets) for method in methods}
    else:
        spaces = {method: default_space(recipes[method]) for method in methods}
    one_seed = next(iter(recipes.values())).get("seed", RunConfig.seed)
    seeds = seeds or (former.seeds if former else (one_seed,))
    recipes = {method: {n: value for n, value in it.items() if n != "seed"} for method, it in recipes.items()}
    plan = Plan(recipes, spaces, tuple(dict.fromkeys(seeds)), sampler, pruner)
    _check(plan, trials)
    metric = former.metric if former else _metric(plan)
    return Plan(**{**vars(plan), "metric": metric})


def _is_grid(sets: Space, trials: int | None, timed: bool) -> bool:
    """Whether to try all combinations: values are listed, and no number of trials is given."""
    if not sets or trials is not None or any(isinstance(values, Range) for values in sets.values()):
        return False
    return not timed or bool(set(sets) - {"method"})


def _shared(flags: Mapping[str, Any], recipe: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The shared settings of a method's trials, as a recipe that is valid from any folder."""
    config = RunConfig.build(own(flags, method), own(recipe, method))
    if config.eval_strategy == "no":
        raise ConfigError("--eval-strategy no: a sweep requires evaluations; use epoch or steps")
    given = {"method", *flags, *recipe}
    return {
        name: comparable(name, value)
        for name, value in config.recipe().items()
        if name in given or (name == "eval_strategy" and "eval_steps" in given)
    }


def _check(plan: Plan, trials: int | None) -> None:
    if plan.sampler == "grid":
        if trials is not None:
            raise ConfigError("--trials: a grid tries all combinations; remove it, or pass --sampler tpe")
        if plan.pruner != "none":
            raise ConfigError("--pruner: a grid trains every setting to the end; remove it")
        asked = plan.settings()
    else:
        asked = [
            (method, {name: value})
            for method, space in plan.spaces.items()
            for name, values in space.items()
            for value in ((values.low, values.high) if isinstance(values, Range) else values)
        ]
        there = sum(map(size, plan.spaces.values()))
        if (trials or 0) > there:
            raise ConfigError(f"--trials {trials}: there are only {there:,} combinations; remove it to try them all")
    problems: list[str] = []
    if plan.having("train_file") and not all(recipe.get("validation_file") for recipe in plan.recipes.values()):
        problems.append("--set train_file: scores would not be comparable; pass one --validation-file for all trials")
    for method, setting in asked:
        try:
            plan.run(method, setting, plan.seeds[0])
        except ConfigError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _metric(plan: Plan) -> str:
    """The metric that chooses the best adapter also chooses the best setting."""
    # Imported here, because showing a finished sweep does not need transformers.
    from craft_cli.data.sources import TRAIN, VALIDATION, DataSource
    from craft_cli.tasks.splits import load_splits
    from craft_cli.training.journal import chosen_metric

    method = plan.methods[0]
    setting = plan.settings()[0][1] if plan.sampler == "grid" else plan.start_of(method)
    config = plan.run(method, setting, plan.seeds[0])
    loaded = load_splits(DataSource.of(config), [TRAIN, VALIDATION])
    return chosen_metric(config, loaded.task, [name for name in loaded.splits if name != TRAIN])


@dataclass(frozen=True)
class Header:
    """The contents of sweep.json.

    Attributes:
        name: name of the sweep in its storage.
        plan: plan of the sweep.
        elsewhere: whether the storage is outside the folder. Its URL is not saved, because it can hold a password.
        trials: number of trials; None if only the time limits them.
    """

    name: str
    plan: Plan
    elsewhere: bool
    trials: int | None


def write_header(folder: Path, header: Header) -> None:
    """Write sweep.json."""
    write_json(folder / PLAN_FILE, vars(header) | {"plan": header.plan.record()})


def read_header(folder: Path) -> Header:
    """Read sweep.json.

    Raises:
        ConfigError: there is no sweep, or another version wrote it.
    """
    content = read_json(folder / PLAN_FILE)
    try:
        return Header(**content | {"plan": Plan.of(content["plan"])})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / PLAN_FILE} was written by another version of craft; start a new sweep") from error


def trials_wanted(plan: Plan, trials: int | None, timed: bool) -> int | None:
    """The number of trials; None if only the time limits them."""
    if plan.sampler == "grid":
        return len(plan.settings())
    there = sum(map(size, plan.spaces.values()))
    return trials or (None if timed else TRIALS if there == math.inf else min(TRIALS, int(there)))
