"""Shared by all commands: common options, options generated from the settings, and error handling."""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import logging
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any, Optional, get_type_hints

import typer

from craft_cli.cli import completion
from craft_cli.config import RunConfig, flag
from craft_cli.config.hub import offline as away_from_hub
from craft_cli.errors import CraftError
from craft_cli.training.launch import is_launched, rank
from craft_cli.training.signals import terminates_cleanly

JsonFlag = Annotated[bool, typer.Option("--json", help="Print only one JSON object to stdout.")]
MOST_USED = (
    "model", "task", "train_file", "validation_file", "method", "learning_rate", "num_train_epochs",
    "per_device_train_batch_size", "output_dir", "dry_run",
)  # fmt: skip
"""The settings at the top of `craft train --help`."""
_METAVARS = {
    "model": "MODEL", "task": "TASK", "method": "METHOD", "ranks": "OUT,IN,LAYERS", "targets": "NAMES", "budget": "NUMBERS",
    "text_columns": "NAMES", "report_to": "NAMES", "data_dir": "FOLDER", "cache_dir": "FOLDER", "output_dir": "FOLDER",
    "train_file": "FILE", "validation_file": "FILE", "num_train_epochs": "NUMBER", "threshold": "NUMBER", "init_from": "PATH",
}  # fmt: skip
"""Placeholders of values in help. Default: N, NUMBER or TEXT."""
_OTHERS_SPEAK = 3.0
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
OfflineFlag = Annotated[
    bool, typer.Option("--offline", help="Never contact the Hub; use its cache only, as with HF_HUB_OFFLINE=1.")
]
VerboseFlag = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")]


Temperature = Annotated[
    float | None,
    typer.Option(help="Sampling temperature of a language model; 0 is greedy.", show_default="0"),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the most likely tokens with this total probability.", show_default="1"),
]
Seed = Annotated[int | None, typer.Option(help="Random seed of the sampling.", show_default="42")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop string that ends an answer; can be given several times.")]


def generation_of(
    max_new_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None, stop: list[str] | None
) -> Any:
    """A `Generation` from the given options; None if none is given.

    Raises:
        ConfigError: a value is out of range.
    """
    given = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": tuple(stop or ())
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value not in (None, ())}
    if not given:
        return None
    from craft_cli.tasks.generation import Generation

    return Generation(**given)  # type: ignore[arg-type]  # values have different types


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn exceptions into one line and an exit code: 1 for errors, 130 for Ctrl-C; a traceback only with -v."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, verbose: bool = False, **options: Any) -> None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by peft, and it warns without a GPU
        try:
            with terminates_cleanly():
                command(*arguments, **options)
                if sys.stdout:
                    sys.stdout.flush()
        except CraftError as error:
            if rank():  # the main process prints errors that all share, and stops this one
                time.sleep(_OTHERS_SPEAK)
            _end(f"process {rank()}: {error}" if rank() else str(error), verbose)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except BrokenPipeError:  # `craft inspect | head`
            _discard(sys.stdout)
            raise SystemExit(0) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
                _discard(sys.stdout)  # discard its buffer
                _end(f"cannot write to standard output: {error.strerror}", verbose)
            if is_launched() and any(word in str(error) for word in _LOST):
                time.sleep(_OTHERS_SPEAK)
                _end(f"process {rank()} lost the connection to another process, which exited first", verbose)
            if isinstance(error, PermissionError) and error.filename:  # such as a folder without access
                _end(f"{error.filename}: {error.strerror}; ask its owner for access, or choose another path", verbose)
            reason = " ".join(str(error).split())
            _end(
                f"unexpected {type(error).__name__}: {reason} (run with -v for the traceback; please report it)",
                verbose,
            )

    _set_signature(wrapped, [*_parameters(command), _parameter("verbose", VerboseFlag, False)])
    return wrapped


def asks_hub(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option --offline to a command that can contact the Hub."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, offline: bool = False, **options: Any) -> None:
        with away_from_hub() if offline else nullcontext():
            command(*arguments, **options)

    _set_signature(wrapped, [*_parameters(command), _parameter("offline", OfflineFlag, False)])
    return wrapped


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add options for these settings (default: all) to a command, passed as keywords; None for options not given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in _parameters(command) if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = [field for field in RunConfig.settings() if not names or field.name in names]
        fields.sort(key=lambda field: MOST_USED.index(field.name) if field.name in MOST_USED else len(MOST_USED))
        hints, groups = get_type_hints(RunConfig), RunConfig.groups()
        if not names:
            groups |= dict.fromkeys(MOST_USED, "Most used")
        options = [_option(field, str(hints[field.name]), groups[field.name], not names) for field in fields]
        _set_signature(command, [*own, *options])
        return command

    return decorate


def _option(field: dataclasses.Field[Any], hint: str, group: str, show_default: bool) -> inspect.Parameter:
    kind: Any = (
        bool
        if "bool" in hint
        else str
        if any(text in hint for text in ("str", "tuple", "Literal"))
        else float
        if "float" in hint
        else int
    )
    name = f"{flag(field.name)}/--no-{flag(field.name)[2:]}" if kind is bool else flag(field.name)
    default = field.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    option = typer.Option(
        name,
        help=field.metadata["help"],
        show_default=shown if show_default and default not in (None, False) else False,
        rich_help_panel=group,
        autocompletion=completion.of_setting(field.name),
        metavar=None if kind in (bool, int, float) else _METAVARS.get(field.name),
    )
    return _parameter(field.name, Annotated[Optional[kind], option], None)  # noqa: UP045


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameters(command: Callable[..., None]) -> list[inspect.Parameter]:
    signature = getattr(command, "__signature__", None) or inspect.signature(command, eval_str=True)
    return list(signature.parameters.values())


def _set_signature(command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _discard(stream: Any) -> None:
    from craft_cli.cli import console

    console.discard(stream)


def _end(message: str, verbose: bool) -> None:
    from craft_cli.cli import console

    console.fail(message)
    if verbose:
        console.err.print_exception()
    raise SystemExit(1)
