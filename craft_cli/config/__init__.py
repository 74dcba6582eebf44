"""Settings, method options and recipes. Nothing here imports torch, so that `--help` stays fast."""

from craft_cli.config.contradictions import TRACKERS, contradictions, flag, no_utf8
from craft_cli.config.options import (
    ALL_LINEAR,
    METHOD_OPTIONS,
    TARGETS,
    CraftOptions,
    LoraOptions,
    LoraXsOptions,
    LotrOptions,
    PissaOptions,
    SuperloraOptions,
    option_names,
    parse_budget,
    parse_ranks,
)
from craft_cli.config.parsing import AUTO, LISTS
from craft_cli.config.recipes import comment, describe_recipe, how_to_repeat, load_recipe, recipe_path, shipped_recipes
from craft_cli.config.settings import (
    GROUPS,
    MERGED_KEY,
    THRESHOLD,
    ProblemType,
    RunConfig,
    TaskType,
    free_settings,
    parse_settings,
)

__all__ = [
    "ALL_LINEAR",
    "AUTO",
    "GROUPS",
    "LISTS",
    "MERGED_KEY",
    "METHOD_OPTIONS",
    "TARGETS",
    "THRESHOLD",
    "TRACKERS",
    "CraftOptions",
    "LoraOptions",
    "LoraXsOptions",
    "LotrOptions",
    "PissaOptions",
    "ProblemType",
    "RunConfig",
    "SuperloraOptions",
    "TaskType",
    "comment",
    "contradictions",
    "describe_recipe",
    "flag",
    "free_settings",
    "how_to_repeat",
    "load_recipe",
    "no_utf8",
    "option_names",
    "parse_budget",
    "parse_ranks",
    "parse_settings",
    "recipe_path",
    "shipped_recipes",
]
