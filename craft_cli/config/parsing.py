"""Convert settings from the command line, a recipe or Python to their types."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from craft_cli.config.contradictions import flag
from craft_cli.config.names import split_names
from craft_cli.config.options import parse_budget, parse_ranks
from craft_cli.errors import ConfigError, plain

AUTO = "auto"
Auto = Literal["auto"]
"""Value of a numeric setting that craft chooses itself."""
LISTS = ("targets", "text_columns", "report_to")
"""Settings that take a comma-separated list of names."""
_PARSED: dict[str, Callable[[Any], Any]] = {"ranks": parse_ranks, "budget": parse_budget}


def parse(given: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to their types and validate each one.

    Args:
        given: values by name, as text or as Python values.
        hints: the type of each setting.

    Raises:
        ConfigError: a value is invalid; one line for each problem, with its flag.
    """
    from pydantic import TypeAdapter, ValidationError

    problems, values = [], {}
    for name, raw in given.items():
        value: Any = os.fspath(raw) if isinstance(raw, os.PathLike) else raw
        try:
            if name in _PARSED:
                values[name] = _PARSED[name](value)
                continue
            if name in LISTS and isinstance(value, str):
                value = tuple(split_names(value))
            if isinstance(value, bool) and "bool" not in str(hints[name]):
                raise ConfigError(f"{flag(name)}: expected {_expected(hints[name])}, not {str(value).lower()}")
            hint = _hint_of(hints[name], value)
            values[name] = TypeAdapter(hint).validate_python(value)
        except ConfigError as error:
            problems.append(str(error))
        except ValidationError as error:
            reason = error.errors()[0]["msg"][0].lower() + error.errors()[0]["msg"][1:]
            problems.append(f"{flag(name)}: {reason.replace('input', 'it')}, but is '{_shown(raw)}'")
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def _hint_of(hint: Any, value: Any) -> Any:
    """The number type or `auto` of a union, depending on the value, so that an error names only one."""
    if Auto not in get_args(hint):
        return hint
    return Auto if value == AUTO else next(part for part in get_args(hint) if part != Auto)


def _shown(raw: Any) -> str:
    text = plain(str(raw))
    return text if len(text) <= 80 else f"{text[:80]}..."


def _expected(hint: Any) -> str:
    return "a number" if "int" in str(hint) or "float" in str(hint) else "text"
