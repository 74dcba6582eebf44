"""The memory of a step, estimated before it: exact where it counts, and near what a fresh process holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import invoke, opinions, write_rows
from helpers import DROPOUT, Remember, config, flags

import craft_cli as craft
from craft_cli.training import memory
from craft_cli.training.setup import Training

Make = Callable[..., Path]


def test_what_is_kept_is_linear_in_the_rows(pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a forward of one row and of two tells of any batch."""
    counted: list[tuple[int, int]] = []
    real = memory._kept

    def kept(training: Training, precision: Any) -> Any:
        found = real(training, precision)
        lengths = training.prepared.train.lengths
        batch = [max(range(len(lengths)), key=lengths.__getitem__)] * 16
        counted.append((found.fixed + 16 * found.row, memory._forward(training, batch, precision)[0]))
        return found

    monkeypatch.setattr(memory, "_kept", kept)
    craft.train(config(pico(**DROPOUT), data_dir, max_steps=1, eval_strategy="no"))
    assert counted
    assert counted[0][0] == pytest.approx(counted[0][1], rel=0.01)


def test_flags_that_save_memory_do_so_by_about_what_is_said(pico: Make, data_dir: Path) -> None:
    found = {}
    tried: dict[str, dict[str, Any]] = {
        "plain": {}, "again": {"gradient_checkpointing": True}
    }  # fmt: skip
    for name, changed in tried.items():
        listener = Remember()
        settings: dict[str, Any] = {"per_device_train_batch_size": 8, "dry_run": True} | changed
        craft.train(config(pico(num_hidden_layers=6), data_dir, **settings), listener)
        assert listener.plan
        assert listener.plan.memory
        found[name] = listener.plan.memory
    plain = found["plain"]
    assert plain.savings["--per-device-train-batch-size 4"] == pytest.approx(plain.activations / 2, rel=0.05)
    assert plain.activations - plain.savings["--gradient-checkpointing"] == pytest.approx(
        found["again"].activations, rel=0.05
    )
    assert "--gradient-checkpointing" not in found["again"].savings
    assert plain.peak >= plain.weights + plain.trained + plain.activations


def test_a_dry_run_tells_updates_time_and_memory(pico: Make, data_dir: Path) -> None:
    done = invoke("train", *flags(pico(), data_dir, num_train_epochs=5), "--dry-run")
    assert done.exit_code == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert rows["updates"].strip() == "30"  # 45 rows by 8, 5 times
    assert {"time", "memory", "used", "--per-device-train-batch-size 4"} <= {name.strip() for name in rows}
    assert "updates" in done.stderr
    found = json.loads(invoke("train", *flags(pico(), data_dir, num_train_epochs=5), "--dry-run", "--json").stdout)
    assert found["planned"] == 30
    assert found["memory"]["peak"] > found["memory"]["weights"] > 0
    assert found["memory"]["savings"]["--per-device-train-batch-size 4"] > 0
    assert not Path("out").exists()


FRESH = """
import json, sys
from pathlib import Path
import torch
import craft_cli as craft
from craft_cli.training.memory import peak
from craft_cli.training.progress import Listener

class Heard(Listener):
    def started(self, plan):
        self.memory = plan.memory
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

listener = Heard()
craft.train(craft.RunConfig.build(json.loads(sys.argv[1])), listener)
print(json.dumps([listener.memory.peak, peak(torch.device("cpu"))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process can be reset on Linux only"
)
@pytest.mark.parametrize("shape", ["pico", "demo", "roberta-base"])
def test_the_estimate_is_near_the_peak_of_a_fresh_process(shape: str, pico: Make) -> None:
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    rows = {"pico": 32, "demo": 32, "roberta-base": 4}[shape]
    model = {"pico": lambda: pico(), "demo": lambda: "demo", "roberta-base": lambda: pico("roberta", **base)}[shape]()
    for split in ("train", "validation"):
        texts = [{**row, "sentence": f"{row['sentence']} " * 8} for row in opinions(rows, 1)]
        write_rows(Path(f"data/{split}.jsonl"), texts)
    settings = {
        "model": str(model), "task": "sst2", "data_dir": "data", "ranks": "6,5,2", "per_device_train_batch_size": rows,
        "max_steps": 1, "max_seq_length": 40, "eval_strategy": "no", "head_start": "random", "use_cpu": True, "output_dir": "out",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(settings)], capture_output=True, text=True, check=True
    )
    estimated, held = json.loads(done.stdout.splitlines()[-1])
    assert estimated == pytest.approx(held, rel=0.2)
