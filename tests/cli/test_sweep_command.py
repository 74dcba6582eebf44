"""`craft sweep` on the command line: its flags, its screen, its files, `craft inspect` of it. Runs are pretended."""

from __future__ import annotations

import builtins
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import failure, invoke
from helpers import at, on_a_terminal, whole_at_any_width

from craft_cli.cli import sweep_console
from craft_cli.sweeps.table import read_results

PRETEND = str(Path(__file__).parent.parent / "pretend_training.py")
RATES = ("--set", "learning_rate=1e-3,1e-2,7")


@pytest.fixture
def given(pretend: None, data_dir: Path) -> tuple[str, ...]:
    """A sweep's first words, with a recipe of short runs."""
    recipe = {"model": "base", "task": "sst2", "data_dir": str(data_dir), "use_cpu": True, "max_steps": 8}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    return "sweep", "--recipe", "mine.yaml", "--output-dir", "out"


def test_a_sweep_is_shown_while_it_runs_at_its_end_and_by_inspect(given: tuple[str, ...]) -> None:
    done = invoke(*given, *RATES, "--seeds", "1,2")
    assert done.exit_code == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("craft-")]
    assert re.fullmatch(
        r"craft-001  learning_rate 0\.001  accuracy 0\.\d{4} ± 0\.0007  100 parameters  2 s  best so far", lines[0]
    )
    assert (
        lines[2]
        == "craft-003  learning_rate 7  failed: the loss is nan at update 1: start again with a lower --learning-rate"
    )
    assert "note: 1 of 3 settings failed" in done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("craft-0")]
    assert [row[0] for row in rows[:3]] == ["craft-002", "craft-001", "craft-003"]
    assert rows[0][1:] == ["100", "0.01", "1.0282", "±", "0.0007", "2", "2"]
    assert rows[2][1:] == ["7", "failed", "0"]
    assert re.search("^repeat  craft train --recipe out/best.yaml$", done.stdout, re.MULTILINE)

    again = invoke("inspect", "out")
    assert (again.exit_code, again.stdout) == (0, done.stdout)
    results = read_results(Path("out"))
    found = json.loads(invoke("inspect", "out", "--json").stdout)
    assert (found["kind"], found["metric"], len(found["rows"]), len(found["runs"])) == ("sweep", "accuracy", 3, 5)
    assert "out is a sweep; pass one of its runs" in failure("inspect", "out", "--plot", "x.png")

    whole_at_any_width(lambda: sweep_console.show(results))
    for width in (60, 80, 120):
        assert at(width, lambda: sweep_console.show(results)).count(" failed  ") == 1  # the state of a trial is whole

    resumed = invoke("sweep", "--resume", "--output-dir", "out", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert {"kind": "sweep", **json.loads(resumed.stdout)} == found
    assert "resuming after 3 trials" in resumed.stderr
    assert len(Path("starts").read_text().splitlines()) == 5  # nothing was trained again


def test_a_dry_run_shows_the_trials_and_writes_nothing(given: tuple[str, ...]) -> None:
    done = invoke(*given, "--set", "method=lora", "--set", "rank=2,4", "--seeds", "1,2,3", "--dry-run")
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("lora")]
    assert rows == [["lora", "200", "2", "2"], ["lora", "400", "4", "2"]]
    assert "trials     2, 3 seeds per trial, 1 at once, grid" in done.stdout
    assert "time       about 12 s, estimated from one real step per trial" in done.stdout
    assert not Path("out").exists()
    sampled = invoke(*given, "--trials", "40", "--timeout", "2h", "--dry-run")
    assert "space of craft  learning_rate 0.0003..0.03, head_learning_rate 0.0002..0.02" in sampled.stdout
    assert "trials     40, 1 seed per trial, 1 at once, tpe" in sampled.stdout


def test_what_is_wrong_is_told_in_a_line(given: tuple[str, ...]) -> None:
    assert "--seeds: expected integers such as 1,2,3, not 'a'" in failure(*given, *RATES, "--seeds", "a")
    assert "--timeout: expected a number with s, m, h or d" in failure(*given, *RATES, "--timeout", "2 hours")
    assert "--dry-run cannot be combined with --resume" in failure(*given, *RATES, "--dry-run", "--resume")
    told = failure(*given, "--set", "learning_rat=1", "--set", "rnk=1", lines=2)
    assert "did you mean 'learning_rate'?" in told
    Path("taken").mkdir()
    Path("taken/file").touch()
    assert "taken is not empty" in failure(*given[:3], "--output-dir", "taken", *RATES)
    Path("out").mkdir()
    Path("out/sweep.json").write_text("{}")
    assert "out/sweep.json was written by another version of craft" in failure(*given, *RATES, "--resume")
    assert "none of its trials has ended yet" in failure("inspect", "out")


def test_without_optuna_the_way_to_it_is_told(given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "optuna":
            raise ModuleNotFoundError("No module named 'optuna'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "craft sweep requires Optuna: pip install 'lora-craft[sweep]'" in failure(*given, *RATES)
    assert invoke("sweep", "--help").exit_code == 0


DRIVER = """
import sys
from craft_cli.sweeps import work
work.TRAIN = (sys.executable, sys.argv.pop(1), "--json")
from craft_cli.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_on_a_terminal_there_is_a_bar_with_the_best_and_the_time_left(given: tuple[str, ...], columns: int) -> None:
    command = [sys.executable, "-c", DRIVER, PRETEND, *given, *RATES]
    text = on_a_terminal(command, columns, PRETEND_SECONDS="0.1")
    assert re.search(r"trials .*1/3 +\d+ s left +best accuracy \d\.\d{4}(?: +\(craft-001\))?", text), text[-3000:]
    table = text[text.rindex("trial ") :]
    assert not re.search(r"accuracy +\d\.\d*\r?\n *\d", table)  # no number is broken


def test_what_would_be_tried_is_whole_at_any_width() -> None:
    rates = {"learning_rate": 0.001, "head_learning_rate": 0.003}
    reason = "--superlora-groups 7 does not divide the 12 weights of query and value; choose 6, or remove it here"
    rows = [
        {"method": "craft", "numbers": 16456, "reason": None, "setting": rates | {"ranks": "64,64,6"}, "seconds": 12.3},
        {"method": "lora-xs", "numbers": 1536, "reason": None, "setting": rates | {"rank": 16}, "seconds": 9.0},
        {"method": "superlora", "numbers": None, "reason": reason, "setting": rates, "seconds": None},
    ]
    rest = {"sampler": "grid", "spaces": {}, "seeds": [1], "trials": 3, "jobs": 1, "metric": "f1", "seconds": 60.0}
    whole_at_any_width(lambda: sweep_console.show_rehearsal({"rows": rows} | rest))
    assert " ".join(at(40, lambda: sweep_console.show_rehearsal({"rows": rows} | rest)).split()).count(reason) == 1


def test_sentences_are_broken_between_words_only() -> None:
    shown = on_a_terminal((sys.executable, "-m", "craft_cli", "recipes"), 60)
    lines = [line.rstrip() for line in shown.splitlines()]
    assert [line for line in lines if len(line) > 60] == []
    whole = invoke("recipes").stdout
    assert shown.split() == whole.split()
    assert len(lines) > len(whole.splitlines())
