"""Training: what it computes, what it leaves behind, that it repeats (DESIGN properties 5, 7, 8)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import classifier, opinions, write_rows
from helpers import Remember, config, craft_command, lines, tensors
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoTokenizer, Trainer, TrainingArguments

import craft_cli as craft
from craft_cli.api.predict import predict_file
from craft_cli.config import RunConfig
from craft_cli.data.batches import collate, plan_epoch
from craft_cli.data.sources import DataSource
from craft_cli.data.tokens import Encoded, encode
from craft_cli.errors import ConfigError, CraftError, DataError, FileError, figure
from craft_cli.tasks.splits import load_splits
from craft_cli.training.progress import Plan, TrainResult
from craft_cli.training.run import Run

Make = Callable[..., Path]


def test_a_run_leaves_what_it_promises_and_learns(pico: Make, data_dir: Path) -> None:
    heard = Remember()
    result = craft.train(config(pico(), data_dir, num_train_epochs=12, ranks="24,24,3"), heard)
    assert sorted(os.listdir("out")) == [
        ".craft.json",
        ".lock",
        "adapter",
        "all_results.json",
        "checkpoints",
        "metrics.jsonl",
        "recipe.yaml",
        "training_curve.png",
    ]
    assert sorted(os.listdir("out/adapter")) == [
        ".craft.json",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert Path("out/training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert Path("runs/latest").resolve() == Path("out").resolve()
    assert heard.plan is not None
    assert (heard.plan.adapter_parameters, heard.plan.head_parameters) == (2 * (24**2 + 24**2 + 3**2), 50)
    assert (heard.plan.train_examples, heard.plan.eval_examples, heard.plan.updates) == (45, 23, 72)
    assert result.metrics["accuracy"] == max(e["accuracy"] for e in heard.evaluations) > 0.8
    assert result.baselines["same_answer"]["accuracy"] == pytest.approx(12 / 23)
    assert Run(Path("out")).results()["parameters"] == {"adapter": 2322, "head": 50}
    losses = [line["loss"] for line in lines() if "loss" in line]
    assert len(losses) == 72
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    card = Path("out/adapter/README.md").read_text()
    assert "2,322 in the transforms" in card
    assert f"| accuracy | {figure(result.metrics['accuracy'])} |" in card


def test_the_recipe_it_wrote_repeats_the_run_bit_for_bit(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir))
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    craft.train(RunConfig.build({"output_dir": "again"}, recipe))
    first, second = tensors(), tensors("again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert lines() == lines("again")
    craft.train(RunConfig.build({"output_dir": "other", "seed": 7}, recipe))
    assert not torch.equal(tensors("other")["head.classifier.weight"], first["head.classifier.weight"])


def test_the_first_updates_are_those_of_a_plain_torch_loop(pico: Make, data_dir: Path) -> None:
    """An independent loop over the same rows: dense torch, no Accelerate, no accumulation."""
    settings = {"num_train_epochs": 1, "warmup_ratio": 0.0, "weight_decay": 0.1, "max_grad_norm": 0.5}
    craft.train(config(pico(), data_dir, **settings))

    tokenizer = AutoTokenizer.from_pretrained(pico())
    split = load_splits(DataSource(task="sst2", data_dir=str(data_dir)), ["train"]).splits["train"]
    encoded = encode(split, tokenizer, 128)
    from accelerate.utils import set_seed
    from transformers import AutoModelForSequenceClassification

    set_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(pico(), num_labels=2)
    adapter = craft.attach(model, craft.decompose(str(pico()), ranks=(6, 5, 2)))
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=3e-2
    )
    logged = [line["loss"] for line in lines() if "loss" in line]
    updates = plan_epoch(encoded.lengths, 8, seed=42, epoch=0)
    for number, rows in enumerate(updates):
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * (len(updates) - number) / len(updates)
        inputs, labels, *_ = collate(encoded, rows, tokenizer)
        assert labels is not None
        loss = functional.cross_entropy(model(**inputs).logits, labels)
        assert logged[number] == pytest.approx(float(loss.detach()), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*matrices, *vectors], 0.5)
        optimizer.step()
    saved = tensors()
    for name, k in adapter.change.trained().items():
        assert torch.allclose(saved[name], k, atol=2e-5)


@pytest.mark.slow
def test_two_processes_and_accumulation_compute_what_one_batch_does(pico: Make, data_dir: Path) -> None:
    """45 rows in updates of 8: the last update holds 5, which two processes cannot share evenly."""
    one = config(pico(), data_dir)
    craft.train(one)
    craft.train(
        config(pico(), data_dir, per_device_train_batch_size=2, gradient_accumulation_steps=4, output_dir="accumulated")
    )
    flags = ["--output-dir", "two", "--per-device-train-batch-size", "2", "--gradient_accumulation_steps", "2"]
    done = craft_command("train", "--recipe", "out/recipe.yaml", "--num-processes", "2", *flags, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 23
    assert "Warning" not in done.stderr
    for other in ("accumulated", "two"):
        for name, tensor in tensors().items():
            assert torch.allclose(tensors(other)[name], tensor, atol=1e-6), (other, name)
        for ours, theirs in zip(lines(), lines(other), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
    record = json.loads(Path("two/adapter/adapter_config.json").read_text())
    assert record["training"]["recipe"]["num_processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29543"],
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "bf16"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_it_joins_what_another_launcher_started(launcher: list[str], pico: Make, data_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "craft_cli", "train", "--model", str(pico()), "--ranks", "6,5,2",
         "--task", "sst2", "--data-dir", str(data_dir), "--use-cpu", "--max-steps", "3", "--output-dir", "out", "--json"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 23
    assert ("2 x CPU" if "torch" in launcher[0] else "1 x CPU, bf16") in done.stderr


def test_a_run_of_one_update_changes_the_transforms(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, max_steps=1, save_steps=1))
    saved = load_file("out/checkpoints/step-1/adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in saved.items() if name.startswith("transform."))


def test_learning_rate_zero_trains_the_head_alone(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, learning_rate=0.0))
    saved = tensors()
    assert all(not tensor.any() for name, tensor in saved.items() if name.startswith("transform."))
    merged = craft.merge("out")  # the head alone
    assert (merged.tensors_changed, merged.difference) == (0, 0.0)
    heads = load_file("out/merged/model.safetensors")
    assert torch.equal(heads["classifier.weight"], saved["head.classifier.weight"])


def run_with(pico: Make, data: Path, **settings: Any) -> tuple[TrainResult, Plan]:
    heard = Remember()
    result = craft.train(config(pico(), data, **settings), heard)
    assert heard.plan is not None
    return result, heard.plan


@pytest.mark.slow
def test_every_setting_has_an_effect(pico: Make, data_dir: Path) -> None:
    """Each setting changes what the run computes or reports; those of data and processes have tests of their own."""
    craft.train(config(pico(), data_dir, num_train_epochs=1))
    reference = tensors()
    for number, (name, value) in enumerate(
        {
            "head_learning_rate": 1e-2, "learning_rate": 1e-2, "weight_decay": 0.5, "warmup_ratio": 0.9, "max_grad_norm": 1e-3,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 1, "init_noise": True, "bf16": True,
            "max_train_samples": 29, "max_seq_length": 4, "class_weights": "balanced",
        }.items()
    ):  # fmt: skip
        craft.train(config(pico(), data_dir, num_train_epochs=1, output_dir=f"run{number}", **{name: value}))
        changed = tensors(f"run{number}")
        same = [torch.equal(reference[key], changed[key]) for key in reference if key.startswith("transform.")]
        assert not all(same), name
    result, plan = run_with(
        pico, data_dir, output_dir="more", max_steps=3, max_eval_samples=10, per_device_eval_batch_size=3, logging_steps=2,
        targets="key,output", ranks="24,99,2", cache_dir="factors",
    )  # fmt: skip
    assert (result.updates, result.examples, plan.eval_examples) == (3, 10, 10)
    assert [line["step"] for line in lines("more") if "loss" in line] == [1, 2]
    assert plan.targets == ("key", "output")
    assert plan.sizes == "ranks 24,24,2 (OUT,IN,LAYERS), reduced from 24,99,2"
    assert plan.adapter_parameters == 2 * (24**2 + 24**2 + 2**2)
    assert [path.suffix for path in Path("factors").glob("*.safetensors")] == [".safetensors"]
    craft.train(config(pico(), data_dir, overwrite=True, max_steps=1))
    assert lines()[-1]["step"] == 1
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        craft.train(config(pico(), data_dir, fp16=True))


def test_what_is_noticed_in_the_data_is_told(pico: Make) -> None:
    long = "the " * 30
    rows = [
        ("good film", 1),
        ("bad film", 0),
        ("good film", 0),
        (long, 1),
        ("", 0),
        ("fine", 1),
        ("dull", 0),
        ("poor", 0),
    ]
    write_rows(Path("train.jsonl"), [{"text": text, "label": label} for text, label in rows])
    write_rows(Path("validation.jsonl"), [{"text": "good film", "label": 1}, {"text": "lovely", "label": 1}])
    own = {"task": None, "data_dir": None, "train_file": "train.jsonl", "validation_file": "validation.jsonl"}
    cut = "1 of 8 rows of train.jsonl are longer than 12 tokens and were truncated (--max-seq-length)"
    _, plan = run_with(pico, Path(), **own, dry_run=True, max_seq_length=12)
    noticed = [
        "labels with no validation row: 1 of 2 ('0')",
        "1 row without text; the first is train.jsonl, line 5",
        "1 of 8 rows of train.jsonl repeats an earlier text, 1 with another label (the first is line 3)",
        "1 of 2 validation rows has a text that is also in the training rows: the metrics will look too good",
        cut,
    ]
    assert list(plan.notes) == noticed
    assert plan.tokens.startswith("median 3.5, longest 12; padding ")
    _, plan = run_with(pico, Path(), **own, max_seq_length=12, max_steps=1)
    assert list(plan.notes) == noticed
    write_rows(Path("sst2/train.jsonl"), [{"sentence": "good film", "label": row % 2} for row in range(8)])
    write_rows(Path("sst2/validation.jsonl"), [{"sentence": "good film", "label": 1}])
    _, plan = run_with(pico, Path("sst2"), max_steps=1, output_dir="known")
    assert not plan.notes  # GLUE is what it is
    _, plan = run_with(pico, Path("sst2"), dry_run=True)
    assert len(plan.notes) == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train_file": "real.jsonl", "class_weights": "balanced"}, "a regression has no labels"),
        (
            {"train_file": "real.jsonl", "validation_file": "real.jsonl", "validation_share": 0.5},
            "validation.share cannot be combined with validation data",
        ),
        ({"task": "sst2", "problem_type": "regression"}, "--problem-type is for your own data"),
        ({"task": "sst2", "label_separator": ";"}, "--label-separator is only for multi-label data"),
        (
            {"train_file": "real.jsonl", "label_separator": ";", "problem_type": "regression"},
            "--label-separator is only for",
        ),
        ({"train_file": "a", "dataset_name": "b"}, "cannot be combined"),
        ({"task": "sst2", "dataset_config_name": "b"}, "--dataset-config-name requires --dataset-name"),
    ],
)
def test_settings_that_contradict_the_data_are_refused(pico: Make, settings: dict[str, Any], told: str) -> None:
    write_rows(Path("real.jsonl"), [{"text": f"good {row}", "label": row / 4} for row in range(12)])
    with pytest.raises(ConfigError, match=told):
        craft.train(config(pico(), Path(), **({"task": None, "data_dir": None} | settings)))


@pytest.mark.slow
def test_rare_labels_weigh_more_when_balanced(pico: Make) -> None:
    """With one rare label and no signal, a head of bias alone ends at even odds, not at the frequencies."""
    write_rows(Path("t.jsonl"), [{"text": "the film", "label": int(row % 8 == 0)} for row in range(4000)])
    own = {"task": None, "data_dir": None, "train_file": "t.jsonl", "validation_file": "t.jsonl", "learning_rate": 0.0,
           "head_learning_rate": 0.03, "num_train_epochs": 1, "per_device_train_batch_size": 40}  # fmt: skip
    even = {}
    for weights in (None, "balanced"):
        craft.train(config(pico(), Path(), **own, class_weights=weights, output_dir=f"run-{weights}"))
        Path("in.txt").write_text("the film\n")
        predict_file(f"run-{weights}", input="in.txt", output="out.jsonl", use_cpu=True)
        even[weights] = json.loads(Path("out.jsonl").read_text())["scores"]["1"]
    assert even[None] < 0.3
    assert 0.4 < even["balanced"] < 0.6


def test_dry_run_writes_nothing_and_finds_what_is_wrong(pico: Make, data_dir: Path) -> None:
    result = craft.train(config(pico(), data_dir, dry_run=True))
    assert result.output is None
    assert not Path("out").exists()
    assert not Path("runs").exists()
    with pytest.raises(DataError, match="no such folder"):
        craft.train(config(pico(), data_dir / "nowhere", dry_run=True))
    with pytest.raises(CraftError, match=r"the loss is (nan|inf) at update"):
        craft.train(config(pico(), data_dir, learning_rate=1e30, output_dir="out2"))


def test_a_folder_that_is_not_empty_is_refused_before_training(pico: Make, data_dir: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("do not touch")
    with pytest.raises(FileError, match="out is not empty"):
        craft.train(config(pico(), data_dir))
    with pytest.raises(FileError, match="craft did not write thesis"):
        craft.train(config(pico(), data_dir, overwrite=True))
    assert os.listdir("out") == ["thesis.tex"]


def test_pairs_and_own_files(pico: Make) -> None:
    write_rows(Path("mrpc/train.jsonl"), opinions(16, 1, pair=True))
    write_rows(Path("mrpc/validation.jsonl"), opinions(9, 2, pair=True))
    result = craft.train(config(pico(), Path("mrpc"), task="mrpc", num_train_epochs=1))
    assert set(result.metrics) == {"accuracy", "f1", "loss"}
    Path("own.csv").write_text(
        "opinion,stars\n" + "".join(f"the film was {w},{s}\n" for w, s in [("good", "up"), ("bad", "down")] * 6)
    )
    own = {
        "task": None, "data_dir": None, "train_file": "own.csv", "validation_file": "own.csv", "text_columns": "opinion",
        "label_column": "stars", "output_dir": "own", "num_train_epochs": 1,
    }  # fmt: skip
    result = craft.train(config(pico(), Path(), **own))
    record = json.loads(Path("own/adapter/adapter_config.json").read_text())
    assert record["model"]["id2label"] == {"0": "down", "1": "up"}
    assert craft.evaluate("own").metrics["accuracy"] == result.metrics["accuracy"]


def test_under_the_hugging_face_trainer(pico: Make, data_dir: Path, tmp_path: Path) -> None:
    model = classifier(pico())
    adapter = craft.attach(model, craft.decompose(str(pico()), ranks=(24, 24, 3)))
    tokenizer = AutoTokenizer.from_pretrained(pico())
    split = load_splits(DataSource(task="sst2", data_dir=str(data_dir)), ["train"]).splits["train"]
    encoded: Encoded = encode(split, tokenizer, 128)
    rows = [feature | {"labels": label} for feature, label in zip(encoded.features, encoded.labels or [], strict=True)]
    frozen = model.bert.encoder.layer[0].attention.self.query.weight.clone()
    arguments = TrainingArguments(
        str(tmp_path / "hf"), per_device_train_batch_size=8, num_train_epochs=8, learning_rate=3e-2, report_to="none",
        use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    AcceleratorState._reset_state()  # the Trainer leaves its own behind
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert torch.equal(model.bert.encoder.layer[0].attention.self.query.weight, frozen)
    adapter.save("trained")
    again = classifier(pico())
    craft.load(again, "trained")
    batch = collate(encoded, [0, 1, 2], tokenizer)[0]
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.slow
def test_labels_of_a_checkpoint_are_aligned_by_name(pico: Make, data_dir: Path) -> None:
    """A head that names the same labels in the other order keeps its order; the metrics do not notice."""
    names = {0: "POSITIVE", 1: "NEGATIVE"}
    model = classifier(pico(), id2label=names, label2id={name: number for number, name in names.items()})
    model.save_pretrained("finetuned")
    AutoTokenizer.from_pretrained(pico()).save_pretrained("finetuned")
    before = craft.evaluate("finetuned", source=DataSource(task="sst2", data_dir=str(data_dir)))
    result = craft.train(config(Path("finetuned"), data_dir, num_train_epochs=12, ranks="24,24,3", head_start="auto"))
    assert result.metrics["accuracy"] > 0.8
    record = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert record["model"]["id2label"] == {"0": "positive", "1": "negative"}
    assert craft.evaluate("out").metrics["accuracy"] == result.metrics["accuracy"]
    assert before.examples == 23
