"""`craft recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from craft_cli.cli import completion
from craft_cli.cli.options import JsonFlag, reports_errors
from craft_cli.cli.usage import Command

app = typer.Typer(help="List the shipped recipes, or print one.", invoke_without_command=True)


@app.callback()
@reports_errors
def listing(context: typer.Context, json: JsonFlag = False) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand:
        return
    from craft_cli.cli import console
    from craft_cli.config import describe_recipe, shipped_recipes

    recipes = {name: describe_recipe(path) for name, path in shipped_recipes().items()}
    if json:
        console.print_json(recipes)
    else:
        console.facts(recipes, rename=False)


@app.command("show", cls=Command)
@reports_errors
def show(name: Annotated[str, typer.Argument(help="Name of a recipe.", autocompletion=completion.recipes)]) -> None:
    """Print a recipe, as a starting point for your own."""
    from craft_cli.cli import console
    from craft_cli.config import recipe_path

    console.out.print(recipe_path(name).read_text(encoding="utf-8"), markup=False, soft_wrap=True, end="")
