"""The command line: one small file per command, with heavy imports inside the commands."""

from __future__ import annotations

import os

import typer

from craft_cli.cli import chat, decompose, doctor, evaluate, inspect, merge, methods, predict, recipes, sweep, train
from craft_cli.cli.usage import Command, Group

app = typer.Typer(
    name="craft",
    cls=Group,
    help="Fine-tune transformers with a few thousand parameters over frozen Tucker factors (CRAFT), "
    "and get a plain Hugging Face checkpoint back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --a_b is --a-b
    },
)
app.command("decompose", cls=Command)(decompose.command)
app.command("train", cls=Command, epilog=train.EXAMPLES)(train.command)
app.command("sweep", cls=Command)(sweep.command)
app.command("eval", cls=Command)(evaluate.command)
app.command("predict", cls=Command)(predict.command)
app.command("chat", cls=Command)(chat.command)
app.command("merge", cls=Command)(merge.command)
app.command("inspect", cls=Command)(inspect.command)
app.command("methods", cls=Command)(methods.command)
app.command("doctor", cls=Command)(doctor.command)
app.add_typer(recipes.app, name="recipes")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from craft_cli import __version__

        print(f"craft {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of `craft`."""
    for descriptor in range(3):  # a closed stream's descriptor must not be reused by a file that craft writes
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # avoids extra requests of the Hub client
    app(prog_name="craft")
