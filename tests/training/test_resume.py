"""What may change when a training is resumed, what may not, and what is left alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import opinions, write_rows
from helpers import Cut, config, cut, flip, lines, mostly_slow, same, tensors

import craft_cli as craft
from craft_cli.errors import ConfigError, CraftError, FileError
from craft_cli.training.progress import Listener
from craft_cli.training.run import Run

Make = Callable[..., Path]


@pytest.mark.slow
def test_more_epochs_and_other_logging_may_follow(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir))
    listener = Cut(0)
    result = craft.train(
        config(pico(), data_dir, resume=True, num_train_epochs=4, logging_steps=3, eval_steps=9), listener
    )
    assert listener.plan is not None
    assert (listener.plan.done, result.updates) == (12, 24)
    assert [line["step"] for line in lines() if "loss" in line] == [*range(1, 13), 15, 18, 21, 24]
    assert [line["step"] for line in lines() if "eval_loss" in line] == [0, 6, 12, 18, 24]
    with pytest.raises(ConfigError, match="has already made 24 updates, but num_train_epochs or max_steps end it at 6"):
        craft.train(config(pico(), data_dir, resume=True, num_train_epochs=1))


@pytest.mark.slow
def test_a_finished_run_resumed_says_the_same_again(pico: Make, data_dir: Path) -> None:
    first = craft.train(config(pico(), data_dir))
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file() and path.suffix != ".json"}
    again = craft.train(config(pico(), data_dir, resume=True))
    assert (again.metrics, again.updates, again.epoch) == (first.metrics, first.updates, first.epoch)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"task": "cola"}, "task was sst2, is cola"),
        ({"ranks": "5,5,2"}, "ranks was 6,5,2, is 5,5,2"),
        ({"seed": 7}, "seed was 42, is 7"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 8, is 4"),
        ({"learning_rate": 0.1, "bf16": True}, "learning_rate was 0.03, is 0.1, bf16 was False, is True"),
        ({"max_train_samples": 40}, "max_train_samples was not given, is 40"),
        ({"targets": "query"}, "targets was query,value, is query"),
        ({"text_columns": '"a,b"'}, 'text_columns was not given, is "a,b"'),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model was not given, is loss"),
    ],
)
def test_settings_that_matter_are_held(changed: dict[str, Any], told: str, half: Callable[..., Any]) -> None:
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as refused:
        craft.train(half(**changed))
    assert str(refused.value) == (
        f"resume: out has different settings: {told}; use the original settings, or choose another output_dir"
    )
    assert before == {path: path.read_bytes() for path in before}


def test_another_spelling_and_no_cache_of_factors_are_no_change(half: Callable[..., Any]) -> None:
    """The checkpoint has the very basis; a new decomposition might choose another."""
    craft.train(half(task="SST-2", cache_dir="empty"))
    assert not list(Path("empty").rglob("*.safetensors"))
    same("out", "uncut")


@pytest.mark.slow
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
    with pytest.raises(ConfigError, match="the training or validation rows of out have changed"):
        craft.train(config(pico(), Path("data"), resume=True))


def test_another_base_model_is_refused(pico: Make, data_dir: Path) -> None:
    shutil.copytree(pico(), "base")
    cut(config(Path("base"), data_dir), Cut(4))
    shutil.copytree(pico(vocab_size=65), "base", dirs_exist_ok=True)
    with pytest.raises(
        CraftError, match="base has different weights \\(query\\) from those the adapter was trained on"
    ):
        craft.train(config(Path("base"), data_dir, resume=True))


@pytest.mark.parametrize("case", mostly_slow(["finished", "damaged", "never"], "damaged"))
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
    with pytest.raises(FileError, match="out has no checkpoint to resume from") as refused:
        craft.train(config(pico(), data_dir, resume=True, **settings))
    told = {"finished": "it is finished", "damaged": "is damaged", "never": "it was trained with save_strategy no"}
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
    with pytest.raises(ConfigError, match=r"learning_rate was 0.03, is 0.5"):
        craft.train(half(learning_rate=0.5))
    craft.train(half())
    same("out", "uncut")


@pytest.mark.slow
def test_a_run_of_bf16_by_the_launcher_goes_on_in_it_only(
    pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        patch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        cut(config(pico(), data_dir), Cut(4))
    assert Run(Path("out")).recipe()["bf16"] is True
    with pytest.raises(ConfigError, match="bf16 was True, is False"):
        craft.train(config(pico(), data_dir, resume=True))
    craft.train(config(pico(), data_dir, resume=True, bf16=True))
    craft.train(config(pico(), data_dir, output_dir="uncut", bf16=True))
    same("out", "uncut")


def test_evaluations_cannot_be_given_up_once_there_is_a_best(half: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="eval_strategy was epoch, is no"):
        craft.train(half(eval_strategy="no"))


@pytest.mark.slow
def test_data_that_moved_is_the_same_data(pico: Make, data_dir: Path) -> None:
    shutil.copytree(data_dir, "data")
    craft.train(config(pico(), Path("data"), output_dir="uncut"))
    cut(config(pico(), Path("data")), Cut(4))
    Path("data").rename("elsewhere")
    craft.train(config(pico(), Path("elsewhere"), resume=True))
    same("out", "uncut")


@pytest.mark.slow
def test_with_nothing_to_resume_it_begins(pico: Make, data_dir: Path) -> None:
    listener = Cut(0)
    craft.train(config(pico(), data_dir, resume=True, output_dir="new"), listener)
    assert listener.plan is not None
    assert listener.plan.notes == ["nothing to resume in new, starting from the beginning"]
    shutil.rmtree("new/checkpoints")  # as if it had been killed before the first one
    Path("new/all_results.json").unlink()
    Path("new/notes.txt").write_text("mine")
    craft.train(config(pico(), data_dir, resume=True, output_dir="new"), listener)
    assert Path("new/notes.txt").is_file()
    assert listener.plan.notes == ["new has no checkpoint yet, starting from the beginning"]
    with pytest.raises(ConfigError, match="--resume cannot be combined with --overwrite"):
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
    assert states == ["running", "running"]
    assert Run(Path("out")).state() == "finished"
