"""A checkpoint whose head was trained: kept where it answers what is asked, fitted anew or drawn where that is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, build_pico, failure, opinions, write_rows
from helpers import Cut, Remember, config, cut, flags, lines, numbers, own_config, same, tensors
from safetensors.torch import load_file, save_file

import craft_cli as craft
from craft_cli.config import RunConfig
from craft_cli.data.sources import DataSource
from craft_cli.errors import CraftError, ModelError
from craft_cli.training.schedule import Timetable

Make = Callable[..., Path]
AUTO = {"head_start": "auto"}


@pytest.fixture
def merged(pico: Make, data_dir: Path) -> Path:
    """A checkpoint whose head was trained for sst2's labels."""
    craft.train(config(pico(), data_dir, output_dir="first", num_train_epochs=6))
    return Path(craft.merge("first").output)


def started(settings: RunConfig) -> tuple[Any, dict[str, float]]:
    """The result of a training, and the metrics that it began with."""
    result = craft.train(settings)
    first = next(line for line in lines(settings.output_dir or "out") if "eval_loss" in line)
    return result, {name.removeprefix("eval_"): value for name, value in first.items() if name.startswith("eval_")}


@pytest.mark.parametrize("family", ["bert", *(pytest.param(it, marks=pytest.mark.slow) for it in ("roberta", "gpt2"))])
def test_a_head_with_these_labels_is_where_training_starts(family: str, pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(family), data_dir, output_dir="first", num_train_epochs=6))
    merged = Path(craft.merge("first").output)
    alone = craft.evaluate(merged, source=DataSource(task="sst2", data_dir=str(data_dir))).metrics
    heard = Remember()
    result = craft.train(
        config(merged, data_dir, learning_rate=0.0, head_learning_rate=0.0, max_steps=1, max_train_samples=4, **AUTO),
        heard,
    )
    assert dict(result.baselines["checkpoint"]) == pytest.approx(alone, abs=1e-6)
    assert "head_alone" not in result.baselines
    assert heard.plan is not None
    assert heard.plan.head_start == ", the checkpoint's own"
    assert any("the base checkpoint's head is kept" in note for note in heard.plan.notes)
    assert heard.evaluations[-1]["loss"] == heard.evaluations[0]["loss"]  # nor is it softened
    assert craft.inspect("out").facts["checkpoint"] == result.baselines["checkpoint"]
    assert "| checkpoint |" in Path("out/adapter/README.md").read_text()


@pytest.mark.slow
def test_it_is_resumed_to_the_bit(merged: Path, data_dir: Path) -> None:
    given = {"save_steps": 4, "per_device_eval_batch_size": 8} | AUTO
    craft.train(config(merged, data_dir, output_dir="uncut", **given))
    for name, listener in (("out", Cut(9)), ("early", Cut(0, in_evaluation=True))):
        cut(config(merged, data_dir, output_dir=name, **given), listener)
        craft.train(config(merged, data_dir, output_dir=name, resume=True, **given))
        same(name, "uncut")


@pytest.mark.slow
def test_other_labels_or_no_names_get_a_probe(merged: Path, data_dir: Path) -> None:
    rows = [{"text": row["sentence"], "label": ("positive", "negative")[row["label"]]} for row in opinions(45, 1)]
    for folder, names in (("same", ("positive", "negative")), ("other", ("up", "down"))):
        named = [row | {"label": names[row["label"] == "negative"]} for row in rows]
        for split in ("train", "validation"):
            write_rows(Path(folder) / f"{split}.jsonl", named)
    assert "checkpoint" in craft.train(own_config(merged, Path("same"), output_dir="a", max_steps=1)).baselines
    assert "head_alone" in craft.train(own_config(merged, Path("other"), output_dir="b", max_steps=1)).baselines
    told = json.loads((merged / "config.json").read_text())
    told["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}  # whose they are nobody knows
    (merged / "config.json").write_text(json.dumps(told))
    assert "head_alone" in craft.train(own_config(merged, Path("other"), output_dir="c", max_steps=1)).baselines


@pytest.mark.slow
def test_a_probe_or_a_random_start_can_be_asked_for(merged: Path, data_dir: Path) -> None:
    kept, start = started(config(merged, data_dir, max_steps=1, output_dir="kept", **AUTO))
    fitted, probe = started(config(merged, data_dir, max_steps=1, output_dir="fitted", head_start="probe"))
    drawn, random = started(config(merged, data_dir, max_steps=1, output_dir="drawn", head_start="random"))
    assert [list(result.baselines)[1:] for result in (kept, fitted, drawn)] == [["checkpoint"], ["head_alone"], []]
    assert len({values["loss"] for values in (start, probe, random)}) == 3
    assert random["loss"] > start["loss"]
    assert started(config(merged, data_dir, max_steps=1, output_dir="again", head_start="random"))[1] == random


def test_numbers_go_on_in_their_units(pico: Make) -> None:
    for split, count, seed in (("train", 45, 1), ("validation", 23, 2)):
        numbers(Path("data") / f"{split}.jsonl", count, seed, times=900.0, plus=-3000.0)
    given = {"problem_type": "regression"}
    craft.train(own_config(pico(), Path("data"), output_dir="first", **given))
    merged = Path(craft.merge("first").output)
    alone = craft.evaluate(merged, source=DataSource(data_dir="data")).metrics
    result, start = started(own_config(merged, Path("data"), max_steps=1, **given))
    assert start == pytest.approx(alone, rel=1e-5)
    assert dict(result.baselines["checkpoint"]) == start


@pytest.mark.slow
def test_the_start_is_called_what_it_is(merged: Path, pico: Make, data_dir: Path) -> None:
    """With an adapter that changes something nothing is the head or the checkpoint alone, and a remark tells the same."""
    ruin = {"learning_rate": 30.0, "head_learning_rate": 30.0, "num_train_epochs": 1}
    first = craft.train(config(merged, data_dir, output_dir="a", init_noise=True, **ruin, **AUTO))
    assert list(first.baselines) == ["same_answer", "start"]
    assert any("has only its initial noise (--init-noise)" in line for line in first.remarks)
    again = craft.train(config(pico(), data_dir, output_dir="b", init_from="first", **ruin, **AUTO))
    assert list(again.baselines) == ["same_answer", "start"]
    assert any("the adapter is that of first, and the head is the initial one" in line for line in again.remarks)
    plain = craft.train(config(pico(), data_dir, output_dir="c", **ruin, **AUTO))
    assert any("the adapter changes nothing, and the head is the initial one" in line for line in plain.remarks)
    onto = craft.train(config(merged, data_dir, output_dir="d", **ruin, **AUTO))
    craft.train(config(merged, data_dir, output_dir="e", init_from="d", max_steps=1, **AUTO))
    taken = json.loads(Path("e/all_results.json").read_text())["baselines"]
    assert "checkpoint" in onto.baselines
    assert "start" in taken


# -- numbers that are not finite -----------------------------------------------------------------------------------------


@pytest.fixture
def broken(pico: Make, tmp_path: Path) -> Path:
    """A base that computes nan for texts with a certain word."""
    base = build_pico("bert", tmp_path / "broken")
    state = load_file(base / "model.safetensors")
    name = next(name for name in state if name.endswith("word_embeddings.weight"))
    state[name][4 + WORDS.index("awful")] = float("nan")
    save_file(state, base / "model.safetensors", {"format": "pt"})
    return base


def test_a_base_that_gives_no_finite_numbers_is_named_with_the_rows(broken: Path, data_dir: Path) -> None:
    rows = [json.loads(line)["sentence"] for line in (data_dir / "train.jsonl").read_text().splitlines()]
    count = sum("awful" in text.split() for text in rows)
    assert 0 < count < len(rows)
    said = failure("train", *flags(broken, data_dir, head_start="auto"))
    assert f"computes non-finite values for {count} of 45 training rows, so the head cannot be fitted" in said
    assert "remove --fp16" in said


def test_before_the_first_update_no_lower_rate_is_advised(broken: Path, data_dir: Path) -> None:
    with pytest.raises(CraftError) as stopped:
        craft.train(config(broken, data_dir))
    assert "validation rows are not finite before the first update" in str(stopped.value)
    with pytest.raises(CraftError) as later:
        craft.train(config(broken, data_dir, output_dir="blind", eval_strategy="no", per_device_train_batch_size=45))
    assert "the loss is nan at update 1" in str(later.value)
    for error in (stopped.value, later.value):
        assert "rate" not in str(error)
        assert "check its weights" in str(error)


def test_a_word_beyond_the_length_is_no_broken_base(pico: Make) -> None:
    Path("words.conll").write_text("\n\n".join("\n".join(["a O", "film B-x"] + ["was O"] * 9) for _ in range(9)) + "\n")
    given = {"train_file": "words.conll", "validation_file": "words.conll", "data_dir": None, "max_seq_length": 5}
    craft.train(own_config(pico(), Path(), max_steps=1, **given))
    assert all(tensor.isfinite().all() for tensor in tensors().values())


@pytest.mark.parametrize("length", [1, 2])
def test_no_room_for_any_word_is_refused(length: int, pico: Make) -> None:
    Path("words.conll").write_text("a O\nfilm B-x\n\nthe O\n")
    given = ("--train-file", "words.conll", "--validation-file", "words.conll", "--max-seq-length", str(length))
    said = failure("train", "--model", str(pico()), "--use-cpu", "--ranks", "6,5,2", *given)
    assert (
        f"--max-seq-length {length} leaves no room for text: this tokenizer adds 2 special tokens to every row; increase it"
        in said
    )


@pytest.mark.parametrize(("value", "told"), [(float("nan"), "has nan"), (float("inf"), "has an infinite value")])
def test_what_is_no_number_is_not_written(value: float, told: str, pico: Make) -> None:
    from conftest import classifier

    from craft_cli.errors import FileError

    adapter = craft.attach(classifier(pico()), craft.decompose(str(pico()), ranks="6,5,2", cache_dir="factors"))
    with torch.no_grad():
        next(iter(adapter.head_state().values())).fill_(value)
    with pytest.raises(FileError, match=told):
        adapter.save("adapter")


# -- how long ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_steps": 8}, "8: --max-steps, less than 20 epochs"),
        (
            {"max_steps": 80},
            "80 at most: --max-steps, less than 20 epochs; stops early after 10 evaluations without improvement",
        ),
        (
            {"early_stopping_patience": 1},
            "120 at most: 20 epochs, from the number of rows; stops early after an evaluation without improvement",
        ),
        ({"num_train_epochs": 2, "early_stopping_patience": 2}, "12"),
        ({"num_train_epochs": 2}, "12"),
        ({"eval_strategy": "no"}, "120: 20 epochs, from the number of rows"),
    ],
)
def test_the_plan_tells_how_long_it_will_be(given: dict[str, Any], told: str, pico: Make) -> None:
    for split, count, seed in (("train", 45, 1), ("validation", 23, 2)):
        rows = [{"text": row["sentence"], "label": "ab"[row["label"]]} for row in opinions(count, seed)]
        write_rows(Path("data") / f"{split}.jsonl", rows)

    class Enough(Remember):
        def started(self, plan: Any) -> None:
            super().started(plan)
            raise ModelError("that was all")

    heard = Enough()
    with pytest.raises(ModelError, match="that was all"):
        craft.train(own_config(pico(), Path("data"), **({"num_train_epochs": "auto"} | given)), heard)
    assert heard.plan is not None
    assert heard.plan.length == told


def test_evaluations_before_the_last_update_are_counted() -> None:
    def evaluations(**given: Any) -> int:
        settings = RunConfig.build({"task": "sst2", "num_train_epochs": 3} | given)
        return Timetable(settings, [5] * 60, 10).evaluations

    assert evaluations() == 2
    assert evaluations(eval_steps=4) == 4
    assert evaluations(eval_strategy="no") == 0
