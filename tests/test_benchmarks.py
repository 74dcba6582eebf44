"""The benchmarks run, at sizes whose times mean nothing, and measure what they say."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from craft_cli import batches
from craft_cli.cli import app
from craft_cli.config import RunConfig
from craft_cli.preparation import prepare

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def results(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """What a benchmark writes with `--small`, run in this process."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [name, "--small", "--json", "results.json", *arguments])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    written = json.loads(Path("results.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    return written["results"]


def test_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    found = results("startup", monkeypatch)
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {f"craft {name} --help" for name in commands} < set(found["commands"])
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in found["commands"].values())
    assert found["commands"]["empty Typer app --help"]["ratio"] == 1
    assert found["inspect_imports"] == ["torch"]


def test_data(monkeypatch: pytest.MonkeyPatch) -> None:
    found = results("data", monkeypatch)
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
    timetable = batches.Timetable(config, prepared.train.lengths, config.per_device_train_batch_size)
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
