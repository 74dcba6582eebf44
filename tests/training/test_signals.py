"""Ctrl-C: what was reached is kept, nothing is cut in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import opinions, write_rows
from helpers import config

import craft_cli as craft
from craft_cli.training import journal, signals
from craft_cli.training.progress import Listener

Make = Callable[..., Path]


def test_ctrl_c_keeps_the_best_adapter_and_says_where(pico: Make, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", opinions(400, 1))
    write_rows(tmp_path / "data" / "validation.jsonl", opinions(20, 2))
    command = [
        sys.executable, "-m", "craft_cli", "train", "--model", str(pico()), "--task", "sst2", "--data-dir", "data",
        "--ranks", "6,5,2", "--use-cpu", "--num-train-epochs", "500", "--output-dir", "out", "--logging-steps", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path("out/adapter/adapter_config.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "the best adapter so far is in out/adapter" in err
    assert "resume with  craft train --resume --output-dir out" in err
    assert "Traceback" not in err
    assert craft.evaluate("out").examples == 20
    assert not [path for path in Path("out").rglob("*") if ".part" in path.name]
    assert craft.inspect("out").facts["state"].startswith("interrupted at step ")


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_does_not_cut_what_is_being_written(
    presses: int, pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first picture imports matplotlib; an interrupt in there once aborted the interpreter."""
    before = signal.getsignal(signal.SIGINT)
    heard: list[tuple[int, Path | None, bool]] = []
    drawn: list[str] = []

    class Hears(Listener):
        def interrupted(self, step: int, run: Path | None, *, resumable: bool) -> None:
            heard.append((step, run, resumable))

    def draw(*_: object) -> None:
        for _press in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)
        drawn.append("whole")

    monkeypatch.setattr(signals, "ONE_PRESS", 0.01)
    monkeypatch.setattr(journal, "training_curve", draw)
    with pytest.raises(KeyboardInterrupt):
        craft.train(config(pico(), data_dir), Hears())
    assert (drawn, heard) == (["whole"], [(1, Path("out"), True)])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_it_at_once(pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[int, bool]] = []

    class Impatient(Listener):
        def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
            if step == 8:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGINT)

        def interrupted(self, step: int, run: Path | None, *, resumable: bool) -> None:
            heard.append((step, resumable))

    monkeypatch.setattr(signals, "ONE_PRESS", 0.01)
    with pytest.raises(KeyboardInterrupt):
        craft.train(config(pico(), data_dir), Impatient())
    assert heard == [(8, True)]
    assert [path.name for path in Path("out/checkpoints").iterdir()] == ["step-6"]
    craft.train(config(pico(), data_dir, output_dir="uncut"))
    craft.train(config(pico(), data_dir, resume=True))
    assert Path("out/metrics.jsonl").read_text() == Path("uncut/metrics.jsonl").read_text()
