"""Sweeps: what is tried, what fails, what is chosen. Most runs are pretended; see `pretend_training`."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import opinions, write_rows
from helpers import real_runs, starts, table_of

import craft_cli as craft
from craft_cli.api.sweep import rehearse, sweep
from craft_cli.config import RunConfig, load_recipe
from craft_cli.data.sources import DataSource
from craft_cli.errors import ConfigError, CraftError, DataError
from craft_cli.sweeps import studies
from craft_cli.sweeps.loop import Listener
from craft_cli.sweeps.pictures import draw
from craft_cli.sweeps.space import Range, parse_sets
from craft_cli.sweeps.table import read_results

Make = Callable[..., Path]
RATES = "learning_rate=1e-3,1e-2,1e-1"


def rows_of(name: str) -> list[dict[str, str]]:
    with open(name, newline="") as file:
        return list(csv.DictReader(file))


# -- what is tried ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pretend")
def test_a_grid_has_all_combinations_and_an_option_is_for_its_own_method_only(asked: Any) -> None:
    results = sweep(asked("method=craft,lora", "learning-rate=1e-3,1e-2", "rank=2,4", seeds=(1, 2)))
    tried = {(row.method, *sorted(row.setting.items())) for row in results.rows}
    rates = (1e-3, 1e-2)
    assert tried == {
        *(("craft", ("learning_rate", rate)) for rate in rates),
        *(("lora", ("learning_rate", rate), ("rank", rank)) for rate in rates for rank in (2, 4)),
    }
    assert all(row.n == 2 and row.state == "complete" for row in results.rows)
    assert Counter(name for name, *_ in starts()) == {f"{row.trial}-seed{s}": 1 for row in results.rows for s in (1, 2)}
    recipe = load_recipe(f"out/runs/{next(row.trial for row in results.rows if row.method == 'craft')}-seed2.yaml")
    assert (recipe["method"], recipe["seed"], "rank" in recipe) == ("craft", 2, False)

    best = results.best
    assert best
    assert (best.method, best.setting) == ("craft", {"learning_rate": 1e-2})  # its ranks make it the highest score
    assert [row.chosen for row in results.rows if row.chosen] == ["best", "best of lora"]
    assert best.mean == pytest.approx(0.9 + 0.64 + 0.0015)
    assert best.std == pytest.approx(0.001 / 2**0.5)
    assert (len(rows_of("out/table.csv")), len(rows_of("out/trials.csv"))) == (6, 12)
    assert read_results(Path("out")) == results
    draw(Path("out"), results)
    assert all(Path("out", name).stat().st_size > 5000 for name in ("score_by_numbers.png", "score_by_rate.png"))


def test_values_are_separated_by_commas_and_those_with_commas_by_slashes() -> None:
    assert parse_sets(["ranks=64,64,8/32,32,4", "targets=query,value/query", "--init-noise=true,false"]) == {
        "ranks": ("64,64,8", "32,32,4"),
        "targets": ("query,value", "query"),
        "init_noise": (True, False),
    }
    assert parse_sets(["learning_rate=1e-3,0.001,3e-3"]) == {"learning_rate": (1e-3, 3e-3)}
    assert parse_sets(["class_weights=none,balanced"]) == {"class_weights": (None, "balanced")}
    found = parse_sets(["learning_rate=1e-4..1e-2", "rank=2..64", "warmup_ratio=0..0.3"])
    assert found == {"learning_rate": Range(1e-4, 1e-2), "rank": Range(2, 64, True), "warmup_ratio": Range(0, 0.3)}
    assert [values.log for values in found.values() if isinstance(values, Range)] == [True, True, False]


def test_a_column_whose_name_holds_a_comma_is_one_value() -> None:
    assert parse_sets(['text_columns="a,b"']) == {"text_columns": ('"a,b"',)}


@pytest.mark.parametrize(
    ("sets", "options", "told"),
    [
        (["learning_rat=1"], {}, "--set learning_rat: no such setting; did you mean 'learning_rate'?"),
        (["learning_rate"], {}, "--set learning_rate: expected NAME=VALUE,VALUE"),
        (["learning_rate=fast"], {}, "--set learning_rate: "),
        (["seed=1,2"], {}, "--set seed: pass --seeds"),
        (["output_dir=a,b"], {}, "--set output_dir: a sweep cannot vary this setting"),
        (["max_eval_samples=10,20"], {}, "--set max_eval_samples: scores would not be comparable"),
        (
            ["train_file=a.csv,b.csv"],
            {"settings": {"task": None, "data_dir": None, "train_file": "a.csv"}},
            "pass one --validation-file for all",
        ),
        (["rank=2,4"], {}, "--set rank is for --method "),
        (["method=craft,loar"], {}, "--set method: "),
        (["learning_rate=1e-2..1e-3"], {}, "expected two numbers LOW..HIGH, the lower one first"),
        ([RATES], {"trials": 4, "sampler": "grid"}, "--trials: a grid tries all combinations"),
        ([RATES], {"trials": 4}, "--trials 4: there are only 3 combinations"),
        ([RATES], {"pruner": "median"}, "--pruner: a grid trains every setting to the end"),
        ([RATES], {"sampler": "gird"}, "--sampler: unknown value 'gird'; did you mean 'grid'?"),
        ([RATES], {"settings": {"eval_strategy": "no"}}, "--eval-strategy no: a sweep requires evaluations"),
        ([RATES], {"settings": {"metric_for_best_model": "f1"}}, "has no metric 'f1'"),
        ([RATES], {"settings": {"rank": 8}}, "--rank is for --method "),
        (["bf16=true,false", "fp16=true"], {}, "--bf16 and --fp16 cannot be combined; choose one"),
        ([RATES], {"test_file": "missing.jsonl"}, "--test-file: missing.jsonl: no such file"),
        ([RATES], {"resume": True, "storage": "nonsense"}, "--storage: cannot be used: "),
    ],
)
def test_what_cannot_be_swept_is_told_in_a_line(asked: Any, sets: list[str], options: Any, told: str) -> None:
    with pytest.raises(CraftError) as raised:
        sweep(asked(*sets, **options))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("out").exists()


@pytest.mark.usefixtures("pretend")
def test_sampled_trials_begin_with_the_recipe_and_each_method_gets_as_many(asked: Any) -> None:
    options = {"trials": 4, "settings": {"learning_rate": 2e-3, "ranks": "48,48,4"}}
    results = sweep(asked("method=craft,lora", **options))
    assert Counter(row.method for row in results.rows) == {"craft": 2, "lora": 2}
    first = next(row for row in results.rows if row.trial == "craft-001")
    assert first.setting == {"learning_rate": 2e-3, "head_learning_rate": 2e-3, "ranks": "48,48,4"}
    for row in results.rows:
        assert 2e-4 <= row.setting["learning_rate"] <= 2e-2
        assert ("rank" in row.setting) == (row.method == "lora")


def test_a_recipe_may_say_where_the_factors_lie(asked: Any) -> None:
    given = lambda **more: asked(recipe={"cache_dir": "factors"}, **more).flags  # noqa: E731
    assert given() == ["--cache-dir", str(Path("factors").resolve())]
    assert given(cache_dir="others") == ["--cache-dir", str(Path("others").resolve())]
    assert asked().flags == []


@pytest.mark.usefixtures("pretend")
def test_code_of_the_model_runs_only_where_the_user_says_so_each_time(asked: Any) -> None:
    trusting = asked("learning_rate=1e-3", settings={"model": "code"}, trust_remote_code=True)
    results = sweep(trusting)
    assert [row.state for row in results.rows] == ["complete"]
    assert "trust_remote_code" not in "".join(path.read_text() for path in Path("out").rglob("*.yaml"))
    with pytest.raises(CraftError, match="it needs Python code of its own"):
        sweep(replace(trusting, trust_remote_code=False, output_dir="other"))
    assert rehearse(trusting)["rows"][0]["reason"] == ""


@pytest.mark.usefixtures("pretend")
def test_spreadsheets_run_nothing_of_the_tables(asked: Any) -> None:
    """Names of files may begin like a formula, and reasons tell what a stranger's file says."""
    for name in ("=cmd.jsonl", "plain.jsonl"):
        write_rows(Path(name), [{"text": row["sentence"], "label": row["label"]} for row in opinions(8, 1)])
    files = {"task": None, "data_dir": None, "train_file": "plain.jsonl", "validation_file": "plain.jsonl"}
    sweep(asked("train_file==cmd.jsonl,plain.jsonl", settings=files))
    written = {row["train_file"] for file in ("table.csv", "trials.csv") for row in rows_of(f"out/{file}")}
    assert written
    assert not any(cell.startswith("=") for cell in written)


# -- failures, pruning ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pretend")
def test_a_failed_trial_is_a_row_with_its_reason(asked: Any) -> None:
    results = sweep(asked("learning_rate=7,8,9,1e-2", seeds=(1, 2)))
    found = {row.setting["learning_rate"]: row for row in results.rows}
    assert [found[rate].state for rate in (7, 8, 9, 1e-2)] == ["failed", "failed", "failed", "complete"]
    assert found[7].reason.startswith("the loss is nan at update 1: start again with a lower")
    assert "SIGKILL" in found[8].reason
    assert found[9].reason == "out of memory"
    assert len(rows_of("out/trials.csv")) == 3 + 2  # the second seed of what failed is not begun
    assert results.best == results.rows[0] == found[1e-2]
    assert any("3 of 4 settings failed" in note for note in results.notes)


@pytest.mark.usefixtures("pretend")
def test_where_every_trial_fails_the_sweep_does(asked: Any) -> None:
    with pytest.raises(CraftError, match="out: no setting was trained to the end: the loss is nan"):
        sweep(asked("learning_rate=7,7.0"))
    assert rows_of("out/table.csv")[0]["state"] == "failed"


@pytest.mark.slow
@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("pruner", ["median", pytest.param("hyperband", marks=pytest.mark.slow)])
def test_what_looks_worse_than_others_is_pruned(asked: Any, monkeypatch: pytest.MonkeyPatch, pruner: str) -> None:
    monkeypatch.setattr(studies, "_STARTUP_TRIALS", 1)
    monkeypatch.setenv("PRETEND_SECONDS", "0.05")
    options: dict[str, Any] = {
        "sampler": "random",
        "trials": 5 if pruner == "median" else 12,
        "pruner": pruner,
        "settings": {"max_steps": 24},
    }
    results = sweep(asked("learning_rate=1e-5..1e-2", **options))
    pruned = [row for row in results.rows if row.state == "pruned"]
    assert pruned
    for row in pruned:
        assert "pruned after evaluation" in row.reason
        assert not row.chosen
        assert not Path(f"out/runs/{row.trial}-seed42/all_results.json").exists()


# -- choosing -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("pretend")
def test_test_rows_say_how_good_the_chosen_are_and_choose_nothing(
    asked: Any, monkeypatch: pytest.MonkeyPatch, data_dir: Path
) -> None:
    scored: list[str] = []

    class Found:
        metrics = {"accuracy": 0.25}  # noqa: RUF012

    def evaluate(run: Path, **options: Any) -> Found:
        scored.append(run.name)
        return Found()

    monkeypatch.setattr("craft_cli.api.evaluate.evaluate", evaluate)
    write_rows(Path("test.jsonl"), opinions(10, 9))
    few = ("method=craft,lora", "learning_rate=1e-3,1e-2")
    options = {"seeds": (1, 2), "test_file": "test.jsonl"}
    results = sweep(asked(*few, **options))
    plain = sweep(asked(*few, seeds=(1, 2), output_dir="plain"))
    assert table_of(results) == table_of(plain)
    chosen = [row for row in results.rows if row.chosen]
    assert [row.method for row in chosen] == ["craft", "lora"]
    assert all(row.test == {"mean": 0.25, "std": 0.0, "n": 2} for row in chosen)
    assert all(row.test is None for row in results.rows if not row.chosen)
    assert sorted(scored) == sorted(f"{row.trial}-seed{seed}" for row in chosen for seed in (1, 2))

    sweep(asked(*few, resume=True, **options))
    assert len(scored) == 4  # once
    train = {"settings": {"task": None, "data_dir": None, "train_file": str(data_dir / "train.jsonl")}}
    for settings in ({}, train):
        for name in ("train", "validation"):
            if name == "train" or not settings:
                with pytest.raises(ConfigError, match=r"rows of .* are also training or validation rows; pass"):
                    sweep(asked(RATES, output_dir="new", test_file=str(data_dir / f"{name}.jsonl"), **settings))


@pytest.mark.usefixtures("pretend")
def test_test_rows_are_looked_at_before_anything_is_trained(asked: Any, data_dir: Path) -> None:
    class Heard(Listener):
        told: list[str] = []  # noqa: RUF012

        def noticed(self, what: str) -> None:
            self.told.append(what)

    write_rows(Path("test.jsonl"), [{"review": "a film", "label": 1}])
    with pytest.raises(DataError, match=r"test\.jsonl has no column 'sentence'"):
        sweep(asked(RATES, test_file="test.jsonl"))
    assert not Path("out").exists()
    assert not starts()
    used = [json.loads(line) for line in (data_dir / "train.jsonl").read_text().splitlines()[:2]]
    write_rows(Path("test.jsonl"), [*used, {"sentence": "a film that was", "label": 1}])
    rehearse(asked(RATES, test_file="test.jsonl"), Heard())
    assert Heard.told == ["--test-file: 2 of the 3 rows of test.jsonl are also training or validation rows"]


@pytest.mark.usefixtures("pretend")
def test_an_error_is_minimised(asked: Any) -> None:
    results = sweep(asked(RATES, settings={"metric_for_best_model": "loss"}))
    assert results.lower_is_better
    assert results.rows[0].setting == {"learning_rate": 1e-2}
    assert results.best == results.rows[0]
    assert results.rows[0].mean == min(row.mean or 9 for row in results.rows)


@pytest.mark.usefixtures("pretend")
def test_notes_point_at_one_fixed_rate_and_at_the_edge_of_the_rates(asked: Any) -> None:
    fixed = sweep(asked("method=craft,lora"))
    assert any("one learning rate" in note and "2602.04998" in note for note in fixed.notes)
    tuned = sweep(asked(RATES, output_dir="tuned"))
    assert tuned.notes == []
    edge = sweep(asked("learning_rate=1e-4,1e-3", output_dir="edge"))
    assert any("0.001, is the highest tried" in note for note in edge.notes)


@pytest.mark.usefixtures("pretend")
def test_a_dry_run_shows_trials_numbers_and_time_and_writes_nothing(asked: Any) -> None:
    before = sorted(Path().rglob("*"))
    found = rehearse(asked("method=lora", "rank=2,4", RATES, seeds=(1, 2)))
    assert sorted(Path().rglob("*")) == before
    assert [(row["setting"]["rank"], row["numbers"]) for row in found["rows"]] == [(2, 200)] * 3 + [(4, 400)] * 3
    assert (found["trials"], found["seconds"]) == (6, 6 * 2 * 2.0)
    sampled = rehearse(asked(trials=40))
    assert (sampled["sampler"], sampled["trials"], len(sampled["rows"])) == ("tpe", 40, 1)
    assert sampled["spaces"]["craft"]["learning_rate"] == "0.0003..0.03"


# -- with real trainings ------------------------------------------------------------------------------------------------------


def test_what_is_pretended_is_what_a_training_leaves() -> None:
    from dataclasses import fields

    from craft_cli.training.progress import TrainResult

    named = {"metric", "metrics", "parameters", "epoch", "updates", "seconds", "estimate"}
    assert named <= {field.name for field in fields(TrainResult)}


@pytest.mark.slow
def test_the_recipe_of_the_best_repeats_its_score_and_test_rows_are_scored(pico: Make, asked: Any) -> None:
    write_rows(Path("test.jsonl"), opinions(19, 9))
    options = {"seeds": (3,), "test_file": "test.jsonl", "cache_dir": "factors"}
    rehearsed = rehearse(asked("learning_rate=3e-2", settings=real_runs(pico), **options))
    results = sweep(asked("learning_rate=3e-2,3e-1", settings=real_runs(pico), **options))
    assert [row.state for row in results.rows] == ["complete", "complete"]
    best = results.best
    assert best
    assert best.test
    assert best.numbers == rehearsed["rows"][0]["numbers"] == 2 * (24**2 + 24**2 + 3**2)
    assert 0 < rehearsed["seconds"] < 60
    assert load_recipe("out/best.yaml")["seed"] == 3
    again = craft.train(RunConfig.build({"output_dir": "again", "cache_dir": "factors"}, load_recipe("out/best.yaml")))
    assert again.metrics["accuracy"] == best.mean
    source = DataSource(validation_file="test.jsonl")
    assert craft.evaluate("again", source=source, use_cpu=True).metrics["accuracy"] == best.test["mean"]
