"""The shipped recipes: each is loaded and goes down to one real step on a pico model; and the command that lists them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import failure, invoke, opinions, write_rows
from helpers import mostly_slow

from craft_cli.config import load_recipe, shipped_recipes
from craft_cli.tasks.glue import TASKS, task_named

RECIPES = shipped_recipes()


def test_there_is_one_for_every_glue_task_and_size_and_for_every_kind_of_own_data() -> None:
    glue = {f"roberta-{size}-{name}" for size in ("base", "large") for name, task in TASKS.items()
            if task.hub and task.train and name != "mnli-mm"}  # fmt: skip
    others = {
        "quickstart",
        "quickstart-llm",
        "paper-roberta-base",
        "paper-roberta-large",
        "own-csv",
        "own-pairs",
        "regression",
        "multi-label",
    }
    assert len(glue) == 18
    assert set(RECIPES) == glue | others
    for name in glue:
        assert load_recipe(name)["task"] == name.rsplit("-", 1)[1]
        assert load_recipe(name)["model"] == name.rsplit("-", 1)[0]


def write_data(recipe: dict[str, Any]) -> list[str]:
    """Rows in the layout that a recipe expects; gives the flags that point to them."""
    if recipe.get("task") and task_named(recipe["task"]).home.sample:
        return ["--max-train-samples", "30", "--max-eval-samples", "10"]
    task = TASKS[recipe["task"]] if "task" in recipe else None
    if task is None:
        columns = recipe["text_columns"].split(",")
        labels: Any = {"own-pairs": ["x", "y"], "score": [0.5, 2.5], "labels": ["tasty;cheap", "cheap"]}
        kinds = labels.get(recipe["label_column"], ["up", "down"])
        rows = [
            {**dict.fromkeys(columns, f"the film {row}"), recipe["label_column"]: kinds[row % 2]} for row in range(40)
        ]
        for key in ("train_file", "validation_file"):
            if key in recipe and recipe[key].endswith(".jsonl"):
                write_rows(Path(recipe[key]), rows)
            elif key in recipe:
                lines = [",".join(map(str, row.values())) for row in rows]
                Path(recipe[key]).write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
        return []
    count = 5 if task.labels == ("score",) else len(task.labels)
    rows = [{**dict.fromkeys(task.text_columns, row["sentence"]), "label": number % count}
            for number, row in enumerate(opinions(40, 1))]  # fmt: skip
    for split in ("train", *task.validation):
        write_rows(Path(f"data/{split}.jsonl"), rows)
    return ["--data-dir", "data"]


@pytest.mark.parametrize("name", mostly_slow(sorted(RECIPES), "quickstart", "quickstart-llm"))
def test_every_recipe_goes_down_to_one_step(name: str, pico: Callable[..., Path], pico_lm: Callable[..., Path]) -> None:
    flags = write_data(load_recipe(name))
    base = pico_lm(max_position_embeddings=700) if name == "quickstart-llm" else pico()
    result = invoke(
        "train", "--recipe", name, "--model", str(base), "--ranks", "4,4,2", "--use-cpu", "--dry-run", "--json", *flags
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["updates"] == 1


def test_the_list_has_a_line_for_each_that_fits_a_terminal() -> None:
    lines = invoke("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(RECIPES)
    assert max(map(len, lines)) <= 80
    assert set(json.loads(invoke("recipes", "--json").stdout)) == set(RECIPES)


def test_a_recipe_is_shown_to_start_from(pico: Callable[..., Path]) -> None:
    shown = invoke("recipes", "show", "own-csv").stdout
    assert shown == RECIPES["own-csv"].read_text()
    Path("mine.yaml").write_text(shown)
    assert load_recipe("mine.yaml") == load_recipe("own-csv")
    assert "no recipe 'own-cvs'; did you mean 'own-csv'?" in failure("recipes", "show", "own-cvs")
