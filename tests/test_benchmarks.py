"""The benchmarks do what they say; their times are not looked at here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_end_to_end_trains_every_arm_on_the_same_rows_from_the_same_start(tmp_path: Path) -> None:
    # three fresh processes, each importing transformers: longer than the other tests
    command = [sys.executable, str(BENCHMARKS / "end_to_end.py"), "--small", "--json", "results.json"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
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
