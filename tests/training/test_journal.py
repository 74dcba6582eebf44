"""Which adapter is the best one, when to evaluate, when to stop, where to start from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import invoke, opinions, write_rows
from helpers import Remember, config, lines, tensors, write

import craft_cli as craft
from craft_cli.api.predict import predict_file
from craft_cli.errors import ConfigError, CraftError, FileError
from craft_cli.training import loop, setup
from craft_cli.training.preparation import Measured
from craft_cli.training.samples import forget_samples

Make = Callable[..., Path]


class Script:
    """Evaluations that come out as written: accuracy and loss of each after the start, in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *results: tuple[float, float]) -> None:
        self.results = iter(results)
        monkeypatch.setattr(loop, "measure", self.evaluate)

    def evaluate(self, training: Any) -> Measured:
        accuracy, loss = next(self.results) if training.step else (0.1, 9.0)
        scores = [torch.zeros(2)] * 23
        return Measured(training.prepared.task, {"accuracy": accuracy, "loss": loss}, scores, [0] * 23)


def evaluations(run: str = "out") -> list[int]:
    return [line["step"] for line in lines(run) if "eval_loss" in line]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_strategy": "steps", "eval_steps": 5}, [0, 5, 10, 12]),
        pytest.param({}, [0, 6, 12], marks=pytest.mark.slow),
        pytest.param({"eval_steps": 4}, [0, 4, 8, 12], marks=pytest.mark.slow),
        pytest.param({"eval_strategy": "no"}, [], marks=pytest.mark.slow),
        pytest.param({"num_train_epochs": 1.5}, [0, 6, 9], marks=pytest.mark.slow),
    ],
)
def test_it_evaluates_when_it_is_told_to_and_at_the_end(
    settings: dict[str, Any], expected: list[int], pico: Make, data_dir: Path
) -> None:
    result = craft.train(config(pico(), data_dir, **settings))
    assert evaluations() == expected
    assert os.path.isfile("out/training_curve.png") is bool(expected)
    assert bool(result.metrics) is bool(expected)
    assert craft.evaluate("out").examples == 23


@pytest.mark.slow
def test_without_evaluations_the_last_adapter_is_kept(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, eval_strategy="no"))
    craft.train(config(pico(), data_dir, output_dir="each", save_total_limit=1))
    from safetensors.torch import load_file

    newest = load_file("each/checkpoints/step-12/adapter_model.safetensors")
    assert all(torch.equal(tensor, newest[name]) for name, tensor in tensors().items())
    shown = invoke("train", "--recipe", "out/recipe.yaml", "--output-dir", "shown", "--use-cpu")
    assert shown.exit_code == 0, shown.stderr
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["time", "adapter", "next"]


def test_the_metric_chooses_the_best(pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = [(0.5, 0.9), (0.8, 0.7), (0.7, 0.2), (0.6, 0.4)]
    for metric, epoch in ((None, 2.0), ("eval_loss", 3.0)):
        Script(monkeypatch, *script)
        result = craft.train(config(pico(), data_dir, num_train_epochs=4, metric_for_best_model=metric, overwrite=True))
        assert result.epoch == epoch
        record = json.loads(Path("out/adapter/adapter_config.json").read_text())["training"]
        assert record["epoch"] == epoch
        assert record["metrics"] == result.metrics


def test_a_metric_that_the_task_does_not_have_is_refused(pico: Make, data_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match="metric_for_best_model: sst2 has no metric 'acuracy'; did you mean 'accuracy'"
    ):
        craft.train(config(pico(), data_dir, metric_for_best_model="acuracy", dry_run=True))


@pytest.mark.parametrize(
    ("patience", "threshold", "updates"),
    [
        (2, None, 24),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in ((1, None, 18), (2, 0.15, 18), (3, None, 36), (None, None, 36))
        ),
    ],
)
def test_early_stopping(
    patience: int | None,
    threshold: float | None,
    updates: int,
    pico: Make,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Script(monkeypatch, (0.5, 1.0), (0.6, 1.0), (0.6, 1.0), (0.55, 1.0), (0.7, 1.0), (0.7, 1.0))
    result = craft.train(
        config(
            pico(), data_dir, num_train_epochs=6, early_stopping_patience=patience, early_stopping_threshold=threshold
        )
    )
    assert result.updates == updates
    assert result.stopped_early is (updates < 36)


def test_a_loss_that_still_falls_is_told_with_the_way_on(
    pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script(monkeypatch, (0.5, 1.0), (0.5, 0.8), (0.5, 0.8))
    result = craft.train(config(pico(), data_dir))
    (told,) = [line for line in result.remarks if "still falling" in line]
    flags = told.split("continue with craft train ")[1].split()
    assert flags == ["--resume", "--output-dir", "out", "--num-train-epochs", "3"]
    again = craft.train(config(pico(), data_dir, resume=True, num_train_epochs=float(flags[-1])))
    assert again.updates == 18
    assert not [line for line in again.remarks if "still falling" in line]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_strategy": "steps"}, "--eval-strategy steps requires --eval-steps"),
        ({"save_strategy": "epoch", "save_steps": 3}, "--save-steps requires --save-strategy steps"),
        ({"eval_strategy": "no", "early_stopping_patience": 1}, "--early-stopping-patience requires evaluations"),
        ({"eval_strategy": "no", "metric_for_best_model": "loss"}, "--metric-for-best-model requires evaluations"),
        ({"early_stopping_threshold": 0.1}, "--early-stopping-threshold requires --early-stopping-patience"),
        (
            {"load_in_4bit": True, "load_in_8bit": True},
            "--load-in-4bit and --load-in-8bit cannot be combined; choose one",
        ),
        ({"report_to": "tensorbord"}, "--report-to: unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        ({"report_to": "none,wandb"}, "--report-to: none cannot be combined with trackers"),
        ({"init_from": "run", "init_noise": True}, "--init-from and --init-noise cannot be combined"),
        ({"resume": True, "dry_run": True}, "--resume cannot be combined with --overwrite or --dry-run"),
        ({"save_total_limit": 0}, "--save-total-limit"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(Path("m"), Path("d"), **settings)
    assert told in str(refused.value)


def test_a_flag_of_steps_overrides_a_recipe_of_epochs() -> None:
    from craft_cli.config import RunConfig

    recipe = {"task": "sst2", "eval_strategy": "epoch", "save_steps": 7}
    built = RunConfig.build({"eval_steps": 5, "save_strategy": "epoch"}, recipe)
    assert (built.eval_strategy, built.eval_steps, built.save_strategy, built.save_steps) == ("steps", 5, "epoch", None)


def test_a_loss_that_is_not_finite_stops_with_advice_and_the_best_is_kept(pico: Make, data_dir: Path) -> None:
    class Break(Remember):
        """Makes the head infinite after the first epoch."""

        def evaluated(self, step: int, epoch: float, metrics: Any, *, best: bool) -> None:
            super().evaluated(step, epoch, metrics, best=best)
            if step:
                heads[0].data.fill_(float("inf"))

    heads: list[torch.Tensor] = []
    former = setup.build

    def build(*arguments: Any) -> Any:
        model, *others = former(*arguments)
        heads.append(model.classifier.weight)
        return model, *others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "build", build)
        with pytest.raises(CraftError) as stopped:
            craft.train(config(pico(), data_dir), Break())
    assert str(stopped.value) == (
        "head.classifier.weight is not finite after update 6: start again with a lower learning_rate or head_learning_rate; "
        "the best adapter so far is in out/adapter"
    )
    assert craft.evaluate("out").metrics["loss"] == pytest.approx(lines()[-1]["eval_loss"], rel=1e-5)
    assert craft.inspect("out").facts["state"] == "interrupted at step 6"


# -- another run's transforms --------------------------------------------------------------------------------------------


def nli(folder: str, rows: int = 12) -> Path:
    """Data of three labels, in the columns of mnli."""
    texts = [row["sentence"] for row in opinions(rows, 4)]
    written = [{"premise": text, "hypothesis": "the film", "label": row % 3} for row, text in enumerate(texts)]
    write_rows(Path(folder) / "train.jsonl", written)
    return write_rows(Path(folder) / "validation.jsonl", written).parent


@pytest.mark.slow
def test_it_starts_from_the_transforms_of_another_run_with_a_new_head(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), nli("mnli"), task="mnli", output_dir="first"))
    settings = {"init_from": "first", "learning_rate": 0.0, "num_train_epochs": 1}
    craft.train(config(pico(), data_dir, **settings))
    craft.train(config(pico(), data_dir, output_dir="plain", learning_rate=0.0, num_train_epochs=1))
    first, ours, plain = tensors("first"), tensors(), tensors("plain")
    transforms = [name for name in first if name.startswith("transform.")]
    assert all(torch.equal(first[name], ours[name]) for name in transforms)
    assert any(ours[name].any() for name in transforms)
    assert not any(plain[name].any() for name in transforms)
    assert ours["head.classifier.weight"].shape == (2, 24)
    assert lines()[0]["eval_loss"] != lines("plain")[0]["eval_loss"]
    assert Path(json.loads(Path("out/adapter/adapter_config.json").read_text())["training"]["recipe"]["init_from"]) == (
        Path("first").resolve()
    )


def test_what_does_not_fit_another_runs_transforms_is_refused(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, output_dir="first", max_steps=1))
    for settings, told in (
        ({"ranks": "5,5,2"}, "init_from: first has ranks 6,5,2; pass ranks 6,5,2"),
        ({"targets": "query"}, "init_from: first adapts query,value; pass targets query,value"),
    ):
        with pytest.raises(ConfigError) as refused:
            craft.train(config(pico(), data_dir, init_from="first", **settings))
        assert str(refused.value) == told
    with pytest.raises(CraftError, match=r"has different weights \(query\) from those the adapter was trained on"):
        craft.train(config(pico(vocab_size=65), data_dir, init_from="first"))
    with pytest.raises(
        FileError,
        match="init_from: nowhere is neither a run nor an adapter",
    ):
        craft.train(config(pico(), data_dir, init_from="nowhere"))
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_requeued_start_from_another_run_still_knows_its_model(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, output_dir="first", max_steps=1))
    command = ("train", "--init-from", "first", "--task", "sst2", "--data-dir", str(data_dir), "--max-steps", "1")
    done = invoke(*command, "--use-cpu", "--output-dir", "second", "--resume", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["parameters"]["adapter"] == 130


@pytest.mark.slow
def test_model_and_ranks_of_the_other_run_need_not_be_said_again(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, output_dir="first", max_steps=1))
    done = invoke(
        "train", "--init-from", "first", "--task", "sst2", "--data-dir", str(data_dir), "--max-steps", "1", "--use-cpu",
        "--output-dir", "second", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["parameters"]["adapter"] == 130
    Path("in.txt").write_text("the film was good\n")
    assert predict_file("second", input="in.txt", output="out.jsonl", use_cpu=True) == 1


def test_damaged_samples_of_former_evaluations_are_left_out() -> None:
    good = b'{"step": 2, "answer": "a"}\n'
    write(
        "samples.jsonl", b"\xff\xfe\n[]\n5\n{}\n" + good + b'{"step": "x"}\n{"step": 9}\n' + b"[" * 100_000 + b'\n{"st'
    )
    forget_samples(Path("samples.jsonl"), 4)
    assert Path("samples.jsonl").read_bytes() == good
