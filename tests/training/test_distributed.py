"""Several processes, on one machine or several: they compute what one computes, and end together (DESIGN property 7)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import failure, opinions, write_rows
from helpers import config, craft_command, flags, lines, tensors

import craft_cli as craft
from craft_cli.methods import METHODS
from craft_cli.training.run import Run, checkpoints

Make = Callable[..., Path]
Popen = subprocess.Popen[str]


def alike(run: str, other: str, tolerance: float = 1e-6) -> None:
    assert [line["step"] for line in lines(run)] == [line["step"] for line in lines(other)]
    for name, tensor in tensors(run).items():
        assert torch.allclose(tensor, tensors(other)[name], rtol=0, atol=tolerance), name


def start(*command: str, environment: dict[str, str] | None = None) -> Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | (environment or {}), start_new_session=True,
    )  # fmt: skip


@contextlib.contextmanager
def training(base: Path, **settings: Any) -> Iterator[Popen]:
    """A training of two processes that goes on for long, once it has made a checkpoint."""
    write_rows(Path("data/train.jsonl"), opinions(60, 1))
    write_rows(Path("data/validation.jsonl"), opinions(9, 2))
    given = {"num_train_epochs": 500, "save_steps": 5, "num_processes": 2, "per_device_train_batch_size": 4} | settings
    process = start("craft_cli", "train", *flags(base, Path("data"), **given))
    workers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not Path("out/checkpoints/step-5").is_dir() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        yield process
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, "a process was left over"
    finally:
        for one in [*workers, psutil.Process(process.pid)] if process.poll() is None else workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.communicate()


def settle(process: Popen) -> tuple[int, str]:
    """Exit code and stderr; a training must end within a minute."""
    _, err = process.communicate(timeout=60)
    return process.returncode, err


# -- the same as one -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_updates_of_two_processes_are_those_of_one(pico: Make, data_dir: Path) -> None:
    """45 rows in updates of 8: the last one of each epoch holds 5, which two processes share unevenly."""
    rates = {"learning_rate": 3e-3, "head_learning_rate": 3e-3, "num_train_epochs": 9}
    craft.train(config(pico(), data_dir, **rates))
    assert lines()[-1]["step"] == 54
    for name, batch in (("two", {"per_device_train_batch_size": 4}),
                        ("accumulated", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})):  # fmt: skip
        done = craft_command(
            "train", *flags(pico(), data_dir, output_dir=name, num_processes=2, **rates, **batch), "--json"
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["examples"] == 23
        alike(name, "out")


@pytest.mark.slow
def test_fewer_rows_than_processes(pico: Make) -> None:
    write_rows(Path("data/train.jsonl"), opinions(1, 1))
    write_rows(Path("data/validation.jsonl"), opinions(1, 2))
    craft.train(config(pico(), Path("data"), num_train_epochs=3))
    done = craft_command(
        "train", *flags(pico(), Path("data"), output_dir="two", num_processes=2, num_train_epochs=3), "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 1
    alike("two", "out")


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one_and_back(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, num_train_epochs=3))
    two = flags(pico(), data_dir, output_dir="run", num_processes=2, per_device_train_batch_size=4, max_steps=5)
    assert craft_command("train", *two).returncode == 0
    assert checkpoints(Run(Path("run")))[0].name == "step-5"
    for processes, steps in ((1, 9), (2, 18)):
        more = ["--resume", "--output-dir", "run", "--num-processes", str(processes), "--max-steps", str(steps)]
        done = craft_command("train", *more, "--num-train-epochs", "3")
        assert done.returncode == 0, done.stderr
        assert "batch    8" in done.stderr
        recipe = Run(Path("run")).recipe()  # that repeats the run
        assert (recipe["per_device_train_batch_size"], recipe["num_processes"]) == (4, 2)
    craft.train(config(pico(), data_dir, num_train_epochs=3, output_dir="again", max_steps=5))
    for steps in (9, 18):  # the rate depends on the steps to come, so the cuts must be the same
        craft.train(config(pico(), data_dir, num_train_epochs=3, output_dir="again", max_steps=steps, resume=True))
    alike("run", "again")


FSDP: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_machines": 1, "num_processes": 2,
    "mixed_precision": "no", "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True},
}  # fmt: skip


@pytest.mark.slow
def test_fsdp_shards_the_base_and_computes_the_same(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, num_train_epochs=1, per_device_eval_batch_size=8))
    Path("fsdp.yaml").write_text(yaml.safe_dump(FSDP))
    command = ["accelerate.commands.launch", "--config_file", "fsdp.yaml", "-m", "craft_cli", "train"]
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                "per_device_eval_batch_size": 8, "output_dir": "two"}  # fmt: skip
    for part in ("--max-steps 4 --save-steps 4", "--max-steps 6 --resume"):
        code, err = settle(start(*command, *flags(pico(), data_dir, **settings), *part.split()))
        assert code == 0, err
    held, whole = (int(n.replace(",", "")) for n in err.split("FSDP: ")[1].split(" parameters")[0].split(" of "))
    assert held < 0.6 * whole
    craft.train(config(pico(), data_dir, num_train_epochs=1, per_device_eval_batch_size=8, output_dir="a", max_steps=4))
    craft.train(config(pico(), data_dir, num_train_epochs=1, per_device_eval_batch_size=8, output_dir="a", resume=True))
    # Without AVX-512 two halves of a batch round further from the whole: 1.08e-6 in one number, at a learning rate of 0.03.
    alike("two", "a", tolerance=3e-6)
    assert json.loads(Path("two/adapter/adapter_config.json").read_text())["model"]["architecture"].startswith("Bert")
    older = FSDP | {"fsdp_config": FSDP["fsdp_config"] | {"fsdp_version": 1}}
    Path("fsdp.yaml").write_text(yaml.safe_dump(older))
    code, err = settle(start(*command, *flags(pico(), data_dir, **settings), "--overwrite"))
    assert code != 0
    assert "error: FSDP version 1 cannot shard part of a module; set fsdp_version: 2" in err


def test_one_process_has_nothing_to_shard(pico: Make, data_dir: Path) -> None:
    told = failure("train", *flags(pico(), data_dir), "--fsdp")
    assert (
        told == "error: --fsdp shards the base over several processes, but there is only one: pass --num-processes N\n"
    )


def test_the_flag_does_not_hide_a_version_of_accelerates_configuration(
    pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    for more in ([], ["--fsdp"]):
        told = failure("train", *flags(pico(), data_dir), *more)
        assert told == "error: FSDP version 1 cannot shard part of a module; set fsdp_version: 2\n"


@pytest.mark.slow
def test_two_launchers_with_ranks_of_their_own_are_two_machines(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [
        start(
            "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1",
            "--master-addr", "localhost", "--master-port", str(port), "-m", "craft_cli", "train",
            *flags(pico(), data_dir, output_dir="nodes", per_device_train_batch_size=4),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (code, err), (other, silent) = (settle(node) for node in nodes)
    assert (code, other) == (0, 0), err + silent
    assert "2 x CPU" in err
    assert "craft train" not in silent
    alike("nodes", "out")


# -- they end together ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_all_whole(number: signal.Signals, pico: Make) -> None:
    with training(pico()) as process:
        if number == signal.SIGINT:  # a terminal sends it to everyone
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        code, err = settle(process)
    assert code == 128 + number, err
    assert "resume with  craft train --resume --output-dir out" in err
    assert "Traceback" not in err
    assert "error" not in err
    assert Run(Path("out")).state().startswith("interrupted at step ")
    newest = int(checkpoints(Run(Path("out")))[0].name.removeprefix("step-"))
    assert newest == max(line["step"] for line in lines())
    done = craft_command("train", "--resume", "--output-dir", "out", "--max-steps", str(newest + 3), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["updates"] == newest + 3
    assert [line["step"] for line in lines() if "loss" in line] == [*range(1, newest + 4)]


@pytest.mark.slow
def test_one_process_killed_ends_all_with_its_error(pico: Make) -> None:
    with training(pico()) as process:
        victim = psutil.Process(process.pid).children()[1]
        victim.kill()
        code, err = settle(process)
    assert code == 1
    assert "was killed by SIGKILL, and the others were stopped; resume from the last checkpoint" in err
    assert "unexpected" not in err
    assert "Traceback" not in err
    assert not Run(Path("out")).is_running()
    assert checkpoints(Run(Path("out")))


@pytest.mark.slow
def test_the_processes_end_when_their_launcher_is_killed(pico: Make) -> None:
    with training(pico()) as process:
        process.kill()
    assert not Run(Path("out")).is_running()
    assert checkpoints(Run(Path("out")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "error"),
    [
        (0, "torch.OutOfMemoryError"),
        (1, "torch.OutOfMemoryError"),
        (1, "__import__('craft_cli.errors').errors.FileError"),  # that only one machine meets
    ],
    ids=["main", "other", "other-craft"],
)
def test_one_process_that_fails_ends_all_with_its_error(which: int, error: str, pico: Make, tmp_path: Path) -> None:
    """A crash of the program, not of the process: out of memory, say."""
    Path("crash/sitecustomize.py").parent.mkdir()
    Path("crash/sitecustomize.py").write_text(
        "import os\n"
        f"if os.environ.get('RANK') == '{which}':\n"
        "    import torch\n"
        "    former, count = torch.optim.AdamW.step, [0]\n"
        "    def step(*arguments, **options):\n"
        "        count[0] += 1\n"
        "        if count[0] == 7:\n"
        f"            raise {error}('out of memory, as a test')\n"
        "        return former(*arguments, **options)\n"
        "    torch.optim.AdamW.step = step\n"
    )
    write_rows(Path("data/train.jsonl"), opinions(60, 1))
    write_rows(Path("data/validation.jsonl"), opinions(9, 2))
    given = flags(pico(), Path("data"), num_processes=2, per_device_train_batch_size=4, save_steps=5)
    code, err = settle(start("craft_cli", "train", *given, environment={"PYTHONPATH": str(tmp_path / "crash")}))
    assert code == 1
    assert "out of memory, as a test" in err
    assert "Traceback" not in err
    assert Path("out/checkpoints/step-5").is_dir()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_two_processes(pico: Make, data_dir: Path) -> None:
    settings = {"num_processes": 2, "learning_rate": 1e30, "head_learning_rate": 1e30}
    code, err = settle(start("craft_cli", "train", *flags(pico(), data_dir, **settings)))
    assert code == 1
    assert "error: the loss is " in err
    assert "start again with a lower --learning-rate" in err


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "craft"])
def test_two_processes_train_every_method_as_one_does(method: str, pico: Make, data_dir: Path) -> None:
    """Each with the whole base, and LoRA with a sharded one too."""
    given = {"method": method, "rank": 3, "num_train_epochs": 1, "per_device_eval_batch_size": 8, "learning_rate": 1e-3}
    craft.train(config(pico(), data_dir, output_dir="one", **given))
    given |= {"per_device_train_batch_size": 4}
    done = craft_command("train", *flags(pico(), data_dir, num_processes=2, output_dir="two", **given))
    assert done.returncode == 0, done.stderr
    alike("two", "one", tolerance=3e-6)
    if method != "lora":
        return
    done = craft_command("train", *flags(pico(), data_dir, num_processes=2, output_dir="sharded", **given), "--fsdp")
    assert done.returncode == 0, done.stderr
    assert "FSDP: " in done.stderr
    alike("sharded", "one", tolerance=3e-6)
