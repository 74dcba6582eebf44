"""What a notebook shows of a training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import config

import craft_cli as craft


@pytest.mark.slow
def test_a_training_in_a_notebook_has_a_bar(
    pico: Callable[..., Path], data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(pico(), data_dir, num_train_epochs=1)
    capsys.readouterr()
    craft.train(settings)
    assert capsys.readouterr() == ("", "")  # elsewhere it is silent
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    craft.train(config(pico(), data_dir, num_train_epochs=1, output_dir="again"))
    told = capsys.readouterr()
    assert "45 training rows, 23 validation rows" in told.out
    assert "130 parameters in the adapter, 50 in the head" in told.out
    assert "epoch 1    accuracy 0." in told.out
    assert "training: 100%" in told.err
    assert "6/6" in told.err
