"""Sweeps that are cut, go on, and are worked on by several; see `pretend_training` for their runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import real_runs, same, starts, table_of

from craft_cli.api.sweep import SweepOptions, sweep
from craft_cli.config import load_recipe
from craft_cli.errors import ConfigError, FileError
from craft_cli.sweeps import studies, work
from craft_cli.sweeps.loop import Listener
from craft_cli.sweeps.table import Results, read_results

Make = Callable[..., Path]
RATES = "learning_rate=1e-3,1e-2,1e-1"


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


@pytest.mark.slow
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
    assert table_of(results) == table_of(uncut)
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
    assert table_of(sweep(SweepOptions(output_dir="out", resume=True))) == table_of(uncut)


@pytest.mark.slow
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
    dead.open()
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
    with pytest.raises(ConfigError, match="out already has a sweep; pass --resume to resume it"):
        sweep(asked(*sampled, trials=2))
    for other, told in (
        (asked(*sampled, resume=True, seeds=(1,)), "--seeds was 1,2, is 1"),
        (asked("learning_rate=1e-4..1", resume=True), "--set learning_rate was 0.0001..0.1, is 0.0001..1"),
        (asked(*sampled, resume=True, settings={"max_steps": 8}), "--max-steps was 12, is 8"),
        (asked(*sampled, "weight_decay=0,0.1", resume=True), "--set weight_decay was not given, is 0.0,0.1"),
        (asked(*sampled, resume=True, trials=1), "--trials 1: out already has 2 trials"),
        (asked(*sampled, resume=True, storage="sqlite:///x.db"), "in its own study.db; remove --storage"),
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
    assert table_of(joined) == table_of(first)
    assert len(starts()) == 3
    assert "shared.db" not in Path("a/one/sweep.json").read_text()  # a URL may hold a password
    with pytest.raises(ConfigError, match="are in a database; pass its --storage"):
        sweep(SweepOptions(output_dir="a/one", resume=True))
    with pytest.raises(
        ConfigError,
        match="--storage already has a sweep 'one': pass --resume to join it, or choose another --output-dir for a new sweep",
    ):
        sweep(asked(RATES, output_dir="c/one", storage=url))


@pytest.mark.usefixtures("pretend")
def test_a_sweep_whose_beginner_was_killed_before_all_was_queued_can_be_joined(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "GRACE", 1)
    url, sampled = "sqlite:///shared.db", "learning_rate=1e-4..1e-1"
    process = apart(dying, asked(sampled, trials=3, output_dir="a/one", storage=url), "Study.enqueue_trial", 2)
    process.join()
    assert process.exitcode == 9
    joined = sweep(SweepOptions(output_dir="b/one", storage=url, resume=True))
    assert sorted((row.trial, row.state) for row in joined.rows) == [(f"craft-00{n}", "complete") for n in (1, 2, 3)]


def test_who_joins_waits_while_trials_are_queued(asked: Any) -> None:
    """Or both would queue the same ones."""
    url = "sqlite:///shared.db"
    plan = asked(RATES).plan()
    Path("a").mkdir()
    begun = studies.Studies(Path("a"), plan, url, "one")
    begun.claim(3)
    begun.open()
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(studies.find_plan, url, "one")
        with pytest.raises(TimeoutError):
            joined.result(0.2)
        begun.queue(3)
        assert joined.result() == (plan, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("pretend")
def test_no_trial_begins_after_the_time(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETEND_SECONDS", "0.1")
    results = sweep(asked("learning_rate=1e-4..1e-1", timeout=3.0))
    assert 1 <= results.done < 20
    assert all(row.state == "complete" for row in results.rows)


@pytest.mark.slow
@pytest.mark.usefixtures("pretend")
def test_each_trial_at_once_has_a_gpu_of_its_own(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("PRETEND_SECONDS", "0.1")
    sweep(asked(RATES, settings={"use_cpu": False}))
    assert {gpu for *_, gpu in starts()} == {"4", "6"}


@pytest.mark.slow
def test_a_killed_sweep_of_real_trainings_ends_with_the_same_adapters(pico: Make, asked: Any) -> None:
    settings = real_runs(pico, max_steps=60, save_steps=2)
    uncut = sweep(asked("learning_rate=1e-2,3e-2", settings=settings, output_dir="uncut"))
    process = apart(sweep, asked("learning_rate=1e-2,3e-2", settings=settings))
    until(lambda: list(Path("out/runs").glob("craft-001-*/checkpoints/step-*")), 120)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not Path("out/results.json").exists()
    results = sweep(asked("learning_rate=1e-2,3e-2", settings=settings, resume=True))
    assert table_of(results) == table_of(uncut)
    assert "resuming after update" in Path("out/runs/craft-001-seed42.log").read_text()
    for row in results.rows:
        same(f"out/runs/{row.trial}-seed42", f"uncut/runs/{row.trial}-seed42")


@pytest.mark.usefixtures("pretend")
def test_without_a_folder_there_is_a_new_one_and_resume_takes_the_latest(asked: Any) -> None:
    first = sweep(asked("learning_rate=1e-3", output_dir=None))
    assert Path(first.output).parent == Path("sweeps")
    assert Path(first.output).name.startswith("sst2-base-")
    second = sweep(asked("learning_rate=1e-2", output_dir=None))
    assert sweep(SweepOptions(resume=True)).output == second.output != first.output


def dying(asked: SweepOptions, place: str, call: int) -> None:
    """A sweep whose process is gone at a call of some function of Optuna's."""
    owner, _, name = place.rpartition(".")
    optuna = studies.import_optuna()
    cls = optuna.storages.RDBStorage if owner == "RDBStorage" else optuna.Study
    whole, calls = getattr(cls, name), iter(range(1, call + 1))

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os._exit(9)
        return whole(*arguments, **options)

    setattr(cls, name, counted)
    sweep(asked)


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize(
    ("place", "call"),
    [
        pytest.param("RDBStorage.create_new_study", 1, marks=pytest.mark.slow),  # nothing is in the database
        pytest.param("RDBStorage.create_new_study", 2, marks=pytest.mark.slow),  # the second method is not
        ("Study.enqueue_trial", 4),  # some of the trials are
        pytest.param(
            "RDBStorage.record_heartbeat", 1, marks=pytest.mark.slow
        ),  # one is taken, and nobody knows by whom
    ],
)
def test_a_sweep_that_was_killed_while_it_began_goes_on_whole(
    asked: Any, monkeypatch: pytest.MonkeyPatch, place: str, call: int
) -> None:
    monkeypatch.setattr(studies, "GRACE", 1)
    sets = ("method=craft,lora", "learning_rate=1e-3,1e-2")
    process = apart(dying, asked(*sets, jobs=2), place, call)
    process.join()
    assert process.exitcode == 9
    results = sweep(asked(*sets, jobs=2, resume=True))
    assert sorted(row.trial for row in results.rows) == ["craft-001", "craft-002", "lora-001", "lora-002"]
    assert {row.state for row in results.rows} == {"complete"}
    assert len(starts()) == 4


@pytest.mark.usefixtures("pretend")
def test_trials_that_failed_are_tried_again_where_that_is_asked_for(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep(asked("learning_rate=8,1e-2"))
    assert any("--resume --retry-failed tries them again" in note for note in first.notes)
    script = Path("trained.py").resolve()
    monkeypatch.setattr(work, "TRAIN", (sys.executable, str(script), "--json"))
    pretended = Path(__file__).parent.parent / "pretend_training.py"
    script.write_text(pretended.read_text().replace("rate == 8", "rate == 0"))  # what killed it is mended
    assert sweep(asked("learning_rate=8,1e-2", resume=True)).rows[1].state == "failed"
    again = sweep(asked("learning_rate=8,1e-2", resume=True, retry_failed=True))
    assert [(row.trial, row.state, row.reason) for row in again.rows] == [
        ("craft-002", "complete", ""),
        ("craft-001", "complete", ""),
    ]
    assert [name for name, *_ in starts()] == ["craft-001-seed42", "craft-002-seed42", "craft-001-seed42"]
    with pytest.raises(ConfigError, match="--retry-failed requires --resume"):
        sweep(asked("learning_rate=8,1e-2", retry_failed=True))


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("name", ["what? #1 {x} 100%41", "with\nlines 'and' \"quotes\""])
def test_a_folder_may_have_any_name(asked: Any, name: str) -> None:
    found = sweep(asked("learning_rate=1e-3", output_dir=name))
    assert sweep(SweepOptions(output_dir=name, resume=True)).rows == found.rows
    assert {path.name for path in Path(name).iterdir()} >= {"study.db", "best.yaml", "table.csv"}
    assert {path.name for path in Path().iterdir()} <= {name, "starts", "cache"}
    with pytest.raises(FileError, match="is not UTF-8; choose another name"):
        sweep(asked("learning_rate=1e-3", output_dir="s\udcffrrogate"))


@pytest.mark.usefixtures("pretend")
def test_values_that_were_named_stay_as_they_were_written(asked: Any) -> None:
    results = sweep(asked("learning_rate=0.00123456,0.00987654", sampler="random", trials=1))
    assert results.rows[0].setting["learning_rate"] in (0.00123456, 0.00987654)
    assert results.best
    best = load_recipe("out/best.yaml")
    assert best["learning_rate"] == results.best.setting["learning_rate"]
    assert best["num_processes"] == 1  # as it was trained, however many GPUs there are elsewhere
