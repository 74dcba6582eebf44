"""Start several processes on this machine, which then join through Accelerate.

This calls torch's elastic launcher, as `accelerate launch` and `torchrun` do. Called directly, it also starts CPU
processes (`accelerate launch --cpu` needs MPI for that), and its failures can be reported in one line. It uses the
current interpreter, so nothing has to be on PATH.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import craft_cli
from craft_cli.config import RunConfig
from craft_cli.errors import CraftError
from craft_cli.training.signals import LAUNCHER, ONE_PRESS, StopSignals, end_by, launcher_died

_JOINING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables set by torch's launcher. If only some are set, they come from a scheduler."""
_LAST_WORDS = 3.0
"""Seconds for torch's launcher to exit once no process is left."""
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_launched() -> bool:
    """Whether torch's launcher (`torchrun`, `accelerate launch` or ours) started this process as one of a group."""
    return all(os.environ.get(name) for name in _JOINING) and os.environ["RANK"].isdigit()


def rank() -> int:
    """The rank of this process; 0 without a group."""
    return int(os.environ["RANK"]) if is_launched() else 0


def is_main_process() -> bool:
    """Whether this is the process that prints messages."""
    return rank() == 0


def settle_environment() -> list[str]:
    """Remove environment variables of a launcher that did not start this process, since libraries would wait for it.

    Returns:
        One note for each setting that has no effect.
    """
    notes = []
    left = [name for name in _JOINING[:3] if name in os.environ]
    if left and not is_launched():
        missing = [name for name in _JOINING if not os.environ.get(name)]
        shown = ", ".join(f"{name}={os.environ.pop(name)}" for name in left)
        notes.append(
            f"{shown} in the environment is ignored, because {missing[0] if missing else 'RANK'} is not set by a launcher; "
            "to start several processes, use --num-processes or torchrun"
        )
    if _is_accelerates() and os.environ.get("MASTER_ADDR") and not (is_launched() or _by_mpi()):
        notes.append(
            "accelerate launch started only one process on the CPU, because mpirun is missing; "
            "use craft train --num-processes"
        )
    return notes


def _is_accelerates() -> bool:
    """Whether `accelerate launch` started this process."""
    return "ACCELERATE_DYNAMO_MODE" in os.environ


def _by_mpi() -> bool:
    return any(os.environ.get(name, "1") != "1" for name in _MPI)


def processes_to_start(config: RunConfig) -> int:
    """The number of processes that `craft train` should start; 0 if a launcher already did, or if one is enough."""
    if is_launched() or _is_accelerates() or _by_mpi():
        return 0
    import torch

    gpus = 0 if config.use_cpu else torch.cuda.device_count()
    wanted = config.num_processes or max(1, gpus)
    if gpus and wanted > gpus:
        raise CraftError(f"--num-processes {wanted}: only {gpus} GPUs are visible")
    return wanted if wanted > 1 else 0


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m craft_cli ARGUMENTS` in several processes and wait.

    Signals are forwarded to the processes, which finish their update and save a checkpoint. A third signal kills them.

    Returns:
        0, the exit code of the first failed process, or 128 + the number of the signal that ended them.

    Raises:
        CraftError: a process was killed.
        KeyboardInterrupt: Ctrl-C before any process has started.
        SystemExit: another signal before any process has started.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):  # the processes print their own errors
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    began_by = os.environ.get(LAUNCHER)  # a sweep
    os.environ.update(child_environment())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="craft",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",  # all processes are on this machine, whose name may not resolve
        max_restarts=0,
        monitor_interval=0.1,
    )
    failed: list[BaseException] = []

    def work() -> None:
        try:
            elastic_launch(config, sys.executable)("-m", "craft_cli", *arguments)
        except BaseException as error:
            failed.append(error)

    # In a thread, where the launcher does not handle signals: it would kill processes that need more than 30 s to save.
    thread = threading.Thread(target=work, daemon=True)
    with _pass_on() as signals:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            if launcher_died(began_by) and not signals:  # it was killed
                os.kill(os.getpid(), signal.SIGTERM)
            if signals and not _children():  # all have ended, or none has started yet
                thread.join(_LAST_WORDS)
                if thread.is_alive():
                    raise end_by(signals[0])
    if not failed:
        return 0
    if not isinstance(failed[0], ChildFailedError):
        raise failed[0]
    rank, failure = failed[0].get_first_failure()
    if signals and failure.exitcode in (-signals[0], 128 + signals[0]):
        return 128 + signals[0]
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        raise CraftError(
            f"process {rank} was killed by {name}, and the others were stopped; "
            "resume from the last checkpoint with the same command and --resume"
        ) from failed[0]
    return failure.exitcode


def child_environment() -> dict[str, str]:
    """Environment variables of child processes: they exit with this process and use the same modules.

    They import nothing from the working folder, where a user's `queue.py` could shadow Python's.
    """
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    home = Path(craft_cli.__file__).resolve().parent.parent
    if home.name not in ("site-packages", "dist-packages"):  # a checkout
        paths.append(str(home))
    own = {LAUNCHER: str(os.getpid()), "PYTHONSAFEPATH": "1"}
    return dict(os.environ) | own | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


def _children() -> list[Any]:
    import psutil

    with suppress(psutil.Error):
        return psutil.Process().children()
    return []


@contextmanager
def _pass_on() -> Iterator[list[int]]:
    """Forward signals that stop a training to the child processes; yields the signals received."""
    came: list[int] = []
    last = 0.0

    def send(number: int, _: object) -> None:
        nonlocal last
        if not came or time.monotonic() - last > ONE_PRESS:
            came.append(number)
        last = time.monotonic()
        for child in _children():
            with suppress(Exception):  # the process has already ended
                child.send_signal(signal.SIGKILL if len(came) > 2 else number)

    with StopSignals.handled(send):
        yield came
