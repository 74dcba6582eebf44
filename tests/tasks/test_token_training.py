"""Models of words with tags: trained, resumed, on several processes; their answers."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import failure, invoke, write_rows
from helpers import Cut, conll, craft_command, cut, lines, mostly_slow, same, sentences, tensors, write
from picos import names

import craft_cli as craft
from craft_cli.config import RunConfig
from craft_cli.data.readers import read_rows
from craft_cli.data.sources import DataSource

Make = Callable[..., Path]
LABELS = ("O", "B-minus", "I-minus", "B-plus", "I-plus")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.conll and validation.conll."""
    folder = tmp_path_factory.mktemp("words")
    for split, count, seed in (("train", 45, 1), ("validation", 23, 2)):
        (folder / f"{split}.conll").write_text(conll(sentences(count, seed)))
    return folder


def settings(base: Path, data: Path, **changed: Any) -> RunConfig:
    given = {
        "model": str(base), "data_dir": str(data), "ranks": "6,5,2", "use_cpu": True, "output_dir": "out",
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 1, "head_learning_rate": 3e-2,
        "learning_rate": 3e-2, "head_start": "random",
    }  # fmt: skip
    return RunConfig.build(given | changed)


@pytest.fixture(scope="module")
def trained(pico: Make, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        craft.train(settings(pico(), words, num_train_epochs=9, head_start="probe"))
    return folder / "out"


def test_training_finds_the_entities_and_eval_repeats_it(trained: Path) -> None:
    results = json.loads((trained / "all_results.json").read_text())
    assert results["metrics"]["f1"] > 0.9
    assert results["baselines"]["same_answer"]["f1"] == 0.0
    assert results["metrics"]["f1"] >= results["baselines"]["head_alone"]["f1"] > 0
    found = craft.evaluate(trained)
    assert dict(found.metrics) == pytest.approx(results["metrics"], abs=1e-6)
    assert list(found.metrics) == ["f1", "precision", "recall", "accuracy", "loss"]
    record = json.loads((trained / "adapter/adapter_config.json").read_text())
    assert record["model"]["architecture"] == "BertForTokenClassification"
    assert record["training"]["task_type"] == "token-classification"
    assert list(record["model"]["id2label"].values()) == list(LABELS)
    shown = invoke("eval", str(trained), "--report", "--predictions", "p.jsonl", "--use-cpu")
    assert shown.exit_code == 0, shown.stderr
    assert "support" in shown.stdout
    assert "gold (down)" not in shown.stdout
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert len(rows) == 23
    told = json.loads(invoke("eval", str(trained), "--json", "--use-cpu").stdout)
    assert set(told["by_label"]) == {"minus", "plus"}
    assert told["metrics"]["f1"] == pytest.approx(found.metrics["f1"])


def predicted(trained: Path, *arguments: str, stdin: str | None = None) -> list[dict[str, Any]]:
    from typer.testing import CliRunner

    from craft_cli.cli import app

    result = CliRunner().invoke(app, ["predict", str(trained), *arguments, "--use-cpu"], input=stdin)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_spans_are_places_in_the_very_line(trained: Path) -> None:
    line = "the  film was\tgreat good awful \u00a0 "
    first, empty = predicted(trained, stdin=f"{line}\n\n")
    assert (first["text"], empty) == (line, {"row": 2, "prediction": [], "text": ""})
    assert [(e["label"], e["text"]) for e in first["prediction"]] == [("plus", "great good"), ("minus", "awful")]
    for entity in first["prediction"]:
        assert set(entity) == {"label", "text", "start", "end", "score"}
        assert line[entity["start"] : entity["end"]] == entity["text"]
        assert 0.2 < entity["score"] <= 1


def test_every_form_of_input_gives_the_same_spans(trained: Path) -> None:
    words = ["the", "great", "good", "awful"]
    expected = predicted(trained, stdin=" ".join(words) + "\n")
    write("in.txt", " ".join(words) + "\n")
    write("in.conll", "\n".join(words) + "\n")
    write("tagged.conll", "".join(f"{word} O\n" for word in words))
    write_rows(Path("in.jsonl"), [{"tokens": words}])
    write_rows(Path("text.jsonl"), [{"text": " ".join(words)}])
    for name in ("in.txt", "in.conll", "tagged.conll", "in.jsonl", "text.jsonl"):
        assert predicted(trained, "--input", name) == expected, name
    assert invoke("predict", str(trained), "-i", "in.txt", "-o", "out.csv", "--use-cpu").exit_code == 0
    (row,) = csv.DictReader(Path("out.csv").read_text().splitlines())
    assert json.loads(row["prediction"]) == expected[0]["prediction"]
    write_rows(Path("none.jsonl"), [{"id": 1}])
    assert "none.jsonl has no column 'tokens'; it has id" in failure("predict", str(trained), "-i", "none.jsonl")
    write_rows(Path("odd.jsonl"), [{"tokens": ["a"]}, {"tokens": "a"}])
    assert (
        "odd.jsonl, line 2: column 'tokens' has no list of words"
        in invoke("predict", str(trained), "-i", "odd.jsonl", "--use-cpu").stderr
    )


def test_a_line_of_text_is_never_a_list(trained: Path) -> None:
    shown = predicted(trained, stdin='["great"]\n[1]\ngreat [good]\n')
    assert [row["text"] for row in shown] == ['["great"]', "[1]", "great [good]"]
    write_rows(Path("text.jsonl"), [{"text": "[1]"}, {"text": "great"}])
    assert [row["text"] for row in predicted(trained, "--input", "text.jsonl")] == ["[1]", "great"]
    write("lists.csv", "tokens\n\"['great', 'film']\"\n")
    assert [row["text"] for row in predicted(trained, "--input", "lists.csv")] == ["great film"]


@pytest.mark.parametrize("cell", ["\ud800 good", None, ["a"]])
def test_a_cell_without_text_is_refused_by_its_line(trained: Path, cell: Any) -> None:
    Path("in.jsonl").write_text(json.dumps({"text": "good"}) + "\n" + json.dumps({"text": cell}) + "\n")
    assert "in.jsonl, line 2: column 'text' " in invoke("predict", str(trained), "-i", "in.jsonl").stderr


def test_words_that_are_not_looked_at_are_reported(trained: Path, words: Path) -> None:
    file = str(words / "validation.conll")
    done = invoke("eval", str(trained), "--validation-file", file, "--max-seq-length", "12", "--use-cpu", "--json")
    count = sum(max(len(row.cells["tokens"]) - 10, 0) for row in read_rows(Path(file)))
    total = sum(len(row.cells["tokens"]) for row in read_rows(Path(file)))
    told = (
        f"7 of 23 rows of {file} are longer than 12 tokens and were truncated (--max-seq-length); {count} of {total:,} words have "
        "no token and count as O"
    )
    assert told in done.stderr
    assert json.loads(done.stdout)["notes"] == [told]
    done = invoke("predict", str(trained), "--input", file, "--max-seq-length", "12", "--use-cpu")
    assert done.stderr == f"note: {told}\n"
    write("in.conll", "great\n\u00a0\ngood\n")
    done = invoke("predict", str(trained), "-i", "in.conll", "--use-cpu")
    assert done.stderr == "note: 1 of 3 words of in.conll has no token and counts as O\n"


def test_a_merged_model_answers_as_a_pipeline_of_transformers(trained: Path) -> None:
    from transformers import pipeline

    craft.merge(trained, "merged")
    texts = ["the great good film was awful", "book", "awful awful the good"]
    ask = pipeline("token-classification", "merged", aggregation_strategy="simple", device="cpu")
    for mine, theirs in zip(craft.predict(trained, texts, use_cpu=True), ask(texts), strict=True):
        found = [(e["entity_group"], e["start"], e["end"], e["word"]) for e in theirs]
        assert [(e["label"], e["start"], e["end"], e["text"]) for e in mine["prediction"]] == found
        assert [e["score"] for e in mine["prediction"]] == pytest.approx([float(e["score"]) for e in theirs], abs=1e-5)


def test_predictions_recount_to_the_metrics(trained: Path) -> None:
    metrics = craft.evaluate(trained, predictions="p.jsonl", max_seq_length=9, use_cpu=True).metrics
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    gold, found = (
        {(number, it["label"], it["start"], it["end"]) for number, row in enumerate(rows) for it in row[side]}
        for side in ("label", "prediction")
    )
    precision, recall = len(gold & found) / len(found), len(gold & found) / len(gold)
    assert 0 < recall < 1  # words beyond the length are missed
    expected = [precision, recall, 2 * precision * recall / (precision + recall)]
    assert [metrics[name] for name in ("precision", "recall", "f1")] == pytest.approx(expected)


def test_a_merged_model_answers_the_same(trained: Path, words: Path) -> None:
    from craft_cli.api.predictor import load_adapted

    model, adapter, checkpoint = load_adapted(trained / "adapter")
    adapter.merge()
    model.save_pretrained("merged")
    for file in checkpoint.folder.glob("tokenizer*"):
        (Path("merged") / file.name).write_bytes(file.read_bytes())
    expected = craft.evaluate(trained).metrics
    found = craft.evaluate("merged", source=DataSource(validation_file=str(words / "validation.conll"))).metrics
    assert dict(found) == pytest.approx(dict(expected), abs=1e-5)
    assert predicted(Path("merged"), stdin="great good\n")[0]["prediction"][0]["label"] == "plus"


def alike(run: str, other: str) -> None:
    for line, expected in zip(lines(run), lines(other), strict=True):
        assert line == pytest.approx(expected, abs=1e-5)
    for name, tensor in tensors(other).items():
        assert torch.allclose(tensors(run)[name], tensor, atol=1e-6), (run, name)


def test_accumulation_computes_what_one_batch_does(pico: Make, words: Path) -> None:
    """45 rows of 1 to 24 words in updates of 8: the mean over batches is far from the mean over words."""
    craft.train(settings(pico(), words))
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    craft.train(settings(pico(), words, output_dir="accumulated", **accumulated))
    alike("accumulated", "out")


@pytest.mark.slow
def test_two_processes_compute_what_one_does(pico: Make, words: Path) -> None:
    craft.train(settings(pico(), words))
    flags = ["--output-dir", "two", "--per-device-train-batch-size", "2", "--gradient_accumulation_steps", "2"]
    done = craft_command("train", "--recipe", "out/recipe.yaml", "--num-processes", "2", *flags, "--use-cpu")
    assert done.returncode == 0, done.stderr
    alike("two", "out")


def test_a_sentence_without_a_target_is_left_out(pico: Make) -> None:
    taught = conll([(["bad", "good"], ["O", "B-plus"])] * 3)
    write("validation.conll", content := taught + conll([([" "], ["O"])]).replace(" \tO", "\u00a0\tO"))
    for name, rows in (("all", content), ("taught", taught)):
        write("train.conll", rows)
        result = craft.train(
            settings(pico(), Path(), num_train_epochs=1, per_device_train_batch_size=1, output_dir=name)
        )
        assert math.isfinite(result.metrics["loss"])
    assert all(torch.equal(tensor, tensors("taught")[name]) for name, tensor in tensors("all").items())


@pytest.mark.slow
def test_a_run_that_was_cut_ends_as_if_it_had_not_been(pico: Make, words: Path) -> None:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    craft.train(settings(pico(**dropout), words, output_dir="whole"))
    cut(settings(pico(**dropout), words), Cut(9))
    craft.train(settings(pico(**dropout), words, resume=True))
    same("out", "whole")


def test_a_run_is_tried_and_described(pico: Make, words: Path, trained: Path) -> None:
    base = ["--model", str(pico()), "--data-dir", str(words), "--ranks", "6,5,2", "--use-cpu"]
    tried = invoke("train", *base, "--dry-run", "--class-weights", "balanced", "--max-seq-length", "8")
    assert tried.exit_code == 0, tried.stderr
    assert "own (minus, plus)" in tried.stderr
    assert "are longer than 8 tokens and were truncated" in tried.stderr
    assert "B-minus" in invoke("inspect", str(trained)).stdout
    refused = failure("eval", str(trained), "--task", "sst2", "--data-dir", str(words), "--use-cpu")
    assert "error" in refused


def test_the_first_loss_is_the_mean_over_the_words_of_its_update(pico: Make, words: Path) -> None:
    from accelerate.utils import set_seed
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from craft_cli.data.batches import plan_epoch
    from craft_cli.data.readers import read_rows

    craft.train(settings(pico(), words, max_steps=1, head_start="random"))
    rows = [row.cells for row in read_rows(words / "train.conll")]
    tokenizer = AutoTokenizer.from_pretrained(pico())  # a word is a token here
    ids = [tokenizer(" ".join(row["tokens"]), return_tensors="pt")["input_ids"] for row in rows]
    set_seed(42)
    model = AutoModelForTokenClassification.from_pretrained(pico(), num_labels=len(LABELS))
    total, count = 0.0, 0
    for row in plan_epoch([one.shape[1] for one in ids], 8, seed=42, epoch=0)[0]:
        gold = torch.tensor([LABELS.index(tag) for tag in rows[row]["tags"]])
        logits = model(input_ids=ids[row]).logits[0, 1:-1]
        total += float(torch.nn.functional.cross_entropy(logits, gold, reduction="sum").detach())
        count += len(gold)
    first = next(line["loss"] for line in lines() if "loss" in line)
    assert first == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("family", mostly_slow(names("AutoModelForTokenClassification"), "bert"))
def test_every_family_has_a_model_for_words(family: str, pico: Make, words: Path) -> None:
    result = craft.train(settings(pico(family), words, num_train_epochs=1, ranks="4,4,2"))
    assert dict(craft.evaluate("out").metrics) == pytest.approx(dict(result.metrics), abs=1e-5)
