"""Who starts processes, how they are started, and that a signal always ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from conftest import failure, invoke
from helpers import config, craft_command, flags, lines

import craft_cli as craft
from craft_cli.config import RunConfig
from craft_cli.errors import ConfigError
from craft_cli.training import launch, signals
from craft_cli.training.progress import Listener
from craft_cli.training.setup import make_accelerator

Make = Callable[..., Path]
GROUP = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What launchers set is taken back after a test; the terminal that runs it may close, even below nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for name in [*GROUP, "ACCELERATE_DYNAMO_MODE", "ACCELERATE_MIXED_PRECISION", "PYTHONSAFEPATH", signals.LAUNCHER]:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def by_accelerate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The environment that `accelerate launch` gives to the one process that it starts."""
    parsed = launch_command_parser().parse_args([*arguments, "craft"])
    _, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(parsed)[0])
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])


# -- how many -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eight_gpus")
def test_one_process_for_each_gpu_unless_a_launcher_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.processes_to_start(RunConfig()) == 8
    with monkeypatch.context() as patch:
        by_accelerate(
            patch, "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"
        )
        assert launch.processes_to_start(RunConfig()) == 0
        assert launch.settle_environment() == []
    for name, value in GROUP.items():
        monkeypatch.setenv(name, value)
    assert launch.processes_to_start(RunConfig()) == 0


def test_a_launch_of_several_cpu_processes_that_became_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    by_accelerate(
        monkeypatch, "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no",
    )  # fmt: skip
    (note,) = launch.settle_environment()
    assert "craft train --num-processes" in note


LEFT: list[dict[str, str]] = [
    {"RANK": "1"}, {"RANK": ""}, {"LOCAL_RANK": "0"}, {"WORLD_SIZE": "4"}, {"RANK": "1", "WORLD_SIZE": "4"},
]  # fmt: skip


@pytest.mark.parametrize("left", LEFT)
def test_what_a_scheduler_left_is_named_and_ignored(left: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert launch.is_main_process()
    (note,) = launch.settle_environment()
    assert all(f"{name}={value}" in note for name, value in left.items())
    assert not left.keys() & os.environ.keys()


def test_a_run_beside_what_a_scheduler_left_reports_its_result(
    pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LEFT[-1].items():
        monkeypatch.setenv(name, value)
    done = invoke("train", *flags(pico(), data_dir, max_steps=1))
    assert done.exit_code == 0, done.output
    assert "out/adapter" in done.stdout
    assert "note: RANK=1, WORLD_SIZE=4 in the environment is ignored" in done.stderr


@pytest.mark.parametrize("precision", ["fp8", "nonsense"])
def test_a_precision_of_accelerate_that_craft_does_not_train_in(
    precision: str, pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert f"ACCELERATE_MIXED_PRECISION={precision}: craft trains in" in failure("train", *flags(pico(), data_dir))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match="ACCELERATE_MIXED_PRECISION=fp16 needs a GPU"):
        make_accelerator(config(pico(), data_dir))


# -- signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_closed_terminal_ends_a_training_with_a_checkpoint(pico: Make, data_dir: Path) -> None:
    class Closes(Listener):
        def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGHUP)

    with pytest.raises(SystemExit) as end:
        craft.train(config(pico(), data_dir), Closes())
    assert end.value.code == 128 + signal.SIGHUP
    assert [path.name for path in Path("out/checkpoints").iterdir()] == ["step-3"]
    craft.train(config(pico(), data_dir, output_dir="uncut"))
    craft.train(config(pico(), data_dir, resume=True))
    assert lines() == lines("uncut")


def test_nohup_is_respected(pico: Make, data_dir: Path) -> None:
    class Closes(Listener):
        def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.terminates_cleanly():
            assert craft.train(config(pico(), data_dir, num_train_epochs=1), Closes()).updates == 6
    finally:
        signal.signal(signal.SIGHUP, before)


def launched(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any], *numbers: int) -> None:
    """`launch` with another launcher than torch's, and signals while it is at work."""
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: work)
    monkeypatch.setattr(launch, "_LAST_WORDS", 0.05)
    monkeypatch.setattr(launch, "ONE_PRESS", 0.1)

    def press() -> None:
        for number in numbers:
            time.sleep(0.4)
            os.kill(os.getpid(), number)

    pressing = threading.Thread(target=press)
    pressing.start()
    try:
        launch.launch(2, ["train"])
    finally:
        pressing.join()


def test_a_signal_ends_it_where_no_process_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    with pytest.raises(SystemExit) as end:
        launched(monkeypatch, lambda *_: stop.wait(60), signal.SIGTERM)
    assert end.value.code == 143
    with pytest.raises(KeyboardInterrupt):
        launched(monkeypatch, lambda *_: stop.wait(60), signal.SIGINT)
    stop.set()


def test_the_processes_of_a_run_end_with_the_sweep_that_began_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signals.LAUNCHER, str(os.getpid()))  # is not this process's parent: that has died
    with pytest.raises(SystemExit) as end:
        launched(monkeypatch, lambda *_: time.sleep(60))
    assert end.value.code == 128 + signal.SIGTERM


def test_the_third_signal_kills_processes_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    ended: list[int] = []
    launched(monkeypatch, lambda *_: ended.append(subprocess.call([sys.executable, "-c", deaf])), *[signal.SIGTERM] * 3)
    assert ended == [-signal.SIGKILL]


@pytest.mark.slow
def test_modules_of_the_users_and_a_host_name_in_no_dns(pico: Make, data_dir: Path) -> None:
    for name in ("queue", "random", "statistics", "torch"):
        Path(f"{name}.py").write_text("raise SystemExit('not this one')\n")
    given = ["train", *flags(pico(), data_dir, num_processes=2, max_steps=2)]
    environment = {"PYTHONPATH": str(Path(craft.__file__).parent.parent), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "craft_cli", *given]
    if os.geteuid() == 0 and subprocess.call(["unshare", "-u", "true"], stderr=subprocess.DEVNULL) == 0:
        command = ["unshare", "-u", "sh", "-c", 'hostname nosuchhost-7f3a; exec "$@"', "sh", *command]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert lines()[-1]["step"] == 2


@pytest.mark.slow
def test_three_processes_compute_what_one_does(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, per_device_train_batch_size=12))
    settings = {"per_device_train_batch_size": 4, "num_processes": 3, "output_dir": "three"}
    done = craft_command("train", *flags(pico(), data_dir, **settings))
    assert done.returncode == 0, done.stderr
    for one, three in zip(lines(), lines("three"), strict=True):
        assert one["step"] == three["step"]
        for name in one.keys() & {"loss", "eval_loss"}:
            assert one[name] == pytest.approx(three[name], abs=1e-5)
