"""The notebook runs from top to bottom, as it stands."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(autouse=True)
def left_behind() -> Iterator[None]:
    """Libraries may warn as they like; the Trainer leaves its own behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raising, logging.raiseExceptions = logging.raiseExceptions, False
        yield
        logging.raiseExceptions = raising
    AcceleratorState._reset_state()


def cells() -> list[str]:
    notebook = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_tour_runs_as_it_stands() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells():
        exec(compile(cell, "tour.ipynb", "exec"), names)
    assert names["result"].metrics["accuracy"] > names["result"].baselines["same_answer"]["accuracy"]
    assert names["merged"].difference < 1e-5
    assert names["adapter"]._repr_html_().count("<svg") == 6


def test_the_notebook_is_kept_without_outputs() -> None:
    """They would differ with every run, and hide what changed."""
    notebook = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert set(cell) >= {"cell_type", "id", "metadata", "source"}
        assert not cell.get("outputs")
    assert all(compile(cell, "tour.ipynb", "exec") for cell in cells())
