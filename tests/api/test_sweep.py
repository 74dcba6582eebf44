"""Sweeps: what is tried, by whom, how it goes on, and what is chosen. Most runs are pretended; see `pretend_training`."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import opinions, write_rows

import craft_cli as craft
from craft_cli.api.sweep import SweepOptions, rehearse, sweep
from craft_cli.config import load_recipe
from craft_cli.errors import ConfigError, CraftError
from craft_cli.sweeps import studies, work
from craft_cli.sweeps.loop import Listener
from craft_cli.sweeps.pictures import draw
from craft_cli.sweeps.space import Range, parse_sets
from craft_cli.sweeps.table import Results, read_results

Make = Callable[..., Path]
PRETEND = str(Path(__file__).parent.parent / "pretend_training.py")
RATES = "learning_rate=1e-3,1e-2,1e-1"


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs cost next to nothing, and no pictures are drawn."""
    monkeypatch.setattr("craft_cli.api.sweep.draw", lambda folder, results: None)
    monkeypatch.setattr(work, "TRAIN", (sys.executable, PRETEND, "--json"))
    monkeypatch.setenv("PRETEND_LOG", str(tmp_path / "starts"))


@pytest.fixture
def asked(data_dir: Path) -> Callable[..., SweepOptions]:
    """A function of (what is tried, **options) that asks for a sweep of short runs."""

    def ask(*sets: str, settings: dict[str, Any] | None = None, **options: Any) -> SweepOptions:
        given = {"model": "base", "task": "sst2", "data_dir": str(data_dir), "use_cpu": True, "max_steps": 12}
        return SweepOptions(given | (settings or {}), sets=sets, **{"output_dir": "out", **options})

    return ask


def starts() -> list[list[str]]:
    """Run, update it went on from and GPUs of every process started."""
    return [line.split(" ") for line in Path("starts").read_text().splitlines()] if Path("starts").exists() else []


def rows_of(name: str) -> list[dict[str, str]]:
    with open(name, newline="") as file:
        return list(csv.DictReader(file))


def table(results: Results) -> list[Any]:
    """What must be the same, however often a sweep was cut."""
    return [
        (row.trial, row.state, row.setting, row.numbers, row.mean, row.std, row.n, row.chosen) for row in results.rows
    ]


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Start it in a process of its own, a copy of this one: nothing is imported again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this process has threads, which the other one does without
        process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
        process.start()
    return process


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


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


@pytest.mark.parametrize(
    ("sets", "options", "told"),
    [
        (["learning_rat=1"], {}, "--set learning_rat: no such setting; did you mean 'learning_rate'?"),
        (["learning_rate"], {}, "--set learning_rate: expected NAME=VALUE,VALUE"),
        (["learning_rate=fast"], {}, "--set learning_rate: "),
        (["seed=1,2"], {}, "--set seed: give --seeds"),
        (["output_dir=a,b"], {}, "--set output_dir: it is not part of what is compared"),
        (["rank=2,4"], {}, "--set rank is for --method "),
        (["method=craft,loar"], {}, "--set method: "),
        (["learning_rate=1e-2..1e-3"], {}, "expected two numbers LOW..HIGH, the lower one first"),
        ([RATES], {"trials": 4, "sampler": "grid"}, "--trials: a grid has as many as there are combinations"),
        ([RATES], {"trials": 4}, "--trials 4: there are 3 combinations"),
        ([RATES], {"pruner": "median"}, "--pruner: each setting of a grid is trained to its end"),
        ([RATES], {"sampler": "gird"}, "--sampler: there is no 'gird'; did you mean 'grid'?"),
        ([RATES], {"settings": {"eval_strategy": "no"}}, "--eval-strategy no: a sweep chooses by evaluations"),
        ([RATES], {"settings": {"metric_for_best_model": "f1"}}, "--metric-for-best-model: no metric 'f1'"),
        ([RATES], {"settings": {"rank": 8}}, "--rank is for --method "),
        (["bf16=true,false", "fp16=true"], {}, "--bf16 and --fp16 exclude each other"),
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
    with pytest.raises(CraftError, match="out: no setting was trained to its end: the loss is nan"):
        sweep(asked("learning_rate=7,7.0"))
    assert rows_of("out/table.csv")[0]["state"] == "failed"


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
    assert table(results) == table(plain)
    chosen = [row for row in results.rows if row.chosen]
    assert [row.method for row in chosen] == ["craft", "lora"]
    assert all(row.test == {"mean": 0.25, "std": 0.0, "n": 2} for row in chosen)
    assert all(row.test is None for row in results.rows if not row.chosen)
    assert sorted(scored) == sorted(f"{row.trial}-seed{seed}" for row in chosen for seed in (1, 2))

    sweep(asked(*few, resume=True, **options))
    assert len(scored) == 4  # once
    train = {"settings": {"task": None, "data_dir": None, "train_file": str(data_dir / "train.jsonl")}}
    with pytest.raises(ConfigError, match="is the train file; give rows that nothing was chosen on"):
        sweep(asked(RATES, output_dir="new", test_file=str(data_dir / "train.jsonl"), **train))


@pytest.mark.usefixtures("pretend")
def test_an_error_is_minimised(asked: Any) -> None:
    results = sweep(asked(RATES, settings={"metric_for_best_model": "loss"}))
    assert results.lower_is_better
    assert {row.mean for row in results.rows} == {0.5}


@pytest.mark.usefixtures("pretend")
def test_notes_point_at_one_fixed_rate_and_at_the_edge_of_the_rates(asked: Any) -> None:
    fixed = sweep(asked("method=craft,lora"))
    assert any("one learning rate" in note and "2602.04998" in note for note in fixed.notes)
    tuned = sweep(asked(RATES, output_dir="tuned"))
    assert tuned.notes == []
    edge = sweep(asked("learning_rate=1e-4,1e-3", output_dir="edge"))
    assert any("0.001, is the highest tried" in note for note in edge.notes)


# -- going on, together -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pretend")
def test_a_killed_sweep_goes_on_to_the_same_table_as_an_uncut_one(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = (RATES,)
    uncut = sweep(asked(*sets, seeds=(1, 2), output_dir="uncut"))
    Path("starts").unlink()
    monkeypatch.setenv("PRETEND_SECONDS", "0.1")
    process = apart(sweep, asked(*sets, seeds=(1, 2)))
    until(lambda: (Path("out/runs/craft-001-seed2/checkpoints") / "step-8").is_dir())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    monkeypatch.setenv("PRETEND_SECONDS", "0")
    results = sweep(asked(*sets, seeds=(1, 2), resume=True))
    assert table(results) == table(uncut)
    assert read_results(Path("out")).runs == [{**run} for run in uncut.runs]
    by_run = Counter(name for name, *_ in starts())
    assert by_run["craft-001-seed2"] == 2
    assert set((by_run - Counter({"craft-001-seed2": 1})).values()) == {1}  # nothing else was begun twice
    assert [int(step) for name, step, _ in starts() if name == "craft-001-seed2"][1] >= 8  # it went on


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("sampler", [pytest.param("grid", marks=pytest.mark.slow), "tpe"])
def test_a_signal_ends_a_sweep_with_checkpoints_and_resume_goes_on(
    asked: Any, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    sets = (RATES,) if sampler == "grid" else ("learning_rate=1e-4..1e-1",)
    options: dict[str, Any] = {} if sampler == "grid" else {"trials": 7, "pruner": "none"}
    uncut = sweep(asked(*sets, output_dir="uncut", **options))
    monkeypatch.setenv("PRETEND_SECONDS", "0.03")

    class Cut(Listener):
        told: list[str]

        def __init__(self) -> None:
            self.told = []

        def ended(self, results: Results, trial: str, trials: int | None, seconds_left: float | None) -> None:
            self.told.append(trial)
            if len(self.told) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def interrupted(self, output: Path) -> None:
            self.told.append(f"interrupted {output}")

    listener = Cut()
    with pytest.raises(SystemExit) as ended:
        sweep(asked(*sets, **options), listener)
    assert ended.value.code == 143
    assert listener.told[-1] == "interrupted out"
    before = read_results(Path("out"))
    assert before.done == 2
    monkeypatch.setenv("PRETEND_SECONDS", "0")
    assert table(sweep(SweepOptions(output_dir="out", resume=True))) == table(uncut)


@pytest.mark.usefixtures("pretend")
def test_two_workers_share_the_trials_and_run_none_twice(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETEND_SECONDS", "0.02")
    sets = ("method=craft,lora", "learning_rate=1e-4,1e-3,1e-2,1e-1")
    process = apart(sweep, asked(*sets))
    until(lambda: Path("out/sweep.json").exists())
    results = sweep(asked(*sets, resume=True, jobs=2))
    process.join()
    assert process.exitcode == 0
    assert set(Counter(name for name, *_ in starts()).values()) == {1}
    assert (len(starts()), results.done) == (8, 8)
    workers = {
        trial.user_attrs["worker"]
        for study in _studies("out")
        for trial in study.get_trials()
        if "worker" in trial.user_attrs
    }
    assert len(workers) == 2


def _studies(folder: str) -> list[Any]:
    optuna = studies.import_optuna()
    storage = f"sqlite:///{folder}/study.db"
    return [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]


@pytest.mark.usefixtures("pretend")
def test_the_trial_of_a_worker_without_a_sign_of_life_is_taken_over(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one on another machine, whose process cannot be looked at."""
    monkeypatch.setattr(studies, "GRACE", 1)
    monkeypatch.setattr(studies, "_worker", lambda: "elsewhere:1")
    plan = asked(RATES).plan()
    Path("out").mkdir()
    dead = studies.Studies(Path("out"), plan, "sqlite:///out/study.db", "out")
    dead.create()
    dead.queue(3)
    assert dead.take()
    assert not (dead.take() and dead.take() and dead.take())  # three are taken, none is left
    time.sleep(2.1)
    alive = studies.Studies(Path("out"), plan, "sqlite:///out/study.db", "out")
    alive.open()
    names = [taken.name for _ in range(3) if (taken := alive.take())]
    assert names == ["craft-001", "craft-002", "craft-003"]
    assert [trial.name for trial in alive.trials()] == names
    assert alive.take() is None


@pytest.mark.usefixtures("pretend")
def test_another_sweep_in_one_folder_is_refused_and_more_trials_are_not(asked: Any) -> None:
    sampled = ("learning_rate=1e-4..1e-1",)
    results = sweep(asked(*sampled, trials=2, seeds=(1, 2)))
    with pytest.raises(ConfigError, match="out is a sweep already: --resume goes on with it"):
        sweep(asked(*sampled, trials=2))
    for other, told in (
        (asked(*sampled, resume=True, seeds=(1,)), "--seeds was 1,2, is 1"),
        (asked("learning_rate=1e-4..1", resume=True), "--set learning_rate was 0.0001..0.1, is 0.0001..1"),
        (asked(*sampled, resume=True, settings={"max_steps": 8}), "--max-steps was 12, is 8"),
        (asked(*sampled, "weight_decay=0,0.1", resume=True), "--set weight_decay was not given, is 0.0,0.1"),
        (asked(*sampled, resume=True, trials=1), "--trials 1: out was asked for 2 before"),
        (asked(*sampled, resume=True, storage="sqlite:///x.db"), "in its own study.db: leave --storage out"),
    ):
        with pytest.raises(ConfigError) as raised:
            sweep(other)
        assert told in str(raised.value)
        assert "\n" not in str(raised.value)
    more = sweep(asked(*sampled, resume=True, trials=4))
    assert more.done == 4
    assert {row.trial for row in results.rows} < {row.trial for row in more.rows}
    assert len(starts()) == 8


@pytest.mark.usefixtures("pretend")
def test_a_folder_of_its_own_can_take_part_in_a_sweep_in_a_database(asked: Any) -> None:
    url = "sqlite:///shared.db"
    first = sweep(asked(RATES, output_dir="a/one", storage=url))
    joined = sweep(SweepOptions(output_dir="b/one", storage=url, resume=True))
    assert table(joined) == table(first)
    assert len(starts()) == 3
    assert "shared.db" not in Path("a/one/sweep.json").read_text()  # a URL may hold a password
    with pytest.raises(ConfigError, match="are in a database: give its --storage"):
        sweep(SweepOptions(output_dir="a/one", resume=True))
    with pytest.raises(ConfigError, match="it has a sweep 'one' already"):
        sweep(asked(RATES, output_dir="c/one", storage=url))


@pytest.mark.usefixtures("pretend")
def test_no_trial_begins_after_the_time(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETEND_SECONDS", "0.1")
    results = sweep(asked("learning_rate=1e-4..1e-1", timeout=3.0))
    assert 1 <= results.done < 20
    assert all(row.state == "complete" for row in results.rows)


@pytest.mark.usefixtures("pretend")
def test_each_trial_at_once_has_a_gpu_of_its_own(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("PRETEND_SECONDS", "0.1")
    sweep(asked(RATES, settings={"use_cpu": False}))
    assert {gpu for *_, gpu in starts()} == {"4", "6"}


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


def test_the_recipe_of_the_best_repeats_its_score_and_test_rows_are_scored(pico: Make, asked: Any) -> None:
    write_rows(Path("test.jsonl"), opinions(19, 9))
    real = {"model": str(pico()), "max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1}
    results = sweep(
        asked("learning_rate=3e-2,7e-2", settings=real, seeds=(3,), test_file="test.jsonl", cache_dir="factors")
    )
    assert [row.state for row in results.rows] == ["complete", "complete"]
    best = results.best
    assert best
    assert best.test
    assert best.numbers == 2 * (24**2 + 24**2 + 3**2)
    assert yaml.safe_load(Path("out/best.yaml").read_text())["seed"] == 3
    from craft_cli.config import RunConfig

    config = RunConfig.build({"output_dir": "again", "cache_dir": "factors"}, load_recipe("out/best.yaml"))
    again = craft.train(config)
    assert again.metrics["accuracy"] == best.mean
    assert craft.evaluate("again", source=_source("test.jsonl"), use_cpu=True).metrics["accuracy"] == best.test["mean"]
    assert not Path("runs/latest").resolve().is_relative_to(Path("out").resolve())


def _source(file: str) -> Any:
    from craft_cli.data.sources import DataSource

    return DataSource(validation_file=file)
