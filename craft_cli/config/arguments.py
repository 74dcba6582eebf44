"""Argument checks of the public Python functions. Errors name Python arguments instead of flags."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_type_hints

from craft_cli.errors import CraftError

P = ParamSpec("P")
T = TypeVar("T")

_COMMAND = r"`[^`]*`|\b(?:craft|pip|hf|accelerate|torchrun) [a-z-]+ [^;:,)]*"
"""Shell commands in a message; these keep their flags."""
_FLAG = re.compile(rf"({_COMMAND})|(?<![\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")


def in_python(message: str) -> str:
    """Replace flags such as `--eval-steps` in an error message by arguments such as `eval_steps`."""
    return _FLAG.sub(lambda match: match[1] or match[2].replace("-", "_"), message)


def public(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a public function with argument checks for Python users. The command line calls the bare function.

    Raises:
        TypeError: an argument is missing, unknown, or does not match its annotation.
        CraftError: raised by the function; the message names arguments instead of flags.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            bound = signature.bind(*arguments, **options)
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}") from None
        for name, value in bound.arguments.items():
            _check(function, name, value)
        try:
            return function(*arguments, **options)
        except CraftError as error:
            error.args = (in_python(str(error)),)
            raise

    return called


def _check(function: Callable[..., Any], name: str, value: Any) -> None:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hint = get_type_hints(function, include_extras=True).get(name, Any)
    parameter = inspect.signature(function).parameters[name]
    if hint is Any or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return
    if inspect.isclass(hint) and not isinstance(value, hint):
        raise wrong_type(name, parameter.annotation, value)
    if inspect.isclass(hint):
        return
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError:
        raise wrong_type(name, parameter.annotation, value) from None


def wrong_type(name: str, expected: Any, value: Any) -> TypeError:
    """A TypeError for an argument of the wrong type; `expected` is a class or a description."""
    shown = " ".join(repr(value).split())
    return TypeError(
        f"{name}: expected {getattr(expected, '__name__', expected)}, not {type(value).__name__} "
        f"{shown if len(shown) <= 60 else shown[:57] + '...'}"
    )
