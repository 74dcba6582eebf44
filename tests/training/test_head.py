"""Where the head starts, what its outputs mean in training and on disk, and how long a training is where that is left open."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, invoke, opinions, write_rows
from helpers import (
    Cut,
    Remember,
    config,
    craft_command,
    cut,
    flags,
    lines,
    mostly_slow,
    numbers,
    own_config,
    same,
    tensors,
)
from picos import names
from sklearn.linear_model import LogisticRegression

import craft_cli as craft
from craft_cli.config import RunConfig
from craft_cli.data.sources import DataSource
from craft_cli.tasks import probe as fits
from craft_cli.training.checkpoint import read_checkpoint
from craft_cli.training.head import MOST_ROWS, LastLayer, share_of_rows
from craft_cli.training.schedule import ENOUGH_UPDATES, MOST_EPOCHS, length_settled

Make = Callable[..., Path]
PROBE = {"head_start": "probe"}


@pytest.mark.parametrize("family", mostly_slow(names("AutoModelForSequenceClassification"), "bert", "llama"))
def test_the_last_layer_is_found_and_fitted_for_every_family(family: str, pico: Make, data_dir: Path) -> None:
    """Evaluated on the rows that the probe is fitted on: on others, the features of a random model may say nothing."""
    if family == "qwen2":
        pytest.skip("transformers replaces its tokenizer, and every text is the same unknown word")
    Path("same").mkdir()
    for split in ("train", "validation"):
        shutil.copy(data_dir / "train.jsonl", f"same/{split}.jsonl")
    craft.train(config(pico(family), Path("same"), max_steps=1, targets="all-linear", **PROBE))
    assert craft.merge("out").difference <= 1e-5
    result = json.loads(Path("out/all_results.json").read_text())
    assert result["baselines"]["head_alone"]["accuracy"] > result["baselines"]["same_answer"]["accuracy"]
    start = next(line for line in lines() if "eval_loss" in line)
    assert {f"eval_{name}": value for name, value in result["baselines"]["head_alone"].items()} == {
        name: value for name, value in start.items() if name.startswith("eval_")
    }


def test_it_is_scikit_learns_fit_on_what_the_base_gives(
    pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setattr(fits, "PENALTIES", (0.01,))
    craft.train(config(pico(), data_dir, max_steps=1, **PROBE))
    texts = {
        split: [json.loads(line) for line in (data_dir / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }
    model, tokenizer = AutoModel.from_pretrained(pico()).eval(), AutoTokenizer.from_pretrained(pico())
    features = {}
    for split, rows in texts.items():
        batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            features[split] = model(**batch).pooler_output.double().numpy()
    mean = features["train"].mean(axis=0)
    scale = ((features["train"] - mean) ** 2).mean() ** 0.5
    gold = {split: [row["label"] for row in rows] for split, rows in texts.items()}
    plain = LogisticRegression(C=1 / (0.01 * 45), max_iter=1000).fit((features["train"] - mean) / scale, gold["train"])
    expected = plain.score((features["validation"] - mean) / scale, gold["validation"])
    assert lines()[0]["eval_accuracy"] == pytest.approx(expected)
    assert lines()[0]["step"] == 0


def test_a_run_is_never_below_its_start(pico: Make, data_dir: Path) -> None:
    """A rate that ruins everything leaves the head alone, and that merges."""
    heard = Remember()
    result = craft.train(config(pico(), data_dir, learning_rate=30.0, head_learning_rate=30.0, **PROBE), heard)
    assert (
        result.metrics
        == result.baselines["head_alone"]
        == {k: v for k, v in heard.evaluations[0].items() if k != "best"}
    )
    assert result.epoch == 0
    assert any("no update improved on the start" in line for line in result.remarks)
    assert not any(tensor.any() for name, tensor in tensors().items() if name.startswith("transform."))
    merged = craft.merge("out")
    assert merged.tensors_changed == 0
    found = craft.evaluate(merged.output, source=DataSource(task="sst2", data_dir=str(data_dir)))
    assert found.metrics["accuracy"] == result.metrics["accuracy"]


def test_random_is_as_before(pico: Make, data_dir: Path) -> None:
    result = craft.train(config(pico(), data_dir, max_steps=1))
    assert list(result.baselines) == ["same_answer"]
    assert lines()[0]["step"] == 0


@pytest.mark.slow
def test_the_same_start_resumed_and_on_two_processes(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, output_dir="uncut", save_steps=4, **PROBE))
    cut(config(pico(), data_dir, save_steps=4, **PROBE), Cut(9))
    craft.train(config(pico(), data_dir, resume=True, save_steps=4, **PROBE))
    same("out", "uncut")
    given = {"num_processes": 2, "per_device_train_batch_size": 4, "output_dir": "two"} | PROBE
    done = craft_command("train", *flags(pico(), data_dir, **given))
    assert done.returncode == 0, done.stderr
    for name, tensor in tensors("two").items():
        assert torch.allclose(tensor, tensors("uncut")[name], rtol=0, atol=1e-6), name


@pytest.mark.slow
def test_cut_before_the_first_update_it_starts_alike(pico: Make, data_dir: Path) -> None:
    batch = {"per_device_eval_batch_size": 8}
    craft.train(config(pico(), data_dir, output_dir="uncut", **batch, **PROBE))
    cut(config(pico(), data_dir, **batch, **PROBE), Cut(0, in_evaluation=True))
    assert read_checkpoint(Path("out/checkpoints/step-0")).step == 0
    craft.train(config(pico(), data_dir, resume=True, **batch, **PROBE))
    same("out", "uncut")


@pytest.mark.slow
def test_it_is_fitted_on_an_adapter_that_is_taken_over(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, output_dir="first", num_train_epochs=6))
    craft.train(config(pico(), data_dir, init_from="first", max_steps=1, **PROBE))
    craft.train(config(pico(), data_dir, output_dir="plain", max_steps=1, **PROBE))
    assert lines()[0]["eval_loss"] != lines("plain")[0]["eval_loss"]
    assert lines()[0]["eval_accuracy"] > 0.6


def test_a_share_of_the_rows_has_every_label() -> None:
    gold = [0] * 940 + [1] * 50 + [2] * 10
    rows = share_of_rows(gold, 100)
    counts = np.bincount([gold[row] for row in rows])
    assert counts.tolist() == [94, 5, 1]
    assert len(set(rows)) == 100
    assert share_of_rows(gold, MOST_ROWS) == list(range(1000))


@pytest.mark.slow
def test_of_very_many_labels_no_probe_is_fitted(pico: Make) -> None:
    """It would take hours and gigabytes; the training itself takes them."""
    rows = [
        {"text": " ".join(words), "label": f"{number} {copy}"}
        for copy in range(2)
        for number, words in enumerate(itertools.product(WORDS[:9], repeat=3))
    ]
    write_rows(Path("own/train.jsonl"), rows * 2)
    heard = Remember()
    craft.train(own_config(pico(), Path("own"), num_train_epochs=None, max_steps=1), heard)
    assert heard.plan is not None
    assert "more than 1,000 labels, so no probe is fitted (--head-start random)" in heard.plan.notes
    assert "head_alone" not in json.loads(Path("out/all_results.json").read_text())["baselines"]


def test_a_model_is_left_as_it_was(pico: Make, data_dir: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(pico("roberta"), num_labels=3)
    last = LastLayer(model, [name for name, _ in model.named_parameters() if name.startswith("classifier")])
    assert last.name == "classifier.out_proj"
    before = last.layer.weight.clone()
    with last.multiplied(1.7):
        assert torch.equal(last.layer.weight, before * 1.7)
    assert torch.equal(last.layer.weight, before)


# -- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", mostly_slow(["probe", "random"], "probe"))
def test_numbers_of_any_size_are_learned_alike(start: str, pico: Make) -> None:
    """Targets 4,096 times as large: the same adapter to the bit, and a head that answers in their units."""
    for name, times in (("small", 1.0), ("large", 4096.0)):
        for split, count, seed in (("train", 45, 1), ("validation", 23, 2)):
            numbers(Path(name) / f"{split}.jsonl", count, seed, times=times, plus=7 * times)
        craft.train(
            own_config(
                pico(), Path(name), output_dir=f"run-{name}", head_start=start, save_steps=4, problem_type="regression"
            )
        )
    small, large = tensors("run-small"), tensors("run-large")
    for key in small:
        assert torch.equal(large[key], small[key] * (4096 if key.startswith("head.classifier") else 1)), key
    first, second = (
        json.loads(Path(f"run-{name}/all_results.json").read_text())["metrics"] for name in ("small", "large")
    )
    assert second["loss"] == pytest.approx(4096**2 * first["loss"])
    assert second["pearson"] == pytest.approx(first["pearson"], abs=1e-6)
    assert craft.evaluate("run-large").metrics["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert craft.evaluate("run-large/checkpoints/step-12").metrics["loss"] < 4096**2
    merged = craft.merge("run-large")
    answers = invoke("predict", merged.output, "--input", "large/validation.jsonl").stdout.splitlines()
    assert 6 * 4096 < np.mean([json.loads(line)["prediction"] for line in answers]) < 9 * 4096
    updates = [line["loss"] for line in lines("run-large") if "loss" in line]
    assert updates[-1] / second["loss"] == pytest.approx(1, abs=5)  # in the same units


@pytest.mark.slow
def test_numbers_are_resumed_to_the_bit(pico: Make) -> None:
    for split, count, seed in (("train", 45, 1), ("validation", 23, 2)):
        numbers(Path("data") / f"{split}.jsonl", count, seed, times=900.0, plus=-3000.0)
    craft.train(own_config(pico(), Path("data"), output_dir="uncut", save_steps=4))
    cut(own_config(pico(), Path("data"), save_steps=4), Cut(9))
    craft.train(own_config(pico(), Path("data"), save_steps=4, resume=True))
    same("out", "uncut")


def test_own_numbers_choose_by_loss_and_a_known_task_by_its_metric(pico: Make, data_dir: Path) -> None:
    for split, count, seed in (("train", 45, 1), ("validation", 23, 2)):
        numbers(Path("data") / f"{split}.jsonl", count, seed)
    result = craft.train(own_config(pico(), Path("data"), num_train_epochs=6))
    assert result.metrics["loss"] == min(line["eval_loss"] for line in lines() if "eval_loss" in line)


@pytest.mark.slow
def test_of_equal_evaluations_the_lower_loss_is_better(pico: Make, data_dir: Path) -> None:
    result = craft.train(config(pico(), data_dir, num_train_epochs=12, ranks="24,24,3"))
    best = max(line["eval_accuracy"] for line in lines() if "eval_loss" in line)
    ties = [line for line in lines() if line.get("eval_accuracy") == best]
    assert len(ties) > 1
    assert result.metrics["loss"] == min(line["eval_loss"] for line in ties)


# -- several labels -----------------------------------------------------------------------------------------------------


def test_a_threshold_is_found_kept_and_used(pico: Make) -> None:
    for split, count, seed in (("train", 60, 1), ("validation", 30, 2)):
        rows = opinions(count, seed)
        table = [
            ["good"] * (r["label"] and n % 3 == 0) + ["short"] * (len(r["sentence"]) < 40) for n, r in enumerate(rows)
        ]
        write_rows(Path("data") / f"{split}.jsonl", [
            {"text": row["sentence"], "labels": cell} for row, cell in zip(rows, table, strict=True)
        ])  # fmt: skip
    result = craft.train(own_config(pico(), Path("data")))
    record = json.loads(Path("out/adapter/adapter_config.json").read_text())["training"]
    assert record["threshold"] != 0.5
    assert craft.evaluate("out").metrics["f1_micro"] == pytest.approx(result.metrics["f1_micro"])
    assert f"above a probability of {record['threshold']:g}" in Path("out/adapter/README.md").read_text()
    fixed = craft.train(own_config(pico(), Path("data"), output_dir="fixed", threshold=0.5))
    assert fixed.metrics["f1_micro"] <= result.metrics["f1_micro"]
    assert json.loads(Path("fixed/adapter/adapter_config.json").read_text())["training"]["threshold"] == 0.5


@pytest.mark.slow
def test_calibrated_scores_are_probabilities(pico: Make) -> None:
    """One temperature, in the head's weights: no answer changes, the loss falls, and everybody sees the same."""
    for split, count, seed in (("train", 60, 1), ("validation", 40, 2)):
        rows = opinions(count, seed)
        wrong = [{"text": r["sentence"], "label": "ab"[r["label"] ^ (n % 5 == 0)]} for n, r in enumerate(rows)]
        write_rows(Path("data") / f"{split}.jsonl", wrong)
    given = {"num_train_epochs": 8, "ranks": "24,24,3", "metric_for_best_model": "accuracy"}
    plain = craft.train(own_config(pico(), Path("data"), output_dir="plain", **given))
    result = craft.train(own_config(pico(), Path("data"), calibrate=True, **given))
    record = json.loads(Path("out/adapter/adapter_config.json").read_text())["training"]
    assert not 0.95 < record["temperature"] < 1.05
    assert result.metrics["accuracy"] >= plain.metrics["accuracy"]
    assert result.metrics["loss"] < plain.metrics["loss"]
    again = craft.evaluate("out")
    assert again.metrics["loss"] == pytest.approx(result.metrics["loss"], abs=1e-5)
    assert "Calibrated: the head is divided by the temperature" in Path("out/adapter/README.md").read_text()
    merged = craft.evaluate(craft.merge("out").output, source=DataSource(data_dir="data"))
    assert merged.metrics["loss"] == pytest.approx(result.metrics["loss"], abs=1e-5)
    cut(own_config(pico(), Path("data"), calibrate=True, output_dir="cut", save_steps=4, **given), Cut(17))
    craft.train(own_config(pico(), Path("data"), calibrate=True, output_dir="cut", save_steps=4, resume=True, **given))
    first, second = tensors("out"), tensors("cut")
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- how long -----------------------------------------------------------------------------------------------------------


def test_the_length_follows_the_rows() -> None:
    def settled(rows: int, **given: Any) -> tuple[Any, Any]:
        known = RunConfig.build({"task": "sst2"} | given)
        found = length_settled(known, rows, 32, by_rows=given.pop("by_rows", True))
        return found.num_train_epochs, found.early_stopping_patience

    few, _ = settled(100)
    some, patience = settled(32 * 100)
    many, _ = settled(32 * 100_000)
    assert few == MOST_EPOCHS
    assert some == ENOUGH_UPDATES / 100
    assert patience is not None
    assert many == 3
    assert settled(100, num_train_epochs=7) == (7, None)
    assert settled(100, early_stopping_patience=1)[1] == 1
    known = length_settled(RunConfig.build({"task": "sst2"}), 100, 32, by_rows=False)
    assert (known.num_train_epochs, known.early_stopping_patience) == (3, None)


def test_own_data_say_what_was_chosen(pico: Make) -> None:
    for split, count, seed in (("train", 45, 1), ("validation", 23, 2)):
        rows = [{"text": row["sentence"], "label": "ab"[row["label"]]} for row in opinions(count, seed)]
        write_rows(Path("data") / f"{split}.jsonl", rows)
    heard = Remember()
    given = {
        name: value for name, value in own_config(pico(), Path("data")).recipe().items() if name != "num_train_epochs"
    }
    result = craft.train(RunConfig.build(given | {"use_cpu": True, "output_dir": "out"}), heard)
    assert heard.plan is not None
    assert f"{MOST_EPOCHS} epochs, from the number of rows; stops early" in heard.plan.length
    assert result.updates <= heard.plan.updates == 6 * MOST_EPOCHS


def test_a_label_that_is_never_right_is_named_with_what_its_weight_would_be(pico: Make) -> None:
    rows = [{"text": row["sentence"], "label": "ab"[row["label"]]} for row in opinions(45, 1)]
    rare = [{"text": "the quite never", "label": "rare"}, {"text": "always book the", "label": "rare"}]
    write_rows(Path("data/train.jsonl"), [*rows, *rare])
    write_rows(Path("data/validation.jsonl"), [*rows[:9], {"text": "good good film", "label": "rare"}])
    result = craft.train(own_config(pico(), Path("data"), num_train_epochs=1))
    assert result.tables["by_label"]["rare"]["f1"] == 0
    told = next(line for line in result.remarks if "F1 0" in line)
    assert "rare" in told
    assert "--class-weights balanced" in told
    assert f"{47 / (3 * 2):.2g} times" in told


def test_the_loss_told_is_the_mean_since_the_last_line(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, output_dir="each"))
    craft.train(config(pico(), data_dir, output_dir="some", logging_steps=5))
    each = {line["step"]: line["loss"] for line in lines("each") if "loss" in line}
    some = {line["step"]: line["loss"] for line in lines("some") if "loss" in line}
    assert list(some) == [1, 5, 10]
    assert some[5] == pytest.approx(np.mean([each[step] for step in (2, 3, 4, 5)]))
    assert some[10] == pytest.approx(np.mean([each[step] for step in range(6, 11)]))
