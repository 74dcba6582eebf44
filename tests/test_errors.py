"""Bad input on the command line: exit code 1, one line on stderr that helps, nothing on stdout, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import classifier, opinions, shake, write_rows
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import craft_cli as craft
from craft_cli.cli import app
from craft_cli.config import RunConfig
from craft_cli.errors import FileError

Make = Callable[..., Path]
ADAPTER, TENSORS, CONFIG = (
    Path("run/adapter"),
    Path("run/adapter/adapter_model.safetensors"),
    Path("run/adapter/adapter_config.json"),
)
DATA = ("--task", "sst2", "--data-dir", "data")
TRAIN = ("train", "--model", "base", "--ranks", "4,4,2", "--use-cpu", *DATA)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def tree() -> dict[str, bytes | None]:
    """Everything in the working folder but the caches."""
    found = [path for path in Path().rglob("*") if path.parts[0] != "cache"]
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def failure(*arguments: str, lines: int = 1) -> str:
    """Run a command that must fail as errors do; gives what it says."""
    before = tree()
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    told = result.stderr.splitlines()
    assert len(told) == lines, result.stderr
    assert all(line.startswith("error: ") for line in told)
    assert "Traceback" not in result.stderr
    assert "unexpected" not in result.stderr
    assert tree() == before
    return result.stderr


@pytest.fixture(scope="module")
def made(pico: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, data, and a run whose adapter changes something."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(pico(), "base")
        write_rows(Path("data/train.jsonl"), opinions(12, 1))
        write_rows(Path("data/validation.jsonl"), opinions(6, 2))
        adapter = craft.attach(classifier(Path("base")), craft.decompose("base", ranks="6,5,2", cache_dir="factors"))
        shake(adapter)
        adapter.save(ADAPTER)
        Path("run/recipe.yaml").write_text("task: sst2\n")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it to damage, in the working folder."""
    for entry in ("base", "data", "run"):
        shutil.copytree(made / entry, tmp_path / entry)
    return tmp_path / "run"


@pytest.fixture
def base(pico: Make) -> str:
    return str(pico())


def flip(path: Path) -> None:
    """Change one bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


# -- models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [("decompose",), ("inspect",), ("eval", "--task", "opinions"), ("train", "--task", "opinions", "--model")],
)
def test_a_model_folder_that_is_not_there_or_is_none(command: tuple[str, ...]) -> None:
    assert "./missing: no such folder" in failure(*command, "./missing")
    Path("empty").mkdir()
    assert "empty holds no config.json" in failure(*command, "empty")


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("command", [("decompose",), ("inspect",), ("train", "--task", "opinions", "--model")])
def test_an_unsupported_family_lists_the_supported_ones(command: tuple[str, ...], weights: bool, base: str) -> None:
    shutil.copytree(base, "model")
    Path("model/config.json").write_text('{"model_type": "t5"}')
    if not weights:
        Path("model/model.safetensors").unlink()
    message = failure(*command, "model")
    assert "'t5'" in message
    assert all(family in message for family in ("bert", "roberta", "distilbert", "deberta-v2", "gpt2", "llama"))


@pytest.mark.parametrize("content", ['{"model_type":', "[]", '{"model_type": "no-such-model"}'])
def test_a_config_that_transformers_cannot_read_is_named(content: str) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(content)
    assert "model/config.json: " in failure("decompose", "model")


def test_damaged_weights_of_a_base_are_named(base: str) -> None:
    shutil.copytree(base, "model")
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model/model.safetensors is damaged or truncated" in failure("decompose", "model")


# -- flags --------------------------------------------------------------------------------------------------------------


def test_an_unknown_target_names_the_nearest_one(run: Path) -> None:
    told = "--targets: unknown projection 'qury'; did you mean 'query'?"
    assert told in failure("decompose", "base", "--targets", "value,qury")
    assert told in failure(*TRAIN, "--targets", "value,qury")
    assert "--targets: name each projection once" in failure("decompose", "base", "--targets", "query,query")


@pytest.mark.parametrize("ranks", ["64,64", "0,1,1", "a,b,c"])
@pytest.mark.parametrize("command", ["decompose", "inspect", "train"])
def test_bad_ranks(command: str, ranks: str, base: str) -> None:
    model = ["--model", base, "--task", "opinions"] if command == "train" else [base]
    assert f"--ranks: expected three positive whole numbers OUT,IN,LAYERS such as 64,64,8, not '{ranks}'" in failure(
        command, *model, "--ranks", ranks
    )


def test_an_unknown_task_or_recipe_names_the_nearest_one(base: str) -> None:
    assert "--task: unknown task 'sst-2'; did you mean 'sst2'?" in failure("train", "--model", base, "--task", "sst-2")
    assert "no recipe 'quickstrat'; did you mean 'quickstart'?" in failure("train", "--recipe", "quickstrat")


def test_a_data_folder_without_files(run: Path) -> None:
    Path("empty").mkdir()
    task = ("--task", "sst2", "--data-dir")
    assert "expected one of train.jsonl" in failure("train", "--model", "base", *task, "empty")
    assert "expected one of validation.jsonl" in failure("eval", "run", *task, "empty")
    assert "--data-dir: nowhere: no such folder" in failure("eval", "run", *task, "nowhere")


def positive_settings() -> list[str]:
    return [field.name for field in RunConfig.__dataclass_fields__.values() if "Positive" in str(field.type)]


@pytest.mark.parametrize("spelled", ["-", "_"])
def test_everything_wrong_is_told_at_once_for_both_spellings_of_every_option(spelled: str) -> None:
    names = positive_settings()
    assert len(names) > 8
    flags = [f"--{name.replace('_', spelled)}=0" for name in names]
    told = failure("train", "--task", "sst2", *flags, lines=len(names)).splitlines()
    assert [line.split(":")[1].strip() for line in told] == ["--" + name.replace("_", "-") for name in names]


def test_underscores_in_options_leave_their_values_alone() -> None:
    assert "./no_such_folder: no such folder" in failure("decompose", "./no_such_folder", "--cache_dir", "a_b")
    assert "--train-file needs --validation-file" in failure("train", "--train_file", "my_data.csv", "--no_dry_run")
    assert "--data-dir: my_data: no such folder" in failure("train", "--data_dir=my_data")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--learning-rat", "1"],
        ["train", "--max-steps", "abc"],
        ["decompose"],
        ["decompose", "a", "b"],
        ["trian"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: craft" in result.stderr
    assert tree() == {}


def test_verbose_shows_where_it_happened() -> None:
    result = invoke("decompose", "./missing", "--verbose")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Traceback" in result.stderr
    assert result.stderr.startswith("error: ./missing: no such folder\n")


def test_a_real_process_ends_in_the_same_way(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "craft_cli", "decompose", "./missing"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: ./missing: no such folder\n")
    assert list(tmp_path.iterdir()) == []


# -- folders that are taken, runs that are none -------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_left_alone(run: Path) -> None:
    assert "run is not empty; choose another --output-dir or give --overwrite" in failure(*TRAIN, "--output-dir", "run")
    assert "data is not empty" in failure("merge", "run", "--output-dir", "data")
    assert "data/train.jsonl is a file" in failure(*TRAIN, "--output-dir", "data/train.jsonl")


def test_overwrite_empties_runs_only(run: Path) -> None:
    told = "data is not empty and is no run of craft's: --overwrite does not touch it"
    assert told in failure(*TRAIN, "--output-dir", "data", "--overwrite")


def test_what_is_no_run_cannot_be_merged(run: Path) -> None:
    assert "data is neither a run nor an adapter" in failure("merge", "data")
    assert "base is neither a run nor an adapter" in failure("merge", "base")
    shutil.rmtree(ADAPTER)
    assert "run is a run without an adapter" in failure("merge", "run")


@pytest.mark.parametrize("command", ["eval", "merge", "inspect"])
def test_without_any_run_there_is_no_latest_one(command: str) -> None:
    assert "no run yet below" in failure(command)


def test_a_base_model_without_a_head_is_not_evaluated(base: str) -> None:
    assert "has no trained head (classifier.bias, classifier.weight would be random)" in failure(
        "eval", base, "--task", "opinions"
    )


def test_what_cannot_be_drawn_or_counted(run: Path) -> None:
    assert "--ranks is for models" in failure("inspect", "run", "--ranks", "2,2,2")
    assert "--plot: base is a model" in failure("inspect", "base", "--plot", "x.png")
    assert "--plot: x.xyz" in failure("inspect", "run", "--plot", "x.xyz")


# -- damage -------------------------------------------------------------------------------------------------------------


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
    assert "factors.safetensors is damaged: its contents do not match their checksum" in failure(
        "inspect", str(factors)
    )


def test_a_file_of_somebody_elses(run: Path) -> None:
    Path("note.safetensors").write_text("not tensors at all, but some text")
    assert "note.safetensors is damaged or truncated" in failure("inspect", "note.safetensors")
    assert "base/model.safetensors is not a file of craft's with factors" in failure(
        "inspect", "base/model.safetensors"
    )
    assert "is not a file of craft's with factors" in failure("inspect", str(TENSORS))
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
    assert f"{TENSORS} is damaged: its contents do not match their checksum" in failure(*command)
    TENSORS.write_bytes(tensors[: len(tensors) // 2])
    assert f"{TENSORS} is damaged or truncated" in failure(*command)
    TENSORS.unlink()
    assert f"{TENSORS}: no such file" in failure(*command)
    TENSORS.write_bytes(tensors)
    CONFIG.write_text(config[: len(config) // 2])
    assert f"{CONFIG} is damaged or not JSON" in failure(*command)
    CONFIG.write_text(json.dumps({"peft_type": "LORA"}))
    assert f"{ADAPTER} is not an adapter of craft's" in failure(*command)


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
    assert "this model has other weights (query)" in failure(*command)


def test_an_adapter_on_weights_that_differ_in_one_number_is_refused(run: Path) -> None:
    weights = load_file("base/model.safetensors")
    name = next(name for name in weights if name.endswith("layer.2.attention.self.value.weight"))
    weights[name][23, 23] += 1e-3
    save_file(weights, "base/model.safetensors", metadata={"format": "pt"})
    assert "this model has other weights (value)" in failure("eval", "run", *DATA)


# -- a full disk --------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(size: int = 2000) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def leftovers() -> list[Path]:
    return [path for path in Path().rglob("*") if path.name.endswith((".part", ".old"))]


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
        with pytest.raises(FileError, match="No space left on device"):
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
