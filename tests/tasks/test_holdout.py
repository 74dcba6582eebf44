"""Rows held out are remembered by what they say: nothing that is added or moved turns a trained row into a held-out one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import invoke, write_rows
from helpers import own_config, problem
from hypothesis import given
from hypothesis import strategies as some

import craft_cli as craft
from craft_cli.config import RunConfig
from craft_cli.data.holdout import divided, hold_out
from craft_cli.data.sources import DataSource, Split
from craft_cli.tasks.splits import load_splits
from craft_cli.training.resume import _held_out

Make = Callable[..., Path]
ROWS = some.lists(some.tuples(some.text("abc ", max_size=3), some.integers(0, 3)), min_size=2, max_size=60)


def split_of(rows: list[tuple[str, int]]) -> Split:
    return Split([(text,) for text, _ in rows], [label for _, label in rows], "here")


@given(rows=ROWS, more=ROWS, share=some.floats(0.05, 0.6), seed=some.integers(0, 3), stratify=some.booleans())
def test_rows_that_are_added_or_moved_change_no_part(
    rows: list[tuple[str, int]], more: list[tuple[str, int]], share: float, seed: int, stratify: bool
) -> None:
    split = split_of(rows)
    if len(set(split.texts)) < 2:
        assert "cannot be split" in problem(hold_out, split, share, seed, stratify=stratify)
        return
    limits = hold_out(split, share, seed, stratify=stratify)
    kept, held = divided(split, limits)
    assert sorted(kept + held) == list(range(len(rows)))
    assert kept
    assert held
    trained = {rows[row] for row in kept}
    grown = [*rows, *more]
    random.Random(seed).shuffle(grown)
    again = divided(split_of(grown), limits)
    assert not {grown[row] for row in again[1]} & trained
    assert {rows[row] for row in held} <= {grown[row] for row in again[1]}


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_share_is_kept_and_every_label_in_both_parts(share: float) -> None:
    rows = [(f"text {number}", number % 10 // 3) for number in range(400)]
    split = split_of(rows)
    kept, held = divided(split, limits := hold_out(split, share, 5, stratify=True))
    assert len(held) == round(share * 400)
    for label in range(4):
        count = sum(rows[row][1] == label for row in held)
        assert abs(count - share * sum(row[1] == label for row in rows)) <= 1
    assert len(limits) == 4 + 1
    assert sorted(kept + held) == list(range(400))
    assert len(hold_out(split, share, 5, stratify=False)) == 1 + 1


def test_equal_texts_of_a_label_are_never_in_both_parts() -> None:
    split = split_of([(f"text {number % 20}", number % 2) for number in range(200)])
    kept, held = divided(split, hold_out(split, 0.3, 0, stratify=True))
    assert not {split.texts[row] for row in kept} & {split.texts[row] for row in held}
    assert len(held) == 60


@pytest.mark.parametrize("seed", range(4))
def test_a_text_of_many_rows_does_not_decide_how_many_are_held_out(seed: int) -> None:
    split = split_of([(f"text {number}" if number % 3 else "n/a", 0) for number in range(300)])
    _, held = divided(split, hold_out(split, 0.1, seed, stratify=False))
    assert 27 <= len(held) <= 33


def test_thousands_of_labels_are_divided_in_proportion() -> None:
    split = split_of([(f"text {number}", number % 4000) for number in range(16_000)])
    kept, held = divided(split, hold_out(split, 0.5, 0, stratify=True))
    assert len(held) == len(kept) == 8000
    assert {split.labels[row] for row in held} == set(range(4000))  # type: ignore[index]


# -- in a run -------------------------------------------------------------------------------------------------------------


def tickets(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"text": f"the film {n} was {'good' if n % 2 else 'bad'}", "label": ("no", "yes")[n % 2]}
        for n in range(start, start + count)
    ]


@pytest.fixture
def run(pico: Make) -> dict[str, set[str]]:
    """A run on a part of train.jsonl, and the texts of both parts."""
    write_rows(Path("train.jsonl"), tickets(60))
    config = own_config(pico(), Path(), data_dir=None, train_file="train.jsonl", validation_share=0.3, max_steps=2)
    craft.train(config)
    loaded = load_splits(DataSource.of(config), ["train", "validation"])
    return {name: {text for (text,) in split.texts} for name, split in loaded.splits.items()}


def evaluated(*flags: str) -> tuple[set[str], Any, str]:
    found = invoke("eval", "out", "--predictions", "p.jsonl", "--worst", "100", "--use-cpu", *flags)
    assert found.exit_code == 0, found.output
    result = craft.evaluate("out", worst=10_000, use_cpu=True)
    return {row["texts"][0] for row in result.worst or []}, result, found.stderr


def test_a_file_that_grew_makes_no_trained_row_a_held_out_one(run: dict[str, set[str]]) -> None:
    before = craft.evaluate("out", use_cpu=True)
    assert before.notes is None
    rows = [*tickets(60, 100), *tickets(60)]
    random.Random(0).shuffle(rows)
    write_rows(Path("train.jsonl"), rows)
    wrong, result, said = evaluated()
    assert not wrong & run["train"]
    assert before.examples < result.examples < 120 - len(run["train"])
    assert (
        f"{Path('train.jsonl').resolve()} has changed since the training: 120 rows instead of 60; the evaluation uses the original held-out rows"
        in "".join(said.split("\n"))
    )
    assert len(result.notes or []) == 1
    write_rows(Path("train.jsonl"), tickets(60)[::-1])  # only moved: other lines, the same rows
    moved = craft.evaluate("out", use_cpu=True)
    assert moved.metrics == pytest.approx(before.metrics)
    write_rows(Path("train.jsonl"), [row for row in tickets(60) if row["text"] in run["train"]])
    assert "no row was held out in training; pass " in problem(craft.evaluate, "out", use_cpu=True)


def test_rows_that_were_trained_on_are_named_when_they_are_evaluated_on(pico: Make) -> None:
    write_rows(Path("train.jsonl"), tickets(40))
    write_rows(Path("validation.jsonl"), tickets(20, 100))
    craft.train(
        own_config(
            pico(), Path(), data_dir=None, train_file="train.jsonl", validation_file="validation.jsonl", max_steps=2
        )
    )
    assert craft.evaluate("out", use_cpu=True).notes is None
    (note,) = craft.evaluate("out", source=DataSource(validation_file="train.jsonl"), use_cpu=True).notes or ()
    assert note == "train.jsonl contains the training rows: the metrics will look too good"
    write_rows(Path("validation.jsonl"), tickets(21, 100))
    (note,) = craft.evaluate("out", use_cpu=True).notes or ()
    assert note.endswith("validation.jsonl has changed since the training: 21 rows instead of 20")
    assert craft.evaluate("out", source=DataSource(validation_file="validation.jsonl"), use_cpu=True).notes is None


def test_a_run_that_starts_from_another_keeps_its_division(pico: Make, run: dict[str, set[str]]) -> None:
    write_rows(Path("train.jsonl"), [*tickets(60), *tickets(60, 100)])
    config = own_config(
        pico(),
        Path(),
        data_dir=None,
        train_file="train.jsonl",
        validation_share=0.3,
        max_steps=2,
        output_dir="next",
        init_from="out",
    )
    craft.train(config)
    wrong = {row["texts"][0] for row in craft.evaluate("next", worst=10_000, use_cpu=True).worst or []}
    record = json.loads(Path("next/adapter/adapter_config.json").read_text())["training"]["data"]
    assert (
        record["held_out"]
        == json.loads(Path("out/adapter/adapter_config.json").read_text())["training"]["data"]["held_out"]
    )
    assert not wrong & run["train"]


@pytest.mark.slow
def test_another_seed_keeps_the_division_and_a_resumed_run_needs_no_other_adapter(
    pico: Make, run: dict[str, set[str]]
) -> None:
    given = {"data_dir": None, "train_file": "train.jsonl", "validation_share": 0.3, "output_dir": "next", "seed": 7}
    craft.train(own_config(pico(), Path(), **given, init_from="out", max_steps=2))
    assert craft.evaluate("next", use_cpu=True).examples == len(run["validation"])
    wrong = {row["texts"][0] for row in craft.evaluate("next", worst=10_000, use_cpu=True).worst or []}
    assert not wrong & run["train"]
    record = json.loads(Path("next/adapter/adapter_config.json").read_text())["training"]["data"]
    assert record["held_out"]["salt"].startswith("42.")
    shutil.rmtree("out")
    assert craft.train(own_config(pico(), Path(), **given, resume=True, max_steps=4)).updates == 4


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, True),
        ({"seed": 7}, True),
        ({"label_column": "label"}, True),
        ({"dataset_config_name": "rte"}, False),
        ({"train_split": "more"}, False),
        ({"text_columns": "premise"}, False),
        ({"label_column": "kind"}, False),
    ],
)
def test_a_division_is_that_of_the_same_rows_only(changed: dict[str, Any], kept: bool) -> None:
    given = {"model": "demo", "dataset_name": "glue", "dataset_config_name": "sst2"}
    limits = {"all": "80", "salt": "42.0"}
    record = given | {"text_columns": ["text"], "label_column": "label", "seed": 42, "held_out": limits}
    assert _held_out(RunConfig.build(given | changed), record) == (limits if kept else None)
