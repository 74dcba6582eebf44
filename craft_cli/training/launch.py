"""Starting several processes on this machine, each of which then joins through Accelerate.

torch's elastic launcher is what `accelerate launch` and `torchrun` use; called directly, it also starts CPU processes
(`accelerate launch --cpu` needs MPI for that), and its failures can be told in our words. The interpreter is this one;
nothing has to be on PATH.
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
"""In the environment of a process that torch's launcher started. Some of them alone are left over from a scheduler."""
_LAST_WORDS = 3.0
"""Seconds that torch's launcher has to end once no process is left."""
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_launched() -> bool:
    """Whether torch's launcher (`torchrun`, `accelerate launch` or ours) started this process as one of a group."""
    return all(os.environ.get(name) for name in _JOINING) and os.environ["RANK"].isdigit()


def rank() -> int:
    """The number of this process in its group; 0 where there is none."""
    return int(os.environ["RANK"]) if is_launched() else 0


def is_main_process() -> bool:
    """Whether this process is the one that speaks."""
    return rank() == 0


def settle_environment() -> list[str]:
    """Take variables of a launcher that did not start this process out of the environment: libraries would wait for it.

    Returns:
        A line for each thing that the user may have meant otherwise.
    """
    notes = []
    left = [name for name in _JOINING[:3] if name in os.environ]
    if left and not is_launched():
        missing = [name for name in _JOINING if not os.environ.get(name)]
        shown = ", ".join(f"{name}={os.environ.pop(name)}" for name in left)
        notes.append(
            f"{shown} in the environment is ignored, since {missing[0] if missing else 'RANK'} is not set as a launcher "
            "would: this is one process; start several with --num-processes or torchrun"
        )
    if _is_accelerates() and os.environ.get("MASTER_ADDR") and not (is_launched() or _by_mpi()):
        notes.append(
            "accelerate launch was asked for several processes on the CPU, but without mpirun it started this one only: "
            "use craft train --num-processes"
        )
    return notes


def _is_accelerates() -> bool:
    """Whether `accelerate launch` started this process, alone or not."""
    return "ACCELERATE_DYNAMO_MODE" in os.environ


def _by_mpi() -> bool:
    return any(os.environ.get(name, "1") != "1" for name in _MPI)


def processes_to_start(config: RunConfig) -> int:
    """How many processes `craft train` should start; 0 if a launcher has decided that, or if it needs only itself."""
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

    Signals go on to the processes, which then finish their update and save. A third one kills them.

    Returns:
        0; the exit code of the first that failed; or 128 + the number of the signal that ended them.

    Raises:
        CraftError: a process was killed.
        KeyboardInterrupt: Ctrl-C before any process has started.
        SystemExit: another signal, likewise.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):  # the processes speak for themselves
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
        local_addr="127.0.0.1",  # all processes are on this machine, whose name may be in no DNS
        max_restarts=0,
        monitor_interval=0.1,
    )
    failed: list[BaseException] = []

    def work() -> None:
        try:
            elastic_launch(config, sys.executable)("-m", "craft_cli", *arguments)
        except BaseException as error:
            failed.append(error)

    # In a thread, because there the launcher leaves signals alone: it would kill what needs longer than 30 s to save.
    thread = threading.Thread(target=work, daemon=True)
    with _pass_on() as signals:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            if launcher_died(began_by) and not signals:  # it was killed
                os.kill(os.getpid(), signal.SIGTERM)
            if signals and not _children():  # they have ended, or none had started yet
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
            f"process {rank} was killed by {name}; the others were stopped. "
            "Go on from the last checkpoint with the same command and --resume"
        ) from failed[0]
    return failure.exitcode


def child_environment() -> dict[str, str]:
    """The environment of processes that run craft: they end with this one and import what this one does.

    Of the working folder they import nothing: a `queue.py` of the user's is not Python's.
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
    """Send the signals that stop a training on to the processes started; yields those that came."""
    came: list[int] = []
    last = 0.0

    def send(number: int, _: object) -> None:
        nonlocal last
        if not came or time.monotonic() - last > ONE_PRESS:
            came.append(number)
        last = time.monotonic()
        for child in _children():
            with suppress(Exception):  # it has ended meanwhile
                child.send_signal(signal.SIGKILL if len(came) > 2 else number)

    with StopSignals.handled(send):
        yield came
