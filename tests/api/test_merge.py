"""Merging, evaluating and inspecting what a run left (DESIGN properties 4, 5)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_pico, classifier, invoke, opinions, shake, token_batch, write_rows
from helpers import own_config
from picos import FUSED, families
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import craft_cli as craft
from craft_cli.api.predictor import load_adapted
from craft_cli.data.sources import DataSource
from craft_cli.errors import ConfigError, FileError, ModelError
from craft_cli.methods.base import delta
from craft_cli.models.shards import Entry, write_streamed
from craft_cli.tasks.splits import load_splits
from craft_cli.tucker import hosvd
from craft_cli.tucker.chance import random_energy

Make = Callable[..., Path]
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def saved_adapter(base: Path, folder: str = "adapter") -> Path:
    """An adapter with random transforms and head, and label names."""
    model = classifier(base, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    model.config.pad_token_id = 0
    adapter = craft.attach(model, craft.decompose(str(base), ("query", "value"), (6, 5, 2)))
    shake(adapter)
    adapter.save(folder)
    return Path(folder)


@pytest.mark.parametrize("family", families("AutoModelForSequenceClassification"))
def test_merged_is_a_plain_checkpoint_that_computes_the_same(family: str, pico: Make) -> None:
    base = pico(family)
    result = craft.merge(saved_adapter(base), "merged")
    assert (
        set(os.listdir("merged"))
        == {"config.json", "model.safetensors", "merge.json", "README.md", ".craft.json"} | TOKENIZER
    )
    for name in TOKENIZER:
        assert Path("merged", name).read_bytes() == (base / name).read_bytes()
    plain, report = AutoModelForSequenceClassification.from_pretrained("merged", output_loading_info=True)
    assert not any(report.values())
    assert plain.config.id2label == {0: "no", 1: "yes"}
    adapted, _, _ = load_adapted(Path("adapter"))
    with torch.no_grad():
        expected = adapted.eval()(**token_batch()).logits
        difference = (plain.eval()(**token_batch()).logits - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()
    assert result.difference <= result.tolerance == 1e-5
    assert result.tensors_changed == (3 if family in FUSED else 6)


def test_a_copy_takes_a_card_that_is_no_utf8(pico: Make) -> None:
    (saved_adapter(pico()) / "README.md").write_bytes(b"Gr\xfc\xdfe")
    craft.merge("adapter", "copy", format="adapter")
    assert Path("copy/README.md").read_text(encoding="utf-8") == "Gr\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}e"


def test_merging_keeps_the_dtype_of_the_base(tmp_path: Path) -> None:
    base = build_pico("bert", tmp_path / "half", dtype=torch.bfloat16)
    craft.merge(saved_adapter(base), "merged")
    merged, original = load_file("merged/model.safetensors"), load_file(base / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    _, adapter, _ = load_adapted(Path("adapter"))
    name = "encoder.layer.1.attention.self.value.weight"
    change = delta(adapter.change.chains("value")[1]).detach()
    assert torch.equal(merged[f"bert.{name}"], (original[name].float() + change).bfloat16())  # rounded once


def test_merge_never_touches_what_is_there(pico: Make) -> None:
    saved_adapter(pico())
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    with pytest.raises(FileError, match="out is not empty"):
        craft.merge("adapter", "out")
    assert os.listdir("out") == ["notes.txt"]
    with pytest.raises(FileError, match="neither a run nor an adapter"):
        craft.merge(pico(), "out2")
    assert craft.merge("adapter", "merged").files == craft.merge("adapter", "merged", overwrite=True).files
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith(".")) == []


def test_merging_onto_another_base_is_refused(pico: Make, tmp_path: Path) -> None:
    base = build_pico("bert", tmp_path / "base")
    saved_adapter(base)
    shutil.copy(
        build_pico("bert", tmp_path / "x", initializer_range=0.1) / "model.safetensors", base / "model.safetensors"
    )
    with pytest.raises(ModelError, match="the weights of this model"):
        craft.merge("adapter", "merged")
    assert not Path("merged").exists()


def test_eval_counts_every_row_once_and_agrees_with_plain_transformers(pico: Make, data_dir: Path) -> None:
    saved_adapter(pico())
    craft.merge("adapter", "merged")
    source = DataSource(data_dir=str(data_dir), text_columns=("sentence",))
    with pytest.raises(ConfigError, match="no data to evaluate on"):
        craft.evaluate("merged")
    split = load_splits(DataSource(task="sst2", data_dir=str(data_dir)), ["validation"]).splits["validation"]
    model = AutoModelForSequenceClassification.from_pretrained("merged").eval()
    tokenizer = AutoTokenizer.from_pretrained("merged")
    predictions = []
    with torch.no_grad():
        for (text,) in split.texts:  # one at a time: no padding, no order
            predictions.append(int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()))
    model.config.id2label, model.config.label2id = {0: "0", 1: "1"}, {"0": 0, "1": 1}
    model.save_pretrained("merged")
    result = craft.evaluate("merged", source=source, per_device_eval_batch_size=4)
    assert result.examples == 23
    assert result.metrics["accuracy"] == pytest.approx(accuracy_score(split.labels, predictions))
    with pytest.raises(ConfigError, match="no trained head"):
        craft.evaluate(pico(), source=source)


def test_inspect_tells_norms_energy_and_counts(pico: Make) -> None:
    saved_adapter(pico())
    found = craft.inspect("adapter", plot="spectra.png")
    assert Path("spectra.png").read_bytes().startswith(b"\x89PNG")
    assert found.kind == "adapter"
    assert found.facts["parameters"] == {"adapter": 130, "head": 50}
    _, adapter, _ = load_adapted(Path("adapter"))
    for row, name in zip(found.projections, adapter.change.shapes, strict=True):
        assert (row["name"], row["shape"], row["ranks"]) == (name, [3, 24, 24], [6, 5, 2])
        norms = [float(delta(chain).detach().norm()) for chain in adapter.change.chains(name)]
        assert np.allclose(row["change_by_layer"], norms, rtol=1e-4)
        for mode in ("layer", "out", "in"):
            k = adapter.change.trained()[f"transform.{name}.{mode}"]
            assert row["k_norms"][mode] == pytest.approx(float(k.detach().norm()), rel=1e-5)
    model = craft.inspect(pico("llama"), ranks="8,8,2")
    assert [row["shape"] for row in model.projections] == [
        [3, 40, 24], [3, 20, 24], [3, 20, 24], [3, 24, 40], [3, 32, 24], [3, 32, 24], [3, 24, 32],
    ]  # fmt: skip
    assert model.facts["parameters"] == {"adapter": 2 * (64 + 64 + 4)}
    factors = craft.decompose(str(pico()), ranks=(6, 5, 2))
    assert factors.path is not None
    row = craft.inspect(factors.path).projections[0]
    assert row["energy"] == pytest.approx(factors.decompositions["query"].energy)


def test_the_random_tensor_is_one(pico: Make) -> None:
    stack = torch.randn(4, 60, 40, generator=torch.Generator().manual_seed(11))
    assert random_energy((4, 60, 40), (3, 20, 10)) == pytest.approx(hosvd(stack, (3, 20, 10)).energy, rel=0.1)
    wide = torch.randn(2, 1536, 96, generator=torch.Generator().manual_seed(12))  # scaled down inside
    assert random_energy((2, 1536, 96), (2, 128, 16)) == pytest.approx(hosvd(wide, (2, 128, 16)).energy, rel=0.1)


def test_a_streamed_file_is_what_safetensors_reads_and_every_tensor_is_aligned() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "b.odd": torch.randint(0, 2, (3,), generator=generator, dtype=torch.bool),
        "a.half": torch.randn(5, 1, generator=generator).bfloat16(),
        "c.wide": torch.randn(2, 3, generator=generator, dtype=torch.float64),
        "d.count": torch.tensor(7),
        "e.none": torch.zeros(0, 4),
        "f.turned": torch.randn(4, 3, generator=generator).T,
    }
    entries = {name: Entry(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}  # type: ignore[misc]
    write_streamed(Path("x.safetensors"), entries)
    read = load_file("x.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    data = Path("x.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert (8 + size) % 8 == 0
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors[name].dtype.itemsize == 0


# -- several labels ------------------------------------------------------------------------------------------------------


def several_labels(folder: Path) -> Path:
    """Rows where the best threshold is far from the usual one."""
    for split, count, seed in (("train", 60, 1), ("validation", 30, 2)):
        rows = [
            {"text": row["sentence"], "labels": ["good"] * (row["label"] and n % 3 == 0) + ["short"] * (len(row["sentence"]) < 40)}
            for n, row in enumerate(opinions(count, seed))
        ]  # fmt: skip
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def test_a_threshold_goes_with_the_merged_model(pico: Make) -> None:
    data = several_labels(Path("data"))
    craft.train(own_config(pico(), data, threshold=0.23))
    result = craft.merge("out")
    assert result.threshold == 0.23
    assert json.loads(Path(result.output, "config.json").read_text())["craft"]["threshold"] == 0.23
    run = craft.evaluate("out", predictions="run.jsonl")
    merged = craft.evaluate(result.output, source=DataSource(data_dir="data"), predictions="merged.jsonl")
    assert merged.metrics == pytest.approx(dict(run.metrics), abs=1e-5)
    answers = [
        [json.loads(line)["prediction"] for line in Path(f"{name}.jsonl").read_text().splitlines()]
        for name in ("run", "merged")
    ]
    assert answers[0] == answers[1]
    usual = [n for n, row in enumerate(map(json.loads, Path("run.jsonl").read_text().splitlines()))
             if row["prediction"] != [name for name, score in row["scores"].items() if score > 0.5]]  # fmt: skip
    assert usual  # the threshold matters
    said = invoke("predict", result.output, "--input", "data/validation.jsonl").stdout.splitlines()
    assert [json.loads(line)["prediction"] for line in said] == answers[0]
    said = invoke("merge", "out", "--output-dir", "again").stdout
    assert "labels are predicted above 0.23 (used by craft eval and predict; other tools assume 0.5)" in said
    said = invoke("merge", "out", "--format", "peft", "--output-dir", "lora").stdout
    assert "labels are predicted above 0.23 (other tools assume 0.5)" in said


def test_a_threshold_of_the_base_does_not_outlive_its_model(pico: Make) -> None:
    data = several_labels(Path("data"))
    craft.train(own_config(pico(), data, threshold=0.23, output_dir="first", num_train_epochs=1))
    craft.train(own_config(Path(craft.merge("first").output), data, threshold=0.5, num_train_epochs=1))
    result = craft.merge("out")
    assert result.threshold is None
    assert "threshold" not in json.loads(Path(result.output, "config.json").read_text())["craft"]
    assert "threshold" not in invoke("merge", "out", "--output-dir", "again").stdout


def test_a_merged_model_keeps_its_length_and_its_columns(pico: Make) -> None:
    """It answers as the run does: at the same length, pairs as pairs, several labels as such; its card tells a pipeline."""
    rows = [{"premise": f"{row['sentence']} " * 3, "hypothesis": "the film was", "verdict": ["no", "yes"][row["label"]]}
            for row in opinions(24, 1)]  # fmt: skip
    for split in ("train", "validation"):
        write_rows(Path(f"data/{split}.jsonl"), rows)
    craft.train(own_config(pico(), Path("data"), label_column="verdict", max_seq_length=16, num_train_epochs=1))
    merged = craft.merge("out").output
    run = craft.evaluate("out")
    assert craft.evaluate(merged, source=DataSource(data_dir="data")).metrics == pytest.approx(
        dict(run.metrics), abs=1e-5
    )
    assert craft.evaluate(merged, source=DataSource(data_dir="data"), max_seq_length=40).metrics[
        "loss"
    ] != pytest.approx(run.metrics["loss"], abs=1e-5)
    for line in (["the film was good"], ["the film\tbad room"]):
        Path("lines.txt").write_text("\n".join(line) + "\n")
        said = [invoke("predict", path, "--input", "lines.txt") for path in ("out", merged)]
        assert [result.exit_code for result in said] == ([1, 1] if "\t" not in line[0] else [0, 0])
        assert said[0].stdout == said[1].stdout
    config = json.loads(Path(merged, "config.json").read_text())
    assert config["craft"] == {
        "max_seq_length": 16, "text_columns": ["premise", "hypothesis"], "label_column": "verdict"
    }  # fmt: skip
    card = Path(merged, "README.md").read_text()
    assert "truncation=True, max_length=16" in card
    call = next(line for line in card.splitlines() if "PATH" in line and "pipeline(" in line).strip()
    from transformers import pipeline

    pair = {"text": rows[0]["premise"], "text_pair": rows[0]["hypothesis"]}
    call = call.replace('"PATH"', repr(merged)).replace('{"text": "one text", "text_pair": "another"}', "pair")
    (answer,) = [eval(call, {"pipeline": pipeline, "pair": pair})]
    invoke("predict", merged, "--input", "data/train.jsonl", "--output", "answers.jsonl")
    first = json.loads(Path("answers.jsonl").read_text().splitlines()[0])
    assert first["prediction"] == answer["label"]
    assert first["scores"][answer["label"]] == pytest.approx(answer["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", "0.3; rm"), ("threshold", 2.0), ("threshold", True), ("max_seq_length", "long"), ("columns", ["a"]),
     ("text_columns", [3]), ("label_column", None)],
)  # fmt: skip
def test_what_a_merged_model_cannot_have_kept_is_refused(name: str, value: object, run: Path) -> None:
    config = Path(craft.merge("run").output, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"craft": {name: value}}))
    with pytest.raises(ModelError, match=r"not a number between 0 and 1|is invalid; correct") as refused:
        craft.evaluate(config.parent, source=DataSource(task="sst2", data_dir="data"))
    assert "\n" not in str(refused.value)
