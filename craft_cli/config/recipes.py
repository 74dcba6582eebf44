"""Recipes: settings in YAML files, the shipped ones by their names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from craft_cli.config.settings import RunConfig
from craft_cli.errors import ConfigError, nearest


def load_recipe(name: str) -> dict[str, Any]:
    """The settings in a recipe: a shipped one by its name, or a YAML file.

    Raises:
        ConfigError: there is none, or it is no YAML mapping.
    """
    import yaml

    path = Path(name).expanduser()
    if not (path.suffix in (".yaml", ".yml") or path.is_file()):
        path = recipe_path(name)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"--recipe: {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--recipe: {path}: not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--recipe: {path}: expected lines of the form 'key: value'")
    names = [field.name for field in dataclasses.fields(RunConfig)]
    root: Any = yaml.compose(text, yaml.SafeLoader)
    keys = [key.value for key, _ in root.value]
    for key in content:
        if keys.count(key) > 1:  # YAML would take the last one in silence
            raise ConfigError(f"{path}: '{key}' is there {keys.count(key)} times; keep one")
        if key not in names:
            raise ConfigError(f"{path}: unknown key '{key}'{nearest(str(key), names)}")
    return content


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        ConfigError: there is none of this name.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        raise ConfigError(f"--recipe: no recipe '{name}'{nearest(name, shipped)} (or give a path ending in .yaml)")
    return shipped[name]


def describe_recipe(path: Path) -> str:
    """The first comment of a recipe."""
    with open(path, encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with craft, by name: inside an installed package, or at the top of a checkout."""
    inside = Path(__file__).parent.parent / "recipes"
    folder = inside if inside.is_dir() else Path(__file__).parent.parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
