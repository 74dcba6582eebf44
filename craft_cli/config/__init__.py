"""Settings, the options of the methods among them, and recipes. Nothing here needs torch, so that `--help` stays fast."""

from craft_cli.config.options import (
    METHOD_OPTIONS,
    CraftOptions,
    LoraOptions,
    option_names,
    parse_ranks,
)
from craft_cli.config.recipes import describe_recipe, load_recipe, recipe_path, shipped_recipes
from craft_cli.config.settings import (
    AUTO,
    GROUPS,
    LISTS,
    THRESHOLD,
    THRESHOLD_KEY,
    TRACKERS,
    ProblemType,
    RunConfig,
    TaskType,
    flag,
    free_settings,
    parse_settings,
)

__all__ = [
    "AUTO",
    "GROUPS",
    "LISTS",
    "METHOD_OPTIONS",
    "THRESHOLD",
    "THRESHOLD_KEY",
    "TRACKERS",
    "CraftOptions",
    "LoraOptions",
    "ProblemType",
    "RunConfig",
    "TaskType",
    "describe_recipe",
    "flag",
    "free_settings",
    "load_recipe",
    "option_names",
    "parse_ranks",
    "parse_settings",
    "recipe_path",
    "shipped_recipes",
]
