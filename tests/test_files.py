"""Damaged files and full disks: one clear line, and what was there stays whole."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from conftest import classifier, failure, invoke, shake, tree
from helpers import flip, full_disk, leftovers
from safetensors.torch import load_file, save_file

import craft_cli as craft
from craft_cli.errors import FileError
from craft_cli.files import folders, hidden, read_header, read_json, read_tensors, write_json, write_tensors

Make = Callable[..., Path]
ADAPTER, TENSORS, CONFIG = (
    Path("run/adapter"),
    Path("run/adapter/adapter_model.safetensors"),
    Path("run/adapter/adapter_config.json"),
)
DATA = ("--task", "sst2", "--data-dir", "data")


@pytest.fixture
def base(pico: Make) -> str:
    return str(pico())


@pytest.fixture
def factors(made: Path) -> Path:
    (entry,) = (made / "factors").glob("*.safetensors")
    return Path(shutil.copy(entry, "factors.safetensors"))


@pytest.mark.parametrize("keep", [0, 4, 50, 0.5, -1])
def test_a_truncated_file_of_factors(factors: Path, keep: float) -> None:
    content = factors.read_bytes()
    factors.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    assert "factors.safetensors is damaged or truncated" in failure("inspect", "factors.safetensors")


def test_a_changed_byte_in_a_file_of_factors(factors: Path) -> None:
    flip(factors)
    assert "factors.safetensors is damaged: its contents do not match the checksum" in failure("inspect", str(factors))


def test_a_file_of_somebody_elses(run: Path) -> None:
    Path("note.safetensors").write_text("not tensors at all, but some text")
    assert "note.safetensors is damaged or truncated" in failure("inspect", "note.safetensors")
    assert "base/model.safetensors is not a craft file with factors" in failure("inspect", "base/model.safetensors")
    assert "is not a craft file with factors" in failure("inspect", str(TENSORS))
    assert "no.safetensors: no such file" in failure("inspect", "no.safetensors")


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_cache_entry_is_noticed_and_made_again(damage: str, base: str, tmp_path: Path) -> None:
    command = ("decompose", base, "--ranks", "4,4,2", "--json")
    assert json.loads(invoke(*command).stdout)["cached"] is False
    (entry,) = (tmp_path / "cache/craft").glob("*.safetensors")
    whole = entry.read_bytes()
    flip(entry) if damage == "flip" else entry.write_bytes(whole[:-9])
    again = invoke(*command)
    assert again.exit_code == 0
    assert json.loads(again.stdout)["cached"] is False
    assert entry.read_bytes() == whole
    note = again.stderr.removeprefix("note: ")
    assert note.startswith(f"{entry} is damaged")
    assert note.endswith("; decomposing again\n")
    last = invoke(*command)
    assert (json.loads(last.stdout)["cached"], last.stderr) == (True, "")


COMMANDS = [("eval", "run", *DATA), ("merge", "run"), ("inspect", "run")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_damaged_adapter_is_noticed(command: tuple[str, ...], run: Path) -> None:
    tensors, config = TENSORS.read_bytes(), CONFIG.read_text()
    flip(TENSORS)
    assert f"{TENSORS} is damaged: its contents do not match the checksum" in failure(*command)
    TENSORS.write_bytes(tensors[: len(tensors) // 2])
    assert f"{TENSORS} is damaged or truncated" in failure(*command)
    TENSORS.unlink()
    assert f"{TENSORS}: no such file" in failure(*command)
    TENSORS.write_bytes(tensors)
    CONFIG.write_text(config[: len(config) // 2])
    assert f"{CONFIG} is damaged or not JSON" in failure(*command)
    CONFIG.write_text(json.dumps({"peft_type": "LORA"}))
    assert f"{ADAPTER} is not a craft adapter" in failure(*command)


@pytest.mark.parametrize(
    "key", ["base_model", "base_model.revision", "model.pad_token_id", "model.id2label", "parameters"]
)
def test_a_key_missing_in_an_adapters_config_is_damage(key: str, run: Path) -> None:
    content = json.loads(CONFIG.read_text())
    *above, last = key.split(".")
    del (content[above[0]] if above else content)[last]
    CONFIG.write_text(json.dumps(content))
    assert f"{CONFIG} is damaged" in failure("inspect" if key == "parameters" else "merge", "run")


def test_an_adapter_of_a_later_format_is_refused(run: Path) -> None:
    content = json.loads(CONFIG.read_text())
    CONFIG.write_text(json.dumps(content | {"format_version": 99}))
    assert "upgrade craft" in failure("eval", "run", *DATA)


@pytest.mark.parametrize("command", COMMANDS[:2], ids=lambda command: command[0])
def test_an_adapter_on_other_weights_is_refused(command: tuple[str, ...], run: Path, pico: Make) -> None:
    for file in pico(vocab_size=65).iterdir():
        shutil.copy(file, "base")
    assert "the weights of this model (query) differ" in failure(*command)


def test_an_adapter_on_weights_that_differ_in_one_number_is_refused(run: Path) -> None:
    weights = load_file("base/model.safetensors")
    name = next(name for name in weights if name.endswith("layer.2.attention.self.value.weight"))
    weights[name][23, 23] += 1e-3
    save_file(weights, "base/model.safetensors", metadata={"format": "pt"})
    assert "the weights of this model (value) differ" in failure("eval", "run", *DATA)


# -- a full disk --------------------------------------------------------------------------------------------------------


def test_the_former_factors_outlive_a_full_disk(base: str, tmp_path: Path) -> None:
    command = ("decompose", base, "--ranks", "9,9,3", "--force")
    assert invoke(*command).exit_code == 0
    (entry,) = (tmp_path / "cache/craft").glob("*.safetensors")
    whole = entry.read_bytes()
    with full_disk():
        message = failure(*command)
    assert f"cannot write {entry}: " in message
    assert entry.read_bytes() == whole
    assert leftovers() == []


def test_the_former_adapter_outlives_a_full_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier(Path("base"))
    adapter = craft.load(model, ADAPTER)
    shake(adapter, 0.7)
    before = tree()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match=f"cannot write {ADAPTER}/.+: No space left on device"):
            adapter.save(ADAPTER)
    with full_disk(), pytest.raises(FileError, match="File too large"):
        adapter.save(ADAPTER)
    assert tree() == before
    adapter.save(ADAPTER)
    assert tree() != before
    assert leftovers() == []


def test_a_full_disk_while_merging_leaves_nothing_or_the_former_folder(run: Path) -> None:
    with full_disk():
        assert "cannot write run/" in failure("merge", "run")
    assert invoke("merge", "run").exit_code == 0
    with full_disk():
        assert "cannot write run/" in failure("merge", "run", "--overwrite")
    assert leftovers() == []


def test_a_full_disk_leaves_a_former_picture_whole(run: Path) -> None:
    assert invoke("inspect", "run", "--plot", "spectra.png").exit_code == 0
    with full_disk():
        assert "cannot write spectra.png" in failure("inspect", "run", "--plot", "spectra.png")


def test_json_keeps_a_path_that_is_no_utf8() -> None:
    write_json(Path("file.json"), {"model": "/data/\udcff/base", "label": "naïve"})
    assert read_json(Path("file.json")) == {"model": "/data/\udcff/base", "label": "naïve"}
    assert "naïve" in Path("file.json").read_text(encoding="utf-8")


@pytest.mark.usefixtures("run")
def test_files_go_to_the_home_directory_where_the_shell_leaves_that_to_craft(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As it does in `--plot=~/spectra.png`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    evaluated = invoke("eval", "run", *DATA, "--use-cpu", "--predictions=~/rows.csv")
    assert evaluated.exit_code == 0, evaluated.stderr
    assert invoke("inspect", "run", "--plot=~/spectra.png", "--html=~/page.html").exit_code == 0
    assert {path.name for path in Path("home").iterdir()} == {"rows.csv", "spectra.png", "page.html"}
    assert not Path("~").exists()


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors opens it twice: sizes and numbers could be of two files."""
    import safetensors.torch

    small, large = {"x": torch.zeros(3)}, {"x": torch.ones(300)}
    write_tensors(Path("kept.safetensors"), "factors", large, {"of": "large"})
    real = safetensors.torch.load_file
    others: list[RuntimeError | None] = [RuntimeError("smaller than the required mapping size"), None]

    def replaced(path: Path) -> dict[str, torch.Tensor]:
        found = real(path)
        if others:
            tensors, name = (small, "small") if len(others) == 2 else (large, "large again")
            write_tensors(path, "factors", tensors, {"of": name})
            if error := others.pop(0):
                raise error
        return found

    monkeypatch.setattr(safetensors.torch, "load_file", replaced)
    tensors, header = read_tensors(Path("kept.safetensors"), "factors")
    assert (header["of"], len(tensors["x"])) == ("large again", 300)
    others[:] = [RuntimeError("again and again") for _ in range(99)]
    with pytest.raises(FileError, match="keeps being replaced by another process"):
        read_tensors(Path("kept.safetensors"), "factors")


def test_a_header_that_is_replaced_while_it_is_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch maps the file by the size that it had when safetensors opened it."""
    path = Path("kept.safetensors")
    write_tensors(path, "factors", {"x": torch.ones(300)}, {"of": "large"})
    real, others = safetensors.safe_open, ["small"]

    def replaced(*args: Any, **options: Any) -> Any:
        if others:
            write_tensors(path, "factors", {"x": torch.zeros(3)}, {"of": others.pop()})
            raise RuntimeError("smaller than the required mapping size")
        return real(*args, **options)

    monkeypatch.setattr(safetensors, "safe_open", replaced)
    assert read_header(path, "factors")["of"] == "small"
    others[:] = [str(n) for n in range(99)]
    with pytest.raises(FileError, match="keeps being replaced by another process"):
        read_header(path, "factors")


def test_a_folder_that_is_being_replaced_leaves_no_listing_open() -> None:
    hidden(Path("out"), "old").mkdir()
    assert folders._gives_way(Path("out"))
    gc.collect()  # a listing left open is a ResourceWarning here
