"""What people watch: trackers, the log without a terminal, the bar with one, the list of runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import failure, invoke
from helpers import Cut, config, cut, flags, lines, on_a_terminal

import craft_cli as craft
from craft_cli.api.train import train
from craft_cli.errors import ConfigError, CraftError
from craft_cli.training.run import Run

Make = Callable[..., Path]


def events(run: str = "out") -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar that tensorboard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(f"{run}/tensorboard/craft", size_guidance={"scalars": 0})
    shown.Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def logged(key: str, run: str = "out") -> list[tuple[int, Any]]:
    return [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines(run) if key in line]


@pytest.mark.slow
def test_tensorboard_shows_what_metrics_jsonl_says(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, report_to="tensorboard"))
    shown = events()
    assert set(shown) == {"loss", "learning_rate", "eval_accuracy", "eval_loss"}
    for key in shown:
        assert shown[key] == logged(key)
    craft.train(config(pico(), data_dir, output_dir="silent"))
    assert not Path("silent/tensorboard").exists()


def test_a_resumed_run_shows_no_step_twice(pico: Make, data_dir: Path) -> None:
    """It is killed two updates after its checkpoint; those two are reported again and shown once."""

    class Killed(Exception):
        pass

    class Kill(Cut):
        def logged(self, step: int, epoch: float, loss: float, rate: float) -> None:
            if step == 8:
                raise Killed

    settings = {"report_to": "tensorboard", "save_steps": 6}
    with pytest.raises(Killed):
        craft.train(config(pico(), data_dir, **settings), Kill(0))
    craft.train(config(pico(), data_dir, resume=True, **settings))
    assert [step for step, _ in events()["loss"]] == list(range(1, 13))
    assert events()["loss"] == logged("loss")
    assert events()["eval_loss"] == logged("eval_loss")


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_done(
    pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("craft_cli.training.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to wandb: not installed; `pip install wandb`"):
        craft.train(config(pico(), data_dir, report_to="wandb"))
    assert not Path("out").exists()


def test_a_tracker_that_fails_on_the_way_does_not_end_the_training(
    pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, values: Any, step: int, **_: Any) -> None:
        if step == 3:
            raise ConnectionError("server away")

    class Hears(Cut):
        def noticed(self, what: str) -> None:
            heard.append(what)

    heard: list[str] = []
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", fail)
    craft.train(config(pico(), data_dir, report_to="tensorboard"), Hears(0))
    assert heard == ["--report-to: the tracker failed (server away); training continues without it"]
    assert [line["step"] for line in lines() if "loss" in line] == list(range(1, 13))


def test_a_tracker_that_does_not_start_is_told_in_a_line(
    pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", refuse)
    with pytest.raises(CraftError) as refused:
        craft.train(config(pico(), data_dir, report_to="tensorboard"))
    assert str(refused.value) == ("report_to tensorboard: cannot start: no API key configured; set it up, or remove it")


def test_without_a_terminal_there_is_a_line_every_few_updates(pico: Make, data_dir: Path) -> None:
    done = invoke("train", *flags(pico(), data_dir, logging_steps=4))
    assert done.exit_code == 0, done.stderr
    assert "\x1b" not in done.stderr
    body = done.stderr[done.stderr.index("╯") + 2 :].partition("note:")[0].splitlines()
    number = r"[\d.e+-]+"
    assert [line.split()[0] for line in body] == [
        "start", "update", "update", "epoch", "update", "about", "update", "epoch"
    ]  # fmt: skip
    updates = [line for line in body if line.startswith("update")]
    assert [line.split("/")[0].split()[-1] for line in updates] == ["1", "4", "8", "12"]
    for line in updates:
        assert re.fullmatch(rf"update +\d+/12  loss {number}  lr {number}  [\d,]+ examples/s", line)


@pytest.mark.slow
def test_on_a_terminal_the_bar_shows_loss_speed_time_left_and_the_last_metric(pico: Make, data_dir: Path) -> None:
    command = [sys.executable, "-m", "craft_cli", "train", *flags(pico(), data_dir, num_train_epochs=9)]
    text = on_a_terminal(command, 120)
    assert re.search(r"training .*\d+/54 +\d:\d\d:\d\d +loss \d\.\d+ +accuracy \d\.\d+ +[\d,]+ examples/s", text), text[
        -3000:
    ]
    assert "update 10/" not in text


@pytest.mark.slow
def test_a_folder_of_runs_is_listed(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, output_dir="runs/done"))
    cut(config(pico(), data_dir, output_dir="runs/stopped"), Cut(8))
    Path("runs/broken").mkdir()
    Path("runs/broken/recipe.yaml").write_text("task: [")
    Path("runs/else").mkdir()
    shown = invoke("inspect", "runs", "--json")
    assert shown.exit_code == 0, shown.stderr
    listed = json.loads(shown.stdout)
    assert listed["kind"] == "runs"
    *both, broken = listed["runs"]
    assert both[0]["score"] >= both[1]["score"] == both[1]["metrics"]["accuracy"]
    done, stopped = sorted(both, key=lambda run: run["run"])
    assert (done["metric"], done["learning_rate"], done["epochs"]) == ("accuracy", 3e-2, 2.0)
    assert done["parameters"] == Run(Path("runs/done")).results()["parameters"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", done["date"])
    assert (done["run"], done["state"], done["task"], done["ranks"]) == ("runs/done", "finished", "sst2", "6,5,2")
    assert done["metrics"] == Run(Path("runs/done")).results()["metrics"]
    assert (stopped["run"], stopped["state"]) == ("runs/stopped", "interrupted at step 8")
    assert "accuracy" in stopped["metrics"]
    assert broken["state"] == "damaged"
    assert broken["problem"].startswith("--recipe: runs/broken/recipe.yaml: invalid YAML")
    with Run(Path("runs/stopped")).being_trained():
        text = invoke("inspect", "runs")
    names = [line.split()[0] for line in text.stdout.splitlines()[2:]]
    assert names == [Path(run["run"]).name for run in listed["runs"]]
    assert invoke("inspect", "runs", "--html", "runs.html").exit_code == 0
    page = Path("runs.html").read_text()
    assert all(name in page for name in ("done", "stopped", "0.03", "invalid YAML"))
    assert invoke("inspect", "--compare", "runs/done", "runs/stopped", "--html", "two.html").exit_code == 0
    assert "parameters in the adapter" in Path("two.html").read_text()
    assert "running" in text.stdout
    assert "interrupted" not in text.stdout
    assert "runs is a folder of runs; pass one of them" in failure("inspect", "runs", "--plot", "x.png")


def test_inspect_tells_the_state_of_a_run(pico: Make, data_dir: Path) -> None:
    cut(config(pico(), data_dir), Cut(8))
    assert craft.inspect("out").facts["state"] == "interrupted at step 8"
    craft.train(config(pico(), data_dir, resume=True))
    assert craft.inspect("out").facts["state"] == "finished"


def test_names_of_users_are_no_markup(pico: Make) -> None:
    rows = "".join(f"the film was {word},{label}\n" for word, label in [("good", "[/pos]"), ("bad", "[neg]")] * 8)
    Path("own.csv").write_text("text,label\n" + rows)
    own = (
        "--train-file",
        "own.csv",
        "--validation-file",
        "own.csv",
        "--output-dir",
        "my runs/[x] y",
        "--ranks",
        "6,5,2",
    )
    done = invoke("train", "--model", str(pico()), *own, "--max-steps", "1", "--use-cpu")
    assert done.exit_code == 0, done.stderr
    assert "own ([/pos], [neg])" in done.stderr
    assert "[x] y" in invoke("inspect", "my runs").stdout


def test_the_resume_command_can_be_typed_as_it_is_told(pico: Make, data_dir: Path, capsys: Any) -> None:
    from craft_cli.cli.training_console import TrainingConsole

    class Interrupts(TrainingConsole):
        def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
            super().updated(step, loss, rate, examples)
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with Interrupts() as listener, pytest.raises(KeyboardInterrupt):
        train(config(pico(), data_dir, output_dir="my runs/a"), listener)  # type: ignore[arg-type]
    told = capsys.readouterr().err
    assert "resume with  craft train --resume --output-dir 'my runs/a'" in told


def test_where_the_latest_run_is_gone_the_newest_finished_one_is_taken(run: Path) -> None:
    for number, name in enumerate(("old", "newest", "stopped")):
        shutil.copytree(run, Path("runs") / name)
        if name != "stopped":
            Path(f"runs/{name}/all_results.json").write_text("{}")
            os.utime(f"runs/{name}/all_results.json", (number, number))
    for link in (None, "gone"):
        if link:
            Path("runs/latest").symlink_to(link)
        done = invoke("inspect")
        assert done.exit_code == 0, done.stderr
        assert re.search("^run +runs/newest$", done.stdout, re.MULTILINE)
    Path("runs/latest").unlink()
    Path("runs/latest").symlink_to("old")
    assert re.search("^run +runs/old$", invoke("inspect").stdout, re.MULTILINE)
    for name in ("old", "newest"):
        Path(f"runs/{name}/all_results.json").unlink()
    Path("runs/latest").unlink()
    told = failure("inspect")
    assert "is finished; pass one of them: " in told
    assert all(f"runs/{name}" in told for name in ("old", "newest", "stopped"))
    told = failure("train", "--resume")
    assert (
        "there is no run in runs/latest; pass its folder as --output-dir, such as one of these unfinished runs" in told
    )
    assert "runs/stopped" in told


def test_nothing_to_resume_and_nothing_to_train_on(pico: Make) -> None:
    told = failure("train", "--resume", "--output-dir", "typo")
    assert told == "error: --resume: there is no run in typo; pass its folder as --output-dir\n"


@pytest.mark.slow
def test_layers_of_settings(pico: Make, data_dir: Path) -> None:
    """Of a former run, of a recipe, of flags: each speaks for itself, and epochs lift a former limit of updates."""
    Path("my.yaml").write_text("eval_strategy: epoch\n")
    start = flags(pico(), data_dir, max_steps=4, eval_steps=2)
    assert invoke("train", *start, "--recipe", "my.yaml").exit_code == 0
    more = ("--resume", "--output-dir", "out", "--recipe", "my.yaml", "--num-train-epochs", "2", "--use-cpu", "--json")
    done = invoke("train", *more)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["updates"] == 12
    assert [line["step"] for line in lines() if "eval_loss" in line] == [0, 2, 4, 6, 12]


@pytest.mark.slow
def test_the_command_line_goes_on_with_what_the_run_was_started_with(pico: Make, data_dir: Path) -> None:
    """`--resume` alone takes the latest run and its settings; a recipe that says otherwise is refused."""
    craft.train(config(pico(), data_dir, output_dir="uncut", seed=5))
    cut(config(pico(), data_dir, seed=5), Cut(4))
    Path("other.yaml").write_text("task: cola\nseed: 6\n")
    told = failure("train", "--resume", "--recipe", "other.yaml")
    assert "--resume: out has different settings: --task was sst2, is cola, --seed was 5, is 6" in told
    done = invoke("train", "--resume", "--use-cpu", "--json")
    assert done.exit_code == 0, done.stderr
    assert "resuming after update 4 of 12" in done.stderr
    assert lines() == lines("uncut")
    again = invoke("train", "--resume", "--use-cpu")
    assert "all 12 updates done" in again.stderr
    assert again.stdout.lstrip().startswith("label ")
    assert "\nbest " in again.stdout


def test_no_secret_of_the_environment_is_written(
    pico: Make, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither into a run and what becomes of it, nor into what a tracker is given."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, f"hf_secret{name}")
    assert invoke("train", *flags(pico(), data_dir, report_to="tensorboard", num_train_epochs=1)).exit_code == 0
    for made in (["--format", "peft"], ["--format", "adapter"], []):
        assert invoke("merge", "out", *made).exit_code == 0
    assert invoke("inspect", "out", "--html", "page.html").exit_code == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "README.md", "metrics.jsonl", "merge.json"} <= {path.name for path in written}
    assert any(path.name.startswith("events.") for path in written)
    assert not [path for path in written if b"hf_secret" in path.read_bytes()]
