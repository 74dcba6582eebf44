"""`craft doctor`: nothing left behind, and a check that fails is told and keeps no other from being made."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import invoke
from loopback_hub import LoopbackHub

from craft_cli.api import doctor
from craft_cli.api.doctor import Finding, examine
from craft_cli.errors import CraftError

NAMES = [
    "craft", "torch", "packages", "optional", "devices", "precision", "demo models", "processes", "hub", "factor cache", "hub cache",
    "training", "merge",
]  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the training, for tests of the other checks."""
    monkeypatch.setattr(doctor, "_training", lambda folder: ("ok", "left out"))


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def apart(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as what is in the environment is read at import; home is the test's."""
    return subprocess.run(
        [sys.executable, "-m", "craft_cli", "doctor", *arguments],
        env=os.environ | {"HF_HOME": str(Path("cache/hf").resolve())} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_all_is_well_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    import matplotlib.font_manager  # noqa: F401  # makes its own cache the first time

    before = sorted(tmp_path.rglob("*"))
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    *lines, last = result.stdout.splitlines()
    assert last == "everything works"
    assert [line[:14].strip() for line in lines] == NAMES
    states = {line[:14].strip(): line[14:22].strip() for line in lines}
    unused = {"devices": "note"} if torch.version.cuda and not torch.cuda.is_available() else {}
    assert {name: state for name, state in states.items() if state != "ok"} == {"hub": "note"} | unused
    after = sorted(
        path for path in tmp_path.rglob("*") if not path.name.startswith("torchinductor")
    )  # torch's, on import
    assert after == before
    assert Path.cwd() == tmp_path


def test_the_step_and_the_merge_are_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from craft_cli.api import merge as merging
    from craft_cli.api import train as training

    calls: list[Any] = []

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(given: Any, **options: Any) -> Any:
            calls.append((given, real(given, **options)))
            return calls[-1][1]

        return call

    monkeypatch.setattr(training, "train", noting(training.train))
    monkeypatch.setattr(merging, "merge", noting(merging.merge))
    told = by_name(examine())
    (config, result), (_, folded) = calls
    assert (result.updates, result.examples, config.use_cpu) == (1, 4, False)
    assert folded.tensors_changed == 4  # query and value of two layers
    assert 0 < folded.difference < folded.tolerance
    assert f"{folded.difference:.1e}" in told["merge"].told
    assert not Path(folded.output).parent.exists()


def test_json_is_one_object(light: None) -> None:
    result = invoke("doctor", "--json")
    content = json.loads(result.stdout)
    assert [finding["name"] for finding in content["findings"]] == NAMES
    assert {frozenset(finding) for finding in content["findings"]} == {frozenset({"name", "state", "told"})}
    assert (content["broken"], result.exit_code) == (0, 0)


def test_a_merge_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(run: Path) -> None:
        raise CraftError("the merged model differs")

    monkeypatch.setattr("craft_cli.api.merge.merge", fail)
    result = invoke("doctor", "--json")
    content = json.loads(result.stdout)
    assert result.exit_code == 1
    assert content["broken"] == 1
    assert content["findings"][-1] == {"name": "merge", "state": "broken", "told": "the merged model differs"}
    assert [finding["name"] for finding in content["findings"]] == NAMES


def test_a_training_that_fails_leaves_the_folder_and_no_merge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(config: Any, **options: Any) -> None:
        options["runs"].mkdir()
        raise RuntimeError("CUDA error:\n  no kernel image")

    monkeypatch.setattr("craft_cli.api.train.train", fail)
    result = invoke("doctor")
    assert result.exit_code == 1
    *_, training, merge, last = result.stdout.splitlines()
    assert training.split(maxsplit=2) == ["training", "broken", "RuntimeError: CUDA error: no kernel image"]
    assert merge.split(maxsplit=2) == ["merge", "note", "skipped: there is no run to merge"]
    assert last == "1 of 13 broken: training"
    assert Path.cwd() == tmp_path
    assert not Path("runs").exists()


def test_what_libraries_say_is_not_on_the_screen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def talk(folder: Path) -> tuple[str, str]:
        warnings.warn("old", FutureWarning, stacklevel=1)
        logging.getLogger("library").warning("old")
        return "ok", "done"

    monkeypatch.setattr(doctor, "_training", talk)
    assert by_name(examine())["training"].told == "done"
    assert not caplog.records
    logging.getLogger("library").warning("new")
    assert [record.message for record in caplog.records] == ["new"]


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("training", "factors", "models"):
        monkeypatch.delitem(sys.modules, f"craft_cli.{name}", raising=False)
    told = by_name(examine())
    assert told["torch"].state == told["training"].state == "broken"
    assert "torch" in told["torch"].told
    assert [told[name].state for name in ("craft", "packages", "optional", "hub", "hub cache")] == [
        "ok", "ok", "ok", "note", "ok",
    ]  # fmt: skip


def test_a_cache_that_is_a_file(light: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = invoke("doctor")
    assert result.exit_code == 1
    *lines, last = result.stdout.splitlines()
    assert last == "1 of 13 broken: factor cache"
    [line] = [line for line in lines if line.startswith("factor cache")]
    assert f"{tmp_path}/file/craft cannot be written (Not a directory): set XDG_CACHE_HOME" in line
    assert len(lines) == len(NAMES)


def test_what_caches_hold(light: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache/craft/tokens").mkdir(parents=True)
    (tmp_path / "cache/craft/a.safetensors").write_bytes(bytes(1_400_000))
    (tmp_path / "cache/craft/tokens/b.safetensors").write_bytes(bytes(100_000))
    (tmp_path / "cache/craft/tokens/link").symlink_to("../a.safetensors")
    usage = type("usage", (), {"free": 3_140_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    assert by_name(examine())["factor cache"] == Finding(
        "factor cache", "ok", f"{tmp_path}/cache/craft: 1.5 MB used, 3.1 GB free"
    )
    usage.free = 999_000_000  # type: ignore[attr-defined]
    low = by_name(examine())["hub cache"]
    assert low == Finding("hub cache", "note", f"{tmp_path}/cache/hub: 0 bytes used, 999 MB free, which is low")
    assert not (tmp_path / "cache/hub").exists()


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.TemporaryDirectory", fail)
    last = examine()[-1]
    assert (last.name, last.state) == ("training", "broken")
    assert "No usable temporary directory" in last.told


def test_a_package_out_of_range_and_one_missing(light: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return "4.57.1" if name == "transformers" else real(name)

    monkeypatch.setattr(
        metadata, "requires",
        lambda name: [
            "torch>=2", "transformers<6,>=5", "scipy>=1.11", "old; python_version < '3'", "gone; extra == 'dev'",
        ],
    )  # fmt: skip
    monkeypatch.setattr(metadata, "version", version)
    assert by_name(examine())["packages"] == Finding(
        "packages",
        "broken",
        "transformers is 4.57.1, scipy is missing: pip install 'transformers<6,>=5' 'scipy>=1.11'",
    )


def test_installed_ranges_are_read(light: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of craft's own metadata, those of an extra left out."""
    asked: list[str] = []
    real = metadata.version

    def version(name: str) -> str:
        asked.append(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert by_name(examine())["packages"].state == "ok"
    assert {"torch", "transformers", "annotated-types", "matplotlib"} < set(asked)
    assert "tensorly" not in asked

    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", none)
    told = by_name(examine())["packages"]
    assert told.state == "note"
    assert told.told.endswith("lora-craft is not installed, so its requirements were not checked")


def test_a_wrong_product_is_broken(light: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.eye
    monkeypatch.setattr(torch, "eye", lambda *arguments, **options: 2 * real(*arguments, **options))
    told = by_name(examine())["precision"]
    assert told == Finding("precision", "broken", "a product in torch.bfloat16 on cpu is wrong")


def test_a_torch_for_gpus_without_one(light: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def available() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver is too old (version 1). Please update.", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    told = by_name(examine())
    assert told["torch"].told.endswith("built for CUDA 12.8")
    assert told["devices"].state == "note"
    assert told["devices"].told.endswith(
        "no GPU that this torch build can use (CUDA initialization: The NVIDIA driver is too old (version 1))"
    )


@pytest.mark.slow
def test_a_hub_that_answers_and_one_that_does_not(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        done = apart("--json", HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")
        assert [(request.method, request.path) for request in hub.requests] == [("HEAD", "/")]
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert told["hub"]["state"] == "ok"
    assert told["hub"]["told"].startswith(f"{hub.url} answers in ")
    assert "secret" not in done.stdout

    dead = apart("--json", HF_ENDPOINT=hub.url.replace("//", "//someone:secret@"))
    assert dead.returncode == 0, dead.stderr
    told = {finding["name"]: finding for finding in json.loads(dead.stdout)["findings"]}
    assert told["hub"]["state"] == "note"
    assert told["hub"]["told"].startswith(f"{hub.url} cannot be reached (")
    assert "secret" not in dead.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


def test_offline_is_told(light: None) -> None:
    assert by_name(examine())["hub"] == Finding(
        "hub", "note", "offline mode is on (HF_HUB_OFFLINE): cached and local models only"
    )


@pytest.mark.parametrize(("status", "state"), [(200, "ok"), (404, "ok"), (403, "note"), (503, "note")])
def test_what_a_hub_answers(light: None, monkeypatch: pytest.MonkeyPatch, status: int, state: str) -> None:
    from huggingface_hub import constants

    session = type("Session", (), {"head": lambda self, url, timeout: type("Response", (), {"status_code": status})})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", session)
    told = by_name(examine())["hub"]
    assert told.state == state
    assert (f"HTTP status {status}" in told.told) == (state == "note")


def test_a_hub_that_takes_too_long(light: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no limit of the client's holds, as when the address is looked up."""
    import threading

    from huggingface_hub import constants

    late = threading.Event()
    session = type("Session", (), {"head": lambda self, url, timeout: late.wait(20)})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", session)
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.1)
    began = time.monotonic()
    told = by_name(examine())["hub"]
    assert time.monotonic() - began < 4
    late.set()
    assert told.state == "note"
    assert "no answer in 0.1 s" in told.told


def test_wrapped_between_words_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from craft_cli.cli import console
    from craft_cli.cli.doctor import _show

    told = "some words [and more] of them " * 5 + "https://a.very.long/" + "x" * 60
    monkeypatch.setattr(console, "out", Console(highlight=False, force_terminal=True, no_color=True, width=60))
    _show([Finding("hub", "note", told), Finding("factor cache", "broken", "no")])
    lines = capsys.readouterr().out.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert all(len(line) <= 60 for line in lines[:-2])
    assert all(line.startswith("  ") for line in lines[1:-1])
    assert lines[-2].strip() == "https://a.very.long/" + "x" * 60
    assert lines[-1] == "factor cache  broken  no"
    monkeypatch.setattr(console, "out", Console(highlight=False, force_terminal=False, width=60))
    _show([Finding("hub", "note", told)])
    assert capsys.readouterr().out == f"hub  note    {told}\n"
