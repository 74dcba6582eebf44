"""Every benchmark runs in its small setting and measures the same thing in all of its arms. Nothing is asserted of times."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.main import get_command

from craft_cli.cli import app
from craft_cli.config import RunConfig
from craft_cli.data import batches
from craft_cli.training.preparation import prepare
from craft_cli.training.schedule import Timetable
from craft_cli.tucker import gram_matrix, hosvd

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def small(script: str, *arguments: str) -> Any:
    """What a benchmark finds in its small setting."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, "--small", "--json", "found.json", *arguments],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|---|") >= 1
    found = json.loads(Path("found.json").read_text())
    assert found["machine"]["cores"] >= 1
    return found["results"]


SLOW_BF16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU multiplies bfloat16 a hundred times slower than float32",
)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [(), pytest.param(("--bf16",), marks=SLOW_BF16)])
def test_a_step_needs_the_memory_of_the_floor_and_fewer_operations_than_lora(precision: tuple[str, ...]) -> None:
    found = small("training_step.py", *precision)
    floor, craft, lora, full = found["steps"]
    width, modules = 512, 24
    assert floor["trained"] == 2 * width
    assert craft["trained"] == 2 * (64**2 + 64**2 + 8**2)
    assert lora["trained"] == modules * 2 * 8 * width
    assert craft["peak_bytes"] <= 1.05 * floor["peak_bytes"]
    assert craft["peak_bytes"] < lora["peak_bytes"] < full["peak_bytes"]
    assert craft["operations_per_adapted"] <= lora["operations_per_adapted"]
    base, merged, adapted, _ = found["inference"]
    assert merged["operations"] == base["operations"] < adapted["operations"]


def test_a_decomposition_holds_one_gram_matrix_and_what_its_eigenvectors_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    most_alive = importlib.import_module("measure").most_alive
    width, layers = 256, [torch.randn(256, 256) for _ in range(6)]
    matrix = width * width * 8
    hosvd(layers, (6, 8, 8))
    gram = most_alive(lambda: gram_matrix(layers, 2))
    assert 2 * matrix <= gram <= 2.1 * matrix  # itself and one layer
    assert most_alive(lambda: hosvd(layers, (6, 8, 8))) <= 3.2 * matrix  # LAPACK wants two more for the eigenvectors


@pytest.mark.slow
def test_decompositions_of_all_peers_keep_the_same_energy() -> None:
    found = small("decompose.py", "--plot", "growth.svg")
    energies = [row["energy"] for row in found["peers"] if row["energy"]]
    assert len(energies) == 3
    assert energies == pytest.approx([energies[0]] * 3, rel=1e-10)
    assert all(0 < energy < 1 for energy in found["memory"]["energy"])
    assert {row["varied"] for row in found["growth"]} == {"layers", "width", "rank"}
    assert Path("growth.svg").stat().st_size > 5000


@pytest.mark.slow
def test_end_to_end_trains_every_arm_on_the_same_rows_from_the_same_start() -> None:
    rows = small("end_to_end.py")
    assert [row["arm"] for row in rows] == ["craft", "LoRA, Trainer", "LoRA, Trainer, by length"]
    craft = rows[0]
    assert (craft["rows"], craft["updates"], craft["numbers"]) == (48, 3, 16_456 + 770)
    for row in rows:
        assert (row["rows"], row["updates"], row["tokens"]) == (craft["rows"], craft["updates"], craft["tokens"])
        assert row["untrained"] == pytest.approx(craft["untrained"], rel=1e-6)
        assert row["padded_tokens"] >= row["tokens"]
        assert len(row["accuracy"]) == 1
        assert 0 <= row["accuracy"][0] <= 1
        assert 0 < row["training"] < row["total"]
    assert [row["numbers"] for row in rows[1:]] == [6 * 2 * 2 * 384 * 8 + 770] * 2  # layers, targets, A and B


@pytest.mark.slow
def test_startup_of_every_command() -> None:
    found = small("startup.py")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {f"craft {name} --help" for name in commands} < set(found["commands"])
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in found["commands"].values())
    assert found["commands"]["empty Typer app --help"]["ratio"] == 1
    assert found["inspect_imports"] == ["torch"]


@pytest.mark.slow
def test_both_orders_of_the_data_train_on_the_same_rows() -> None:
    found = small("data.py")
    loader = found["loader"]
    assert (loader["rows"], loader["batches"]) == (40, 5)
    assert loader["tokens"] > 40
    assert {"loader", "demo", "RoBERTa-base"} < set(loader)
    assert found["tokenising"]["rows"] == 2000
    similar, random = found["batches"]["similar lengths"], found["batches"]["random"]
    for arm in (similar, random):
        assert arm["rows"] == [40]
        assert len(arm["seconds"]) == len(arm["accuracy"]) == 1
        assert 0 <= arm["accuracy"][0] <= 1
    assert similar["padding"][0] < random["padding"][0]


def test_data_loads_the_batches_of_the_training_and_its_other_arm_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = runpy.run_path(str(BENCHMARKS / "data.py"))
    config = RunConfig.build({"model": "demo", "task": "opinions", "max_train_samples": 90, "num_train_epochs": 1})
    prepared = prepare(config, lambda what, done, total: None)
    timetable = Timetable(config, prepared.train.lengths, prepared.train_batch)
    loaded = benchmark["load"](prepared, config)
    for (inputs, gold), rows in zip(loaded, timetable.updates(0), strict=True):
        ids = [prepared.train.features[row]["input_ids"] for row in rows]
        assert [row[: len(one)].tolist() for row, one in zip(inputs["input_ids"], ids, strict=True)] == ids
        assert gold.tolist() == [(prepared.train.labels or [])[row] for row in rows]
    assert benchmark["count"](loaded) == sum(prepared.train.lengths)

    monkeypatch.setattr(batches, "BUCKET", benchmark["ARMS"]["random"])
    order = torch.randperm(90, generator=torch.Generator().manual_seed(7 * 1_000_003)).tolist()
    plan = batches.plan_epoch(prepared.train.lengths, 32, seed=7, epoch=0)
    assert {frozenset(rows) for rows in plan} == {frozenset(order[start : start + 32]) for start in (0, 32, 64)}


@pytest.mark.slow
def test_own_data_gives_every_method_the_same_rows_and_one_measure() -> None:
    rows = small("own_data.py")
    assert [row["method"] for row in rows] == ["constant", "tfidf", "embeddings", "lora-8", "craft"]
    for row in rows:
        assert (row["data"], row["rows"], row["test_rows"], row["seed"]) == ("tickets", 60, 40, 0)
        assert set(row["metrics"]) == {"accuracy", "macro_f1"}
        assert all(0 <= value <= 1 for value in row["metrics"].values())
        assert row["seconds"] > 0
    constant, _, embeddings, lora, craft = rows
    assert constant["metrics"]["accuracy"] < 0.5
    assert embeddings["metrics"]["accuracy"] > constant["metrics"]["accuracy"] + 0.2
    assert lora["numbers"] == 6 * 2 * 2 * 384 * 8 + 6 * 385  # layers, targets, A and B; the head
    assert lora["rate"] == float(max(lora["tried"], key=lora["tried"].get))
    assert craft["numbers"] == 16_456 + 6 * 385
    assert {"accuracy", "loss"} < set(craft["validation"])


def test_own_data_is_cut_alike_whoever_asks_and_what_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    study, made = importlib.import_module("own_data"), importlib.import_module("tickets")
    assert made.tickets(1200, seed=0) == made.tickets(1200, seed=0)
    train, test = study.rows_of("tickets", "all", 0, None)
    assert (len(train), len(test)) == (1200, 800)
    assert [label for _, label in train].count("privacy") == pytest.approx(36, abs=12)  # a few labels are wrong
    assert not {texts for texts, _ in train} & {texts for texts, _ in test}

    for part, size in (("train", 40), ("validation", 8)):
        lines = [
            {"sentence1": f"{row}", "sentence2": "a", "label": int(row % 4 > 0)} for row in range(size)
        ]  # the first 8 rows are in both
        Path("mrpc").mkdir(exist_ok=True)
        Path("mrpc", f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train, test = study.rows_of("mrpc", "16", 0, Path())
    assert len(train) == 16
    assert [gold for _, gold in train].count("equivalent") == 12
    assert not {texts for texts, _ in train} & {texts for texts, _ in test}
    assert train == study.rows_of("mrpc", "16", 0, Path())[0] != study.rows_of("mrpc", "16", 1, Path())[0]

    cells = list(study.cells(["tfidf", "setfit", "embeddings-pair"], list(study.DATA), ["200", "5000"], [0, 1]))
    assert [cell["data"] for cell in cells if cell["method"] == "setfit"] == ["sst2", "cola", "mrpc"]
    assert {cell["data"] for cell in cells if cell["method"] == "embeddings-pair"} == {"mrpc", "stsb"}
    done = [cell | {"metrics": {"accuracy": 0.5 + cell["seed"]}, "rows": 200, "test_rows": 9, "seconds": 1, "numbers": 7}
            for cell in cells[:2]]  # fmt: skip
    study.tables(done, cells[2:3])
    shown = capsys.readouterr().out
    assert "| tfidf | 100.0 ± 70.7 (2) | 100.0 | 100.0 | 1 | 7 |" in shown
    assert "- tfidf: cola 200 seed 0" in shown


@pytest.fixture
def sums(pico_lm: Callable[..., Path]) -> tuple[str, ...]:
    """Arguments of the benchmark of language models: a pico model, and data in GSM8K's columns."""
    for part in ("train", "test"):
        rows = [
            {"question": f"{one} and {one % 7}?", "answer": f"{one}+{one % 7}\n#### {one + one % 7}"}
            for one in range(40)
        ]
        Path(f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "--model", str(pico_lm()), "--data-dir", "."


@pytest.mark.slow
def test_sft_trains_scores_and_keeps_what_is_done(sums: tuple[str, ...]) -> None:
    arguments = (*sums, "--work", "work", "--targets", "query,value", "--sizes", "41k")
    found = small("sft.py", *arguments)
    assert [row["rate"] for row in found["trained"]] == [0.003, 0.01]
    assert {row["untrained"]["loss"] for row in found["trained"]} == {found["trained"][0]["untrained"]["loss"]}
    base, best = found["tested"]
    assert (base["size"], best["size"]) == ("base", "41k")
    assert best["metrics"]["loss"] < base["metrics"]["loss"]
    assert {"perplexity", "token_accuracy", "exact_match"} < set(best["metrics"])
    assert small("sft.py", *arguments) == found


@pytest.mark.slow
def test_steps_of_language_models_begin_with_the_same_loss(sums: tuple[str, ...]) -> None:
    found = small("sft.py", "--steps", *sums)
    lora, craft = found["steps"][:2]
    assert craft["first_loss"] == lora["first_loss"]
    assert craft["tokens"] == lora["tokens"]
    assert found["head"][0]["memory"][1] < found["head"][0]["memory"][0]
    assert all(row["by length"] <= row["random"] for row in found["padding"])


def test_sft_takes_rows_that_fit_and_tells_what_is_missing(
    sums: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    sft = importlib.import_module("sft")
    model = sums[1]
    rows = sft.short(Path("train.jsonl"), model, 90, 20, 1)
    assert rows == sft.short(Path("train.jsonl"), model, 90, 20, 1) != sft.short(Path("train.jsonl"), model, 90, 20, 2)
    with pytest.raises(SystemExit, match="of at most 40 tokens"):
        sft.short(Path("train.jsonl"), model, 40, 20, 1)

    setting = dict.fromkeys(sft.SETTING, 1)
    study = sft.Study(SimpleNamespace(json=None, **setting))
    for size, losses in (("r=8", (1.2, 1.0)), ("16k", (1.5, 1.4)), ("160k", (1.01, 1.3))):
        for rate, loss in zip(sft.RATES[size], losses, strict=False):
            study.trained.append({
                "targets": "query,value", "size": size, "rate": rate, "numbers": 9, "validation": {"loss": loss}, "seconds": 1,
                "cpu": 1, "memory": 1e6, **setting,
            })  # fmt: skip
        best = study.best("query,value", size)
        assert best["validation"]["loss"] == min(losses)
        metrics = {"loss": min(losses), "perplexity": 1.0, "token_accuracy": 0.5, "exact_match": 0.25}
        study.tested.append(
            {"targets": "query,value", "size": size, "rate": best["rate"], "metrics": metrics, **setting}
        )
    sft.table(study)  # without the model's own scores there is nothing to compare with
    assert "follows" not in capsys.readouterr().out
    study.tested.append({"targets": "", "size": "base", "rate": None, "metrics": metrics | {"loss": 2.0}, **setting})
    sft.table(study)
    shown = capsys.readouterr().out
    assert "| CRAFT 16k | 9 | 0.01 of 2 | 1.4000 | 1.4000 | 1.000 | 50.0 | 25.0 | 0.60 |" in shown
    assert "query,value: CRAFT follows LoRA r=8 from 160k on (0.99 of its gain)." in shown
    assert "Missing: query,value 16k 0.001, query,value 16k 0.03, query,value 41k 0.003" in shown


def test_the_figure_is_drawn_from_the_results_kept() -> None:
    subprocess.run(
        [sys.executable, BENCHMARKS / "figure.py", BENCHMARKS / "results", "speed.svg"], check=True, timeout=120
    )
    drawn = Path("speed.svg").read_text()
    assert drawn.count("<path") > 50
