"""Adapters and files of factors come from strangers: whatever they hold, they load right or are refused in one line."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico, classifier, failure, invoke, shake
from fuzz import memory
from safetensors.torch import load_file

import craft_cli as craft
from craft_cli.errors import CraftError, ModelError
from craft_cli.files import read_header, write_tensors
from craft_cli.methods.adapter_folder import read_adapter
from craft_cli.methods.craft.change import Transforms, slices_in_turn
from craft_cli.methods.craft.factors import Factors, factor_tensors
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.hub import resolve

Make = Callable[..., Path]
BOUND = 160 << 20  # 31 MB for 10,000 files, 119 MB with 300 merges among them
"""Bytes of memory above the files that are read."""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """What the fuzzer mutates."""
    folder = tmp_path / "good"
    base = build_pico("bert", folder / "base")
    factors = craft.decompose(str(base), ranks=(6, 5, 2))
    adapter = craft.attach(classifier(base), factors)
    shake(adapter)
    adapter.training_record = {
        "task": "sst2", "data": {"task": "sst2", "data_dir": "data"}, "problem_type": "single_label_classification",
        "labels": ["a", "b"], "threshold": 0.5, "max_seq_length": 32, "epoch": 1.0, "metrics": {"accuracy": 0.5},
        "recipe": {"task": "sst2", "ranks": "6,5,2"},
    }  # fmt: skip
    adapter.save(folder / "whole")
    adapter.save(folder / "small", factors="reference")
    craft.decompose(str(build_pico("roberta", folder / "other")), ranks=(4, 4, 1))  # the cache holds another base too
    assert factors.path is not None
    shutil.copy(factors.path, folder / "factors.safetensors")
    return folder


def fuzz(good: Path, seed: int, count: int, merges: int) -> dict[str, object]:
    work = good.parent / "work"
    work.mkdir()
    before = sorted(path for path in good.parent.rglob("*") if work not in path.parents)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(work / "cache")}
    shutil.copytree(good.parent / "cache", work / "cache")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fuzz.py"), *map(str, (good, seed, count, merges))],
        cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=60 + count / 10,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path for path in good.parent.rglob("*") if work not in path.parents) == before
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["loaded"] + found["refused"] == count
    assert found["loaded"] > 0.02 * count
    assert found["refused"] > 0.5 * count
    assert found["merged"] == merges
    assert found["memory"] < BOUND + 3 * found["largest"], found
    print(found)
    return found


@pytest.mark.slow
def test_a_few_hundred_mutated_files(good: Path) -> None:
    fuzz(good, 1, 300, 10)


@pytest.mark.slow
def test_many_mutated_files(good: Path) -> None:
    fuzz(good, 2, 1_500, 150)


def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    base = build_pico("bert", tmp_path / "base", max_shard_size="8KB")
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    for elsewhere in ("../secret.safetensors", "/etc/passwd", 7):
        content["weight_map"][name] = elsewhere
        index.write_text(json.dumps(content))
        with pytest.raises(ModelError, match="does not map tensors to files in its folder"):
            craft.decompose(str(base), ranks=(4, 4, 2))


def test_names_in_a_strangers_file_do_not_steer_the_terminal(good: Path) -> None:
    config = good / "whole/adapter_config.json"
    content = json.loads(config.read_text())
    content["model"]["id2label"]["0"] = "\x1b[2Jgone\nerror: no"
    config.write_text(json.dumps(content))
    done = invoke("inspect", str(good / "whole"))
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("labels")]
    assert "[2Jgone" in line
    assert "error: no" in line
    refused = invoke("inspect", "\x1b[2Jx.safetensors")
    assert "[2Jx.safetensors: no such file" in refused.stderr
    assert "\x1b" not in refused.stderr


def test_no_pickle_runs_code(tmp_path: Path) -> None:
    """An old base checkpoint is a pickle: only tensors are taken out of it."""
    base = build_pico("bert", tmp_path / "base")
    (base / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"x": Bomb()}, base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="is damaged or truncated"):
        resolve(str(base)).open()
    assert not (tmp_path / "exploded").exists()


# -- adapters that are whole, and not what they say ---------------------------------------------------------------------


def rewrite(adapter: Path, change: Callable[[Any, Any, Any], None]) -> None:
    """Change tensors, header and configuration of an adapter, as its author could."""
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, header, record = load_file(file), read_header(file, "an adapter"), json.loads(config.read_text())
    change(tensors, header, record)
    write_tensors(file, "an adapter", tensors, {key: value for key, value in header.items() if key != "checksum"})
    config.write_text(json.dumps(record))


def reshaped(tensors: Any, target: str, mode: str, rows: int, rank: int) -> None:
    tensors[f"{target}.factor.{mode}"], tensors[f"{target}.spectrum.{mode}"] = torch.ones(rows, rank), torch.ones(rows)
    tensors[f"transform.{target}.{mode}"] = torch.ones(rank, rank)


def of_another_shape(tensors: Any, header: Any, record: Any) -> None:
    reshaped(tensors, "query", "out", 25, 6)


def of_many_layers(tensors: Any, header: Any, record: Any) -> None:
    for target in header["targets"]:  # C0 would take 1000 times the core
        tensors[f"{target}.core"] = torch.ones(1, 400, 400)
        reshaped(tensors, target, "layer", 1000, 1)
        reshaped(tensors, target, "out", 400, 400)
        reshaped(tensors, target, "in", 400, 400)


def of_fewer_layers(tensors: Any, header: Any, record: Any) -> None:
    reshaped(tensors, "query", "layer", 2, 2)


def with_head(name: str, *shape: int) -> Callable[[Any, Any, Any], None]:
    def change(tensors: Any, header: Any, record: Any) -> None:
        tensors[f"head.{name}"] = torch.ones(shape)
        record["head"].append(name)

    return change


def with_odd_head(tensors: Any, header: Any, record: Any) -> None:
    tensors["head.classifier.bias"] = tensors["head.classifier.bias"].to(torch.float8_e4m3fn)


def of_no_weights(tensors: Any, header: Any, record: Any) -> None:
    header["sha256"] = record["base_model"]["sha256"] = {}


def padded(tensors: Any, header: Any, record: Any) -> None:
    record["model"]["pad_token_id"] = 10**9


def of_base(name: str) -> Callable[[Any, Any, Any], None]:
    def change(tensors: Any, header: Any, record: Any) -> None:
        record["base_model"]["model"] = name

    return change


ADAPTED = "bert.encoder.layer.0.attention.self.query.weight"
COMMANDS = {
    "merge": ("merge", "good/whole", "--output-dir", "out"),
    "inspect": ("inspect", "good/whole"),
    "predict": ("predict", "good/whole", "--use-cpu", "--input", "in.txt"),
}
STRANGE = {
    "shape": (of_another_shape, "merge", "the change of query is for (3, 25, 24), "),
    "many layers": (of_many_layers, "merge", "the change of query is for (1000, 400, 400), "),
    "fewer layers": (of_fewer_layers, "inspect", "its projections have different numbers of layers"),
    "head": (with_head("nonsense.weight", 2), "merge", "its head has 'nonsense.weight', which "),
    "adapted head": (with_head(ADAPTED, 24, 24), "merge", f"its head has '{ADAPTED}', which is also adapted"),
    "odd head": (with_odd_head, "inspect", "has values that are not finite"),
    "pad": (padded, "merge", "the adapter pads with token 1000000000, but "),
    "nobody's home": (of_base("~nouser/x"), "merge", "'~nouser/x' names no folder (Could not determine home directory"),
    "long name": (of_base("x" * 300), "merge", f"'{'x' * 80}...' names no folder (File name too long)"),
    "long name, predict": (of_base("x" * 300), "predict", f"'{'x' * 80}...' names no folder (File name too long)"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_strange_adapter_is_refused_in_one_line(good: Path, what: str) -> None:
    Path("in.txt").write_text("good film\n")
    change, command, told = STRANGE[what]
    rewrite(good / "whole", change)
    began = memory()
    assert told in failure(*COMMANDS[command])
    assert memory() - began < BOUND
    assert not Path("out").exists()


@pytest.mark.parametrize("given", ["~nobody_x/y", "x" * 300, "foo/bar--baz"])
def test_what_cannot_be_a_path_is_told_in_one_line(given: str, pico: Callable[..., Path]) -> None:
    Path("in.txt").write_text("good film\n")
    with pytest.raises(CraftError, match=r"names no folder|is not an adapter"):
        craft.load(classifier(pico()), given)
    for arguments in (("merge", given), ("predict", given, "--use-cpu", "--input", "in.txt")):
        said = failure(*arguments)
        assert "unexpected" not in said
        assert given[:80] in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reference_to_the_factors_of_no_weights_is_served_by_no_entry(good: Path, command: str) -> None:
    Path("in.txt").write_text("good film\n")
    rewrite(good / "small", of_no_weights)
    arguments = [argument.replace("whole", "small") for argument in COMMANDS[command]]
    assert "its labels or projections are inconsistent" in failure(*arguments)


def test_an_entry_that_holds_less_than_its_header_promises_is_passed_over(good: Path, tmp_path: Path) -> None:
    (entry,) = (tmp_path / "cache/craft").glob("base-*.safetensors")
    header = read_header(entry, "factors")
    factors = Factors.load(entry).select(("query", "value"), Ranks(2, 2, 1))
    del header["checksum"]
    write_tensors(entry.with_name("a.safetensors"), "factors", factor_tensors(factors.decompositions), header)
    assert craft.inspect(good / "small").kind == "adapter"


@pytest.mark.slow
def test_many_layers_of_large_matrices_are_inspected(good: Path) -> None:
    rewrite(good / "whole", of_many_layers)
    assert len(craft.inspect(good / "whole").projections[0]["change_by_layer"]) == 1000


def test_slices_of_the_change_are_those_of_the_adapter(good: Path) -> None:
    saved = read_adapter(good / "whole")
    assert isinstance(saved.frozen, Factors)
    for target, decomposition in saved.frozen.decompositions.items():
        projection = Transforms(decomposition.to(torch.float64))
        stored = {mode: saved.trained[f"transform.{target}.{mode}"] for mode in projection.k}
        with torch.no_grad():
            for mode, k in projection.k.items():
                k.copy_(stored[mode])
        expected = projection.double().slices().detach()
        actual = torch.stack(list(slices_in_turn(decomposition, stored)))
        assert torch.allclose(actual, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


def test_inspect_only_looks_into_the_cache(good: Path, tmp_path: Path) -> None:
    for entry in (tmp_path / "cache/craft").glob("*.safetensors"):
        entry.unlink()
    told = failure("inspect", "good/small")
    assert (
        "they are not in the cache; load or merge the adapter once, which computes them from its base, or copy" in told
    )
    assert list((tmp_path / "cache/craft").glob("*.safetensors")) == []
    craft.merge("good/small", "out")
    assert craft.inspect("good/small").kind == "adapter"


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("adapter/adapter_config.json", ("inspect", "adapter")),
        ("adapter/adapter_model.safetensors", ("inspect", "adapter")),
        ("adapter/adapter_model.safetensors", ("merge", "adapter", "-o", "merged")),
        ("adapter/README.md", ("merge", "adapter", "-o", "copy", "--format", "adapter")),
        ("merged/.craft.json", ("merge", "adapter", "-o", "merged", "--overwrite")),
    ],
)
def test_a_file_that_another_user_keeps_to_himself_is_called_so(
    file: str, command: tuple[str, ...], pico: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not damaged, not missing."""
    adapter = craft.attach(classifier(pico()), ranks=(6, 5, 2))
    shake(adapter)
    adapter.save("adapter", card="# A card\n")
    if file.startswith("merged"):
        craft.merge("adapter", "merged")
    real = io.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(file):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refusing)
    monkeypatch.setattr(io, "open", refusing)
    done = invoke(*command)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.replace(f"{Path.cwd()}/", "") == f"error: cannot read {file}: Permission denied\n"
