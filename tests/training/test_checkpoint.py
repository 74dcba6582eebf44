"""A training that was cut and resumed ends as one that never was (DESIGN property 6); what cannot go on is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import DROPOUT, Cut, config, cut, flip, full_disk, leftovers, lines, mostly_slow, same
from safetensors import safe_open

import craft_cli as craft
from craft_cli.errors import FileError
from craft_cli.files import hidden
from craft_cli.training.checkpoint import checkpoints, newest_state
from craft_cli.training.progress import Listener
from craft_cli.training.run import Run

Make = Callable[..., Path]


# -- wherever it is cut --------------------------------------------------------------------------------------------------


def torture(kills: int, seed: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "torture.py", "--kills", str(kills), "--seed", str(seed)],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_many_killed_trainings_end_as_the_uncut_one() -> None:
    result = torture(kills=12, seed=0)
    assert result["kills"] >= 12
    assert result["exact"] == result["runs"]
    assert len(result["where"]) >= 3  # at events of several kinds


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("after", "in_evaluation"),
    [(6, True), *(pytest.param(*moment, marks=pytest.mark.slow) for moment in ((4, False), (6, False), (12, True)))],
)
def test_a_signal_ends_it_whole_and_it_goes_on(
    number: int, after: int, in_evaluation: bool, pico: Make, data_dir: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    base, batch = pico(**DROPOUT), {"per_device_eval_batch_size": 8}
    craft.train(config(base, data_dir, output_dir="uncut", **batch))
    listener = Cut(after, number, in_evaluation=in_evaluation)
    cut(config(base, data_dir, **batch), listener)
    assert listener.told == [(after, Path("out"), True)]
    assert checkpoints(Run(Path("out")))[0].name == f"step-{after}"
    assert Run(Path("out")).state() == f"interrupted at step {after}"
    assert signal.getsignal(signal.SIGINT) is before
    again = Cut(0)
    craft.train(config(base, data_dir, resume=True, **batch), again)
    assert again.plan is not None
    assert again.plan.done == after
    assert Run(Path("out")).state() == "finished"
    same("out", "uncut")


@pytest.mark.slow
def test_it_can_be_cut_twice_before_it_is_evaluated_at_all(pico: Make, data_dir: Path) -> None:
    base = pico(**DROPOUT)
    craft.train(config(base, data_dir, output_dir="uncut"))
    cut(config(base, data_dir), Cut(2))
    assert craft.evaluate("out").examples == 23  # as it was then
    cut(config(base, data_dir, resume=True), Cut(4))
    craft.train(config(base, data_dir, resume=True))
    same("out", "uncut")


@pytest.mark.slow
def test_an_uncut_half_is_the_same_as_a_cut_one_with_accumulation_and_early_stopping(
    pico: Make, data_dir: Path
) -> None:
    settings = {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "num_train_epochs": 9, "eval_steps": 2,
        "early_stopping_patience": 3, "early_stopping_threshold": 0.05, "learning_rate": 0.0,
    }  # fmt: skip
    result = craft.train(config(pico(), data_dir, output_dir="uncut", **settings))
    assert result.stopped_early
    assert result.updates < 45
    cut(config(pico(), data_dir, **settings), Cut(result.updates - 1))
    assert craft.train(config(pico(), data_dir, resume=True, **settings)).stopped_early
    same("out", "uncut")


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def test_checkpoints_come_and_go_as_asked(pico: Make, data_dir: Path) -> None:
    def kept(**settings: Any) -> list[str]:
        craft.train(config(pico(), data_dir, overwrite=True, eval_strategy="no", **settings))
        return [path.name for path in checkpoints(Run(Path("out")))]

    assert kept() == ["step-12", "step-6"]
    assert kept(save_steps=5) == ["step-12", "step-10"]
    assert kept(save_steps=5, save_total_limit=9) == ["step-12", "step-10", "step-5"]
    assert kept(save_total_limit=1) == ["step-12"]
    assert kept(save_strategy="no") == []
    cut(config(pico(), data_dir, overwrite=True, save_strategy="no"), Cut(4))
    assert os.listdir("out/checkpoints") == ["step-4"]


def test_a_checkpoint_is_an_adapter_and_holds_no_base_weights(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir))
    newest = Path("out/checkpoints/step-12")
    names: set[str] = set()
    for path in newest.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    kinds = {name.split(".")[0] for name in names}
    assert kinds == {"transform", "head", "query", "value", "best", "optimizer", "record"}
    assert sum(path.stat().st_size for path in newest.iterdir()) < 100_000
    assert craft.evaluate(newest).metrics["loss"] == pytest.approx(lines()[-1]["eval_loss"], rel=1e-5)
    assert craft.merge(newest, "merged").tensors_changed == 6


FILES = ("adapter_model.safetensors", "training_state.safetensors", "metrics.jsonl")


@pytest.mark.parametrize("damage", mostly_slow(["flip", "cut", "gone"], "flip"))
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_told(damage: str, name: str, half: Callable[..., Any]) -> None:
    victim = Path("out/checkpoints/step-9") / name
    if damage == "flip":
        flip(victim)
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-20])
    else:
        victim.unlink()
    listener = Cut(0)
    craft.train(half(), listener)
    assert listener.plan is not None
    assert listener.plan.done == 8
    assert "step-9" in listener.plan.notes[0]
    assert "is damaged" in listener.plan.notes[0]
    assert listener.plan.notes[0].endswith("; resuming from the previous checkpoint")
    assert Path("out/checkpoints/step-9.damaged").is_dir()  # nothing is thrown away
    same("out", "uncut")


def test_a_checkpoint_of_a_later_version_is_no_damage(
    half: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("craft_cli.files.tensors.FORMAT_VERSION", 0)
    with pytest.raises(FileError, match="upgrade craft"):
        craft.train(half())
    assert Path("out/checkpoints/step-9").is_dir()


def test_what_a_killed_process_left_is_cleared_away(pico: Make, data_dir: Path) -> None:
    cut(config(pico(), data_dir), Cut(9))
    adapter = Path("out/adapter").rename(hidden(Path("out/adapter"), "old"))  # cut between two renames
    shutil.copytree(adapter, hidden(Path("out/adapter"), "part"))
    shutil.copytree("out/checkpoints/step-9", hidden(Path("out/checkpoints/step-10"), "part"))
    hidden(Path("out/recipe.yaml"), "part").write_text("tas")
    craft.train(config(pico(), data_dir, resume=True, save_strategy="no"))
    assert leftovers() == []
    assert craft.evaluate("out").examples == 23
    Path("half").mkdir()
    hidden(Path("half/recipe.yaml"), "part").write_text("tas")
    craft.train(config(pico(), data_dir, output_dir="half", max_steps=1))  # killed before it was a run


def test_a_full_disk_leaves_the_former_checkpoint(pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Listener):
        def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
            if step == 12:
                patch.setattr(os, "fsync", full)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    base = pico(**DROPOUT)
    craft.train(config(base, data_dir, output_dir="uncut"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(FileError, match=r"cannot write out/.*: No space left on device"),
    ):
        craft.train(config(base, data_dir), Full())
    assert [path.name for path in checkpoints(Run(Path("out")))] == ["step-6"]
    with full_disk(30), pytest.raises(FileError, match="cannot write out/"):
        craft.train(config(base, data_dir, resume=True))
    craft.train(config(base, data_dir, resume=True))
    same("out", "uncut")


@pytest.mark.usefixtures("half")
def test_a_damaged_checkpoint_that_cannot_be_set_aside_asks_for_no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    flip(Path("out/checkpoints/step-9/training_state.safetensors"))
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(FileError, match="cannot delete or rename out/checkpoints/step-9: Permission denied; allow it"):
        newest_state(Run(Path("out")))
