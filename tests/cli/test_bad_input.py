"""Bad input on the command line: exit code 1, one line on stderr that helps, nothing on stdout, nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import failure, invoke, tree
from typer.main import get_command

from craft_cli.cli import app
from craft_cli.config import RunConfig

Make = Callable[..., Path]
ADAPTER = Path("run/adapter")
DATA = ("--task", "sst2", "--data-dir", "data")
READERS = [("decompose",), ("inspect",), ("train", "--task", "opinions", "--model")]
TRAIN = ("train", "--model", "base", "--ranks", "4,4,2", "--use-cpu", *DATA)


@pytest.fixture
def base(pico: Make) -> str:
    return str(pico())


# -- models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*READERS, ("eval", "--task", "opinions")], ids=lambda command: command[0])
def test_a_model_folder_that_is_not_there_or_is_none(command: tuple[str, ...]) -> None:
    assert "./missing: no such folder" in failure(*command, "./missing")
    Path("empty").mkdir()
    assert "empty has no config.json" in failure(*command, "empty")


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
def test_an_unsupported_family_lists_the_supported_ones(command: tuple[str, ...], weights: bool, base: str) -> None:
    shutil.copytree(base, "model")
    Path("model/config.json").write_text('{"model_type": "mamba"}')
    if not weights:
        Path("model/model.safetensors").unlink()
    message = failure(*command, "model")
    assert "'mamba'" in message
    assert all(family in message for family in ("bert", "roberta", "distilbert", "deberta-v2", "gpt2", "llama"))


@pytest.mark.parametrize("content", ['{"model_type":', "[]", '{"model_type": "no-such-model"}'])
def test_a_config_that_transformers_cannot_read_is_named(content: str) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(content)
    assert "model/config.json" in failure("decompose", "model")


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
    assert f"--ranks: expected three positive integers OUT,IN,LAYERS such as 64,64,8, not '{ranks}'" in failure(
        command, *model, "--ranks", ranks
    )


def test_an_unknown_task_or_recipe_names_the_nearest_one(base: str) -> None:
    assert "--task: unknown task 'ssst2'; did you mean 'sst2'?" in failure("train", "--model", base, "--task", "ssst2")
    assert "no recipe 'quickstrat'; did you mean 'quickstart'?" in failure("train", "--recipe", "quickstrat")


def test_a_recipe_that_is_not_clear() -> None:
    Path("r.yaml").write_text("task: sst2\nlerning_rate: 1e-3\n")
    assert "r.yaml: unknown key 'lerning_rate'; did you mean 'learning_rate'?" in failure("train", "--recipe", "r.yaml")
    Path("r.yaml").write_text("task: sst2\nseed: 1\nseed: 2\n")
    assert "r.yaml: 'seed' appears 2 times; keep one" in failure("train", "--recipe", "r.yaml")
    Path("r.yaml").write_text("just some words")
    assert "expected lines of the form 'key: value'" in failure("train", "--recipe", "r.yaml")


def test_training_needs_something_to_train_on(base: str) -> None:
    assert "no training data: pass --task" in failure("train", "--model", base)


def test_a_data_folder_without_files(run: Path) -> None:
    Path("empty").mkdir()
    task = ("--task", "sst2", "--data-dir")
    assert "expected one of train.jsonl" in failure("train", "--model", "base", *task, "empty")
    assert "expected one of validation.jsonl" in failure("eval", "run", *task, "empty")
    assert "--data-dir: nowhere: no such folder" in failure("eval", "run", *task, "nowhere")


def positive_settings() -> list[str]:
    return [field.name for field in RunConfig.settings() if "Positive" in str(field.type)]


@pytest.mark.parametrize("spelled", ["-", "_"])
def test_everything_wrong_is_told_at_once_for_both_spellings_of_every_option(spelled: str) -> None:
    names = positive_settings()
    assert len(names) > 8
    flags = [f"--{name.replace('_', spelled)}=0" for name in names]
    told = failure("train", "--task", "sst2", *flags, lines=len(names)).splitlines()
    assert sorted(line.split(":")[1].strip() for line in told) == sorted("--" + it.replace("_", "-") for it in names)


def test_underscores_in_options_leave_their_values_alone() -> None:
    assert "./no_such_folder: no such folder" in failure("decompose", "./no_such_folder", "--cache_dir", "a_b")
    assert "my_data.csv: no such file" in failure("train", "--train_file", "my_data.csv", "--no_dry_run")
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


@pytest.mark.slow
def test_a_real_process_ends_in_the_same_way(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "craft_cli", "decompose", "./missing"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: ./missing: no such folder\n")
    assert list(tmp_path.iterdir()) == []


# -- folders that are taken, runs that are none -------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_left_alone(run: Path) -> None:
    assert "run is not empty; choose another --output-dir or pass --overwrite" in failure(*TRAIN, "--output-dir", "run")
    assert "data is not empty" in failure("merge", "run", "--output-dir", "data")
    assert "base/config.json is a file" in failure(*TRAIN, "--output-dir", "base/config.json")
    assert not Path("cache").exists()  # said before anything was decomposed


def test_overwrite_empties_runs_only(run: Path) -> None:
    assert "--output-dir: data is the input data" in failure(*TRAIN, "--output-dir", "data", "--overwrite")
    told = "base is not empty and cannot be replaced: craft did not write config.json"
    assert told in failure(*TRAIN, "--output-dir", "base", "--overwrite")


def test_what_is_no_run_cannot_be_merged(run: Path) -> None:
    assert "data is neither a run nor an adapter" in failure("merge", "data")
    assert "base is neither a run nor an adapter" in failure("merge", "base")
    shutil.rmtree(ADAPTER)
    assert "run is a run without an adapter" in failure("merge", "run")


@pytest.mark.parametrize("command", ["eval", "merge", "inspect"])
def test_without_any_run_there_is_no_latest_one(command: str) -> None:
    assert "no run in" in failure(command)


def test_a_base_model_without_a_head_is_not_evaluated(base: str) -> None:
    assert "has no trained head (classifier.bias, classifier.weight would be random)" in failure(
        "eval", base, "--task", "opinions"
    )


def test_what_cannot_be_drawn_or_counted(run: Path) -> None:
    assert "--ranks is for models" in failure("inspect", "run", "--ranks", "2,2,2")
    assert "--plot: base is a model" in failure("inspect", "base", "--plot", "x.png")
    assert "--plot: x.xyz" in failure("inspect", "run", "--plot", "x.xyz")


def test_a_folder_that_may_not_be_entered_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.is_file

    def refusing(path: Path) -> bool:
        if path.parts[:1] == ("theirs",):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", refusing)
    Path("theirs").mkdir()
    done = invoke("inspect", "theirs")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "Permission denied; ask its owner" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "given", "wanted"),
    [
        ("train", "--lr", "learning-rate"),
        ("train", "--batch-size", "per-device-train-batch-size"),
        ("train", "--batch_size", "per-device-train-batch-size"),
        ("eval", "--batch-size", "per-device-eval-batch-size"),
        ("train", "--epochs", "num-train-epochs"),
        ("train", "--output", "output-dir"),
        ("predict", "--output-dir", "output"),
        ("train", "--max-length", "max-seq-length"),
        ("train", "--train-epochs", "num-train-epochs"),
        ("train", "--learning-rat", "learning-rate"),
        ("decompose", "--rank", "ranks"),
    ],
)
def test_a_flag_of_another_tool_names_the_one_that_is_meant(command: str, given: str, wanted: str) -> None:
    result = invoke(command, given, "3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"did you mean --{wanted}?" in " ".join(result.stderr.replace("│", " ").split())


def test_every_suggestion_is_a_flag() -> None:
    from craft_cli.cli.usage import _ELSEWHERE

    flags = {name[2:] for command in get_command(app).commands.values() for it in command.params for name in it.opts}  # type: ignore[attr-defined]
    assert set(_ELSEWHERE) <= flags
