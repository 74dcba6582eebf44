"""The command line: one thin file for each command; heavy imports inside the command bodies."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

from craft_cli.cli import decompose, doctor, evaluate, inspect, merge, methods, predict, recipes, sweep, train


class _Group(TyperGroup):
    """Its flags not given are False, not None: None is sent through pydantic by typer, whose import takes long."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for parameter in self.get_params(ctx):
            if parameter.default is None and getattr(parameter, "is_flag", False):
                parameter.default = False
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="craft",
    cls=_Group,
    help="Fine-tune a transformer by a few thousand numbers over frozen Tucker factors (CRAFT), "
    "and get a plain Hugging Face checkpoint back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --a_b is --a-b
    },
)
app.command("decompose")(decompose.command)
app.command("train")(train.command)
app.command("sweep")(sweep.command)
app.command("eval")(evaluate.command)
app.command("predict")(predict.command)
app.command("merge")(merge.command)
app.command("inspect")(inspect.command)
app.command("methods")(methods.command)
app.command("doctor")(doctor.command)
app.add_typer(recipes.app, name="recipes")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from craft_cli import __version__

        print(f"craft {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of `craft`."""
    for descriptor in range(3):  # a stream that is closed must not become the number of a file that we write
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # with it the hub's client asks for more than was asked for
    app(prog_name="craft")
