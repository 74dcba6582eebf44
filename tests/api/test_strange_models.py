"""Checkpoints and adapters as they are found elsewhere: odd names of labels, none at all, numbers that are not finite."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import classifier, failure, invoke, opinions, save_tokenizer, shake, write_rows
from helpers import config, flags, mostly_slow
from safetensors.torch import load_file, save_file

import craft_cli as craft
from craft_cli.data.sources import DataSource
from craft_cli.errors import CraftError

Make = Callable[..., Path]


def change(file: str, **values: Any) -> None:
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | values))


def elsewhere(base: Path, labels: int, **settings: Any) -> None:
    classifier(base, labels).save_pretrained("model")
    save_tokenizer(Path("model"))
    change("model/config.json", **settings)


NAMES: list[Any] = [
    {"0": 0, "1": 1}, {"0": None, "1": "x"}, {"0": "a", "2": "b"}, {"0": "x", "1": "x"}, {}, {"0": ["q"], "1": {}}
]  # fmt: skip


@pytest.mark.parametrize("names", mostly_slow(NAMES, NAMES[1]))
def test_names_of_a_base_that_name_nothing_are_not_needed(names: Any, pico: Make, data_dir: Path) -> None:
    shutil.copytree(pico(), "base")
    change("base/config.json", id2label=names)
    result = craft.train(config(Path("base"), data_dir, max_steps=1))
    assert result.updates == 1
    craft.merge("out")
    assert craft.evaluate("out/merged", source=DataSource(task="sst2", data_dir=str(data_dir))).examples == 23


@pytest.mark.parametrize("names", [["a", "b"], {"a": "b"}, "x", 3])
def test_names_that_transformers_cannot_read_are_refused_in_one_line(names: Any, pico: Make, data_dir: Path) -> None:
    shutil.copytree(pico(), "base")
    change("base/config.json", id2label=names)
    assert "config.json" in failure("train", *flags(Path("base"), data_dir))


def test_a_head_without_names_takes_the_numbers_of_its_labels(pico: Make) -> None:
    elsewhere(pico(), 2)
    rows = opinions(20, 1)
    write_rows(Path("numbers.jsonl"), [{"text": row["sentence"], "label": row["label"]} for row in rows])
    write_rows(Path("names.jsonl"), [{"text": row["sentence"], "label": f"LABEL_{row['label']}"} for row in rows])
    found = [
        craft.evaluate("model", source=DataSource(validation_file=f"{name}.jsonl")) for name in ("numbers", "names")
    ]
    assert found[0].metrics == found[1].metrics


def test_eval_can_be_told_that_several_labels_apply(pico: Make) -> None:
    elsewhere(pico(), 3)
    rows = [{"text": row["sentence"], "labels": ["LABEL_0"] if row["label"] else ["LABEL_1", "LABEL_2"]}
            for row in opinions(20, 1)]  # fmt: skip
    write_rows(Path("several.jsonl"), rows)
    assert "--problem-type multi_label_classification" in failure("eval", "model", "--validation-file", "several.jsonl")
    told = invoke(
        "eval", "model", "--validation-file", "several.jsonl", "--problem-type", "multi_label_classification", "--json"
    )
    assert set(json.loads(told.stdout)["metrics"]) == {"f1_micro", "f1_macro", "loss"}
    assert "trained for" in failure(
        "eval", "model", "--validation-file", "several.jsonl", "--problem-type", "regression"
    )


def exploding(base: Path) -> None:
    """An adapter in the folder `bad` whose change is beyond float32."""
    adapter = craft.attach(classifier(base), craft.decompose(str(base), ranks="6,5,2"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(3e37)
    adapter.save("bad")


def test_answers_that_are_not_finite_are_refused(pico: Make, data_dir: Path) -> None:
    exploding(pico())
    Path("in.txt").write_text("good film\nbad film\n")
    for command in (
        ["predict", "bad", "--input", "in.txt"],
        ["eval", "bad", "--task", "sst2", "--data-dir", str(data_dir), "--json"],
    ):
        said = failure(*command)
        assert "non-finite" in said
        assert ("in.txt, line 1" if command[0] == "predict" else "validation.jsonl, line 1") in said
    for format in ("checkpoint", "peft"):
        assert "not finite" in failure("merge", "bad", "--format", format)


def test_words_that_are_not_finite_are_refused(pico: Make) -> None:
    from transformers import AutoModelForTokenClassification

    save_tokenizer(Path("model"))
    names = dict(enumerate(("O", "B-x", "I-x")))
    AutoModelForTokenClassification.from_pretrained(pico(), id2label=names).save_pretrained("model")
    weights = load_file("model/model.safetensors")
    weights["classifier.bias"][1] = torch.nan
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    write_rows(Path("words.jsonl"), [{"tokens": ["good", "film"], "tags": ["B-x", "O"]}])
    assert "non-finite" in failure("eval", "model", "--validation-file", "words.jsonl")
    Path("in.txt").write_text("good film\n")
    assert "in.txt, line 1" in failure("predict", "model", "--input", "in.txt")


def test_a_merge_in_memory_that_overflows_changes_nothing(pico: Make) -> None:
    model = classifier(pico())
    adapter = craft.attach(model, craft.decompose(str(pico()), ranks="6,5,2"))
    shake(adapter)
    with torch.no_grad():
        next(adapter.parameters()).fill_(3e38)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        adapter.merge()
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_merge_whose_weights_do_not_fit_their_dtype_says_which_would(pico: Make) -> None:
    base = pico()
    adapter = craft.attach(classifier(base), craft.decompose(str(base), ranks="6,5,2"))
    shake(adapter)
    with torch.no_grad():
        for tensor in adapter.head_state().values():
            tensor.fill_(1e6)
    adapter.save("large")
    assert "--dtype bfloat16" in failure("merge", "large", "--dtype", "float16")


def test_a_gradient_that_is_not_finite_stops_before_a_checkpoint_keeps_it(pico: Make, data_dir: Path) -> None:
    """The loss of that update is finite: only the next one would show it."""
    from craft_cli.training import loop

    whole = loop.batch_loss
    calls = []

    def poisoned(training: Any, rows: Any) -> Any:
        loss = whole(training, rows)
        calls.append(len(rows))
        if len(calls) == 3:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "batch_loss", poisoned)
        with pytest.raises(CraftError, match=r"the gradient is nan at update 3.*lower .*learning.rate"):
            craft.train(config(pico(), data_dir, save_steps=1, max_steps=6, max_grad_norm=0))
    for file in Path("out").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file
