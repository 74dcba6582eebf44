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
import torch
from conftest import opinions, write_rows
from safetensors import safe_open
from test_damage import flip, full_disk, leftovers
from test_training import config, lines, tensors

import craft_cli as craft
from craft_cli.errors import ConfigError, CraftError, FileError
from craft_cli.progress import Listener, Plan
from craft_cli.runs import Run
from craft_cli.training_state import checkpoints, read_checkpoint

Make = Callable[..., Path]
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


class Cut(Listener):
    """Sends a signal to this process once: after an update, or inside an evaluation that follows it."""

    def __init__(self, after: int, number: int = signal.SIGINT, *, in_evaluation: bool = False) -> None:
        self.after, self.number, self.in_evaluation, self.step = after, number, in_evaluation, 0
        self.told: list[tuple[int, Path | None, bool]] = []
        self.plan: Plan | None = None

    def started(self, plan: Plan) -> None:
        self.plan, self.step = plan, plan.done

    def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
        self.step = step
        if step == self.after - 1 and not self.in_evaluation:  # heard of after the next one
            os.kill(os.getpid(), self.number)

    def evaluating(self, done: int, total: int) -> None:
        if self.step == self.after and self.in_evaluation and done < total:
            os.kill(os.getpid(), self.number)

    def interrupted(self, step: int, run: Path | None, *, resumable: bool) -> None:
        self.told.append((step, run, resumable))


def cut(settings: Any, listener: Cut) -> None:
    """Train until the signal; 6 updates an epoch."""
    ending: type[BaseException] = KeyboardInterrupt if listener.number == signal.SIGINT else SystemExit
    with pytest.raises(ending) as ended:
        craft.train(settings, listener)
    if listener.number == signal.SIGTERM:
        assert isinstance(ended.value, SystemExit)
        assert ended.value.code == 143


def same(run: str, other: str) -> None:
    """Two runs ended alike, to the bit."""
    assert lines(run) == lines(other)
    first, second = tensors(run), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    newest = [checkpoints(Run(Path(name))) for name in (run, other)]
    if all(newest):
        last, expected = (read_checkpoint(paths[0]) for paths in newest)
        assert (last.step, last.metrics) == (expected.step, expected.metrics)
        for name in ("journal", "rng", "update_size", "data"):
            assert last.record[name] == expected.record[name], name
    results, others = Run(Path(run)).results(), Run(Path(other)).results()
    assert {n: v for n, v in results.items() if n not in ("seconds", "output")} == {
        n: v for n, v in others.items() if n not in ("seconds", "output")
    }


# -- wherever it is cut --------------------------------------------------------------------------------------------------


def torture(kills: int, seed: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "torture.py", "--kills", str(kills), "--seed", str(seed)],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_few_killed_trainings_end_as_the_uncut_one() -> None:
    result = torture(kills=4, seed=11)
    assert result["kills"] >= 4
    assert result["exact"] == result["runs"]


@pytest.mark.slow
def test_many_killed_trainings_end_as_the_uncut_one() -> None:
    result = torture(kills=60, seed=0)
    assert result["kills"] >= 60
    assert result["exact"] == result["runs"]
    assert {"gradient accumulation", "evaluation", "the optimizer step", "writing a file or folder"} <= set(
        result["where"]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("after", "in_evaluation"), [(4, False), (6, False), (6, True), (12, True)])
def test_a_signal_ends_it_whole_and_it_goes_on(
    number: int, after: int, in_evaluation: bool, pico: Make, data_dir: Path
) -> None:
    base, batch = pico(**DROPOUT), {"per_device_eval_batch_size": 8}
    craft.train(config(base, data_dir, output_dir="uncut", **batch))
    listener = Cut(after, number, in_evaluation=in_evaluation)
    cut(config(base, data_dir, **batch), listener)
    assert listener.told == [(after, Path("out"), True)]
    assert checkpoints(Run(Path("out")))[0].name == f"step-{after}"
    assert Run(Path("out")).state() == f"interrupted at step {after}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = Cut(0)
    craft.train(config(base, data_dir, resume=True, **batch), again)
    assert again.plan is not None
    assert again.plan.done == after
    assert Run(Path("out")).state() == "finished"
    same("out", "uncut")


def test_it_can_be_cut_twice_before_it_is_evaluated_at_all(pico: Make, data_dir: Path) -> None:
    base = pico(**DROPOUT)
    craft.train(config(base, data_dir, output_dir="uncut"))
    cut(config(base, data_dir), Cut(2))
    assert craft.evaluate("out").examples == 23  # as it was then
    cut(config(base, data_dir, resume=True), Cut(4))
    craft.train(config(base, data_dir, resume=True))
    same("out", "uncut")


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


@pytest.fixture(scope="module")
def halves(pico: Make, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `uncut`, and a run `out` that was cut after 9 of 12 updates; checkpoints every 4."""
    folder = tmp_path_factory.mktemp("halves")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        craft.train(config(pico(**DROPOUT), data_dir, output_dir="uncut", save_steps=4, cache_dir="factors"))
        cut(config(pico(**DROPOUT), data_dir, save_steps=4, cache_dir="factors"), Cut(9))
    return folder


@pytest.fixture
def half(halves: Path, tmp_path: Path, pico: Make, data_dir: Path) -> Callable[..., Any]:
    """Copies of them in the working folder; a function of changed settings gives those to resume with."""
    for name in ("uncut", "out"):
        shutil.copytree(halves / name, tmp_path / name)
    base = pico(**DROPOUT)
    return lambda **changed: config(base, data_dir, **({"resume": True, "save_steps": 4} | changed))


FILES = ("adapter_model.safetensors", "training_state.safetensors", "metrics.jsonl")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
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
    assert listener.plan.notes[0].endswith("; going on from the checkpoint before")
    assert Path("out/checkpoints/step-9.damaged").is_dir()  # nothing is thrown away
    same("out", "uncut")


def test_a_checkpoint_of_a_later_version_is_no_damage(
    half: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("craft_cli.files.FORMAT_VERSION", 0)
    with pytest.raises(FileError, match="upgrade craft"):
        craft.train(half())
    assert Path("out/checkpoints/step-9").is_dir()


def test_what_a_killed_process_left_is_cleared_away(pico: Make, data_dir: Path) -> None:
    cut(config(pico(), data_dir), Cut(9))
    adapter = Path("out/adapter").rename("out/.adapter.x1.old")  # cut between two renames
    shutil.copytree(adapter, "out/.adapter.x2.part")
    shutil.copytree("out/checkpoints/step-9", "out/checkpoints/.step-10.x3.part")
    Path("out/.recipe.yaml.17.part").write_text("tas")
    craft.train(config(pico(), data_dir, resume=True, save_strategy="no"))
    assert leftovers() == []
    assert craft.evaluate("out").examples == 23
    Path("half/.recipe.yaml.17.part").parent.mkdir()
    Path("half/.recipe.yaml.17.part").write_text("tas")
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


# -- what may change, and what may not -----------------------------------------------------------------------------------


def test_more_epochs_and_other_logging_may_follow(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir))
    listener = Cut(0)
    result = craft.train(
        config(pico(), data_dir, resume=True, num_train_epochs=4, logging_steps=3, eval_steps=9), listener
    )
    assert listener.plan is not None
    assert (listener.plan.done, result.updates) == (12, 24)
    assert [line["step"] for line in lines() if "loss" in line] == [*range(1, 13), 15, 18, 21, 24]
    assert [line["step"] for line in lines() if "eval_loss" in line] == [6, 12, 18, 24]
    with pytest.raises(
        ConfigError, match="has made 24 updates already, but --num-train-epochs or --max-steps end it at 6"
    ):
        craft.train(config(pico(), data_dir, resume=True, num_train_epochs=1))


def test_a_finished_run_resumed_says_the_same_again(pico: Make, data_dir: Path) -> None:
    first = craft.train(config(pico(), data_dir))
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file() and path.suffix != ".json"}
    again = craft.train(config(pico(), data_dir, resume=True))
    assert (again.metrics, again.updates, again.epoch) == (first.metrics, first.updates, first.epoch)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"task": "cola"}, "--task was sst2, is cola"),
        ({"ranks": "5,5,2"}, "--ranks was 6,5,2, is 5,5,2"),
        ({"seed": 7}, "--seed was 42, is 7"),
        ({"per_device_train_batch_size": 4}, "--per-device-train-batch-size was 8, is 4"),
        ({"learning_rate": 0.1, "bf16": True}, "--learning-rate was 0.03, is 0.1, --bf16 was False, is True"),
        ({"max_train_samples": 40}, "--max-train-samples was not given, is 40"),
        ({"targets": "query"}, "--targets was query,value, is query"),
        ({"metric_for_best_model": "loss"}, "--metric-for-best-model was not given, is loss"),
    ],
)
def test_settings_that_matter_are_held(changed: dict[str, Any], told: str, half: Callable[..., Any]) -> None:
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as refused:
        craft.train(half(**changed))
    assert str(refused.value) == (
        f"--resume: out cannot go on with other settings: {told}; give the former ones, or choose another --output-dir"
    )
    assert before == {path: path.read_bytes() for path in before}


def test_another_spelling_and_no_cache_of_factors_are_no_change(half: Callable[..., Any]) -> None:
    """The checkpoint has the very basis; a new decomposition might choose another."""
    craft.train(half(task="SST-2", cache_dir="empty"))
    assert not list(Path("empty").rglob("*.safetensors"))
    same("out", "uncut")


def test_the_same_batch_in_other_portions_is_no_change(pico: Make, data_dir: Path) -> None:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    craft.train(config(pico(), data_dir, output_dir="whole"))
    cut(config(pico(), data_dir, output_dir="parts"), Cut(4))
    craft.train(config(pico(), data_dir, output_dir="parts", resume=True, **settings))
    for name, tensor in tensors("parts").items():
        assert torch.allclose(tensor, tensors("whole")[name], atol=1e-6), name


def test_other_rows_are_refused(pico: Make, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir, "data")
    cut(config(pico(), Path("data")), Cut(4))
    write_rows(Path("data/validation.jsonl"), opinions(24, 2))
    with pytest.raises(ConfigError, match="out cannot go on: the rows it was trained or evaluated on have changed"):
        craft.train(config(pico(), Path("data"), resume=True))


def test_another_base_model_is_refused(pico: Make, data_dir: Path) -> None:
    shutil.copytree(pico(), "base")
    cut(config(Path("base"), data_dir), Cut(4))
    shutil.copytree(pico(vocab_size=65), "base", dirs_exist_ok=True)
    with pytest.raises(CraftError, match="base has other weights than those the transforms were trained on"):
        craft.train(config(Path("base"), data_dir, resume=True))


@pytest.mark.parametrize("case", ["finished", "damaged", "never"])
def test_a_run_without_a_usable_checkpoint_is_left_alone(case: str, pico: Make, data_dir: Path) -> None:
    settings = {"save_strategy": "no" if case == "never" else "epoch", "save_total_limit": 1}
    craft.train(config(pico(), data_dir, **settings))
    Path("out/notes.txt").write_text("mine")
    if case == "finished":
        shutil.rmtree("out/checkpoints")
    elif case == "damaged":
        flip(Path("out/checkpoints/step-12/training_state.safetensors"))
    else:
        Path("out/all_results.json").unlink()
    before = {path: path.read_bytes() for path in Path("out").glob("*/*.*") if "checkpoints" not in str(path)}
    with pytest.raises(FileError, match="out has no checkpoint to go on from") as refused:
        craft.train(config(pico(), data_dir, resume=True, **settings))
    told = {"finished": "it is finished", "damaged": "is damaged", "never": "it was trained with --save-strategy no"}
    assert told[case] in str(refused.value)
    assert before == {path: path.read_bytes() for path in before}
    assert Path("out/notes.txt").is_file()


def test_a_former_run_makes_room_only_when_the_settings_hold(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir))
    with pytest.raises(ConfigError, match="no metric 'acuracy'"):
        craft.train(config(pico(), data_dir, overwrite=True, metric_for_best_model="acuracy"))
    assert Run(Path("out")).state() == "finished"


def test_an_edited_recipe_is_no_way_round_the_settings(half: Callable[..., Any]) -> None:
    recipe = Path("out/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("\nlearning_rate: 0.03", "\nlearning_rate: 0.5"))
    with pytest.raises(ConfigError, match=r"--learning-rate was 0.03, is 0.5"):
        craft.train(half(learning_rate=0.5))
    craft.train(half())
    same("out", "uncut")


def test_a_run_of_bf16_by_the_launcher_goes_on_in_it_only(
    pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        patch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        cut(config(pico(), data_dir), Cut(4))
    assert Run(Path("out")).recipe()["bf16"] is True
    with pytest.raises(ConfigError, match="--bf16 was True, is False"):
        craft.train(config(pico(), data_dir, resume=True))
    craft.train(config(pico(), data_dir, resume=True, bf16=True))
    craft.train(config(pico(), data_dir, output_dir="uncut", bf16=True))
    same("out", "uncut")


def test_evaluations_cannot_be_given_up_once_there_is_a_best(half: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="--eval-strategy was epoch, is no"):
        craft.train(half(eval_strategy="no"))


def test_data_that_moved_is_the_same_data(pico: Make, data_dir: Path) -> None:
    shutil.copytree(data_dir, "data")
    craft.train(config(pico(), Path("data"), output_dir="uncut"))
    cut(config(pico(), Path("data")), Cut(4))
    Path("data").rename("elsewhere")
    craft.train(config(pico(), Path("elsewhere"), resume=True))
    same("out", "uncut")


def test_with_nothing_to_resume_it_begins(pico: Make, data_dir: Path) -> None:
    listener = Cut(0)
    craft.train(config(pico(), data_dir, resume=True, output_dir="new"), listener)
    assert listener.plan is not None
    assert listener.plan.notes == ("nothing to resume in new: starting from the beginning",)
    shutil.rmtree("new/checkpoints")  # as if it had been killed before the first one
    Path("new/all_results.json").unlink()
    Path("new/notes.txt").write_text("mine")
    craft.train(config(pico(), data_dir, resume=True, output_dir="new"), listener)
    assert Path("new/notes.txt").is_file()
    assert listener.plan.notes == ("new has no checkpoint yet: starting from the beginning",)
    with pytest.raises(ConfigError, match="--resume excludes --overwrite"):
        config(pico(), data_dir, resume=True, overwrite=True)


def test_two_trainings_in_one_folder_are_refused(pico: Make, data_dir: Path) -> None:
    class Second(Listener):
        def evaluated(self, step: int, epoch: float, metrics: Any, *, best: bool) -> None:
            states.append(Run(Path("out")).state())
            for settings in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(FileError, match="out is being trained by another process"):
                    craft.train(config(pico(), data_dir, **settings))

    states: list[str] = []
    craft.train(config(pico(), data_dir, num_train_epochs=1), Second())
    assert states == ["running"]
    assert Run(Path("out")).state() == "finished"
