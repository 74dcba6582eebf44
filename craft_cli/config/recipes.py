"""Recipes: settings in YAML files. Shipped recipes are known by name."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from pathlib import Path
from typing import Any, get_type_hints

from craft_cli.config.settings import RunConfig
from craft_cli.errors import ConfigError, nearest, plain

MOST_BYTES = 100_000
"""Maximum size of a recipe; a larger file is something else."""
_DATA = ("data_dir", "train_file", "validation_file")
_FOLDERS = ("model", "init_from")
"""Settings that hold a local path or a name."""
_TYPES = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
    "null": r"~|null|Null|NULL|",
}
"""Scalars of YAML 1.2 that are not strings. In YAML 1.1 `no` would be false, `12:30` 750 and `010` 8."""


def load_recipe(name: str) -> dict[str, Any]:
    """Read the settings of a recipe: a shipped one by name, or a YAML file. Text settings are kept as written.

    Data paths in a recipe file are relative to the file. So are `model` and `init_from` if such a folder exists there.

    Raises:
        ConfigError: the recipe does not exist, or it is not a YAML mapping.
    """
    import yaml

    path = Path(name).expanduser()
    if not (path.suffix in (".yaml", ".yml") or path.is_file()):
        path = recipe_path(name)
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ConfigError(f"--recipe: {path}: larger than {MOST_BYTES // 1000} kB, so it is not a recipe")
        settings = _settings(data.decode(), path)
        return settings if path in shipped_recipes().values() else settings | _beside(path.parent, settings)
    except FileNotFoundError:
        raise ConfigError(f"--recipe: {path}: no such file") from None
    except PermissionError as error:
        raise ConfigError(f"--recipe: cannot read {path}: {error.strerror}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = plain(" ".join(str(error).split()))[:200]
        raise ConfigError(f"--recipe: {path}: invalid YAML: {reason}") from error


def _beside(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Resolve the paths in a recipe against its folder."""
    resolved = {}
    for name in (*_DATA, *_FOLDERS):
        value = settings.get(name)
        if isinstance(value, str) and not value.startswith(("~", "/")):
            path = folder / value
            if name in _DATA or value.startswith(".") or path.is_dir():
                resolved[name] = str(path)
    return resolved


def _settings(text: str, path: Path) -> dict[str, Any]:
    import yaml

    loader = _loader()(text)
    root = loader.get_single_node()
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"--recipe: {path}: expected lines of the form 'key: value'")
    hints, names = get_type_hints(RunConfig), [field.name for field in dataclasses.fields(RunConfig)]
    found: dict[str, Any] = {}
    for key_node, node in root.value:
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
        if key in found:  # YAML would silently use the last one
            count = [other.value for other, _ in root.value].count(key)
            raise ConfigError(f"{path}: '{key}' appears {count} times; keep one")
        if key not in names:
            raise ConfigError(f"{path}: unknown key '{plain(key[:80])}'{nearest(key[:80], names)}")
        is_text = isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":null")
        keeps = is_text and not {"int", "float", "bool"} & set(re.findall(r"\w+", str(hints[key])))
        try:
            found[key] = node.value if keeps else loader.construct_object(node, deep=True)
        except (LookupError, AttributeError):  # PyYAML raises these for `!!bool maybe`
            kind = node.tag.rpartition(":")[2]
            raise ValueError(f"'{key}' is not a valid !!{kind}") from None
    return found


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """A loader for YAML 1.2 scalars that refuses aliases, since these can expand without bound."""

        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(
                    None, None, "aliases are not supported in a recipe; write the value out", mark
                )
            return super().compose_node(parent, index)

    for kind, pattern in _TYPES.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), None)
    return Loader


def comment(text: str) -> str:
    """A one-line comment, even if a path in the text holds a line break."""
    return f"# {' '.join(text.split())}\n" if text.splitlines()[1:] else f"# {text}\n"


def how_to_repeat(path: Path) -> str:
    """The first comment of a recipe: the command that trains with it."""
    return comment(f"craft train --recipe {shlex.quote(str(path))}")


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        ConfigError: there is no shipped recipe of this name.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        raise ConfigError(f"--recipe: no recipe '{name}'{nearest(name, shipped)} (or pass a path ending in .yaml)")
    return shipped[name]


def describe_recipe(path: Path) -> str:
    """The first comment of a recipe."""
    with open(path, encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name, from the installed package or the top of a checkout."""
    inside = Path(__file__).parent.parent / "recipes"
    folder = inside if inside.is_dir() else Path(__file__).parent.parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}
