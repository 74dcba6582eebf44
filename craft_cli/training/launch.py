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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from craft_cli.config import RunConfig
from craft_cli.errors import CraftError
from craft_cli.training.signals import LAUNCHER, StopSignals


def is_main_process() -> bool:
    """Whether this process is the one that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def processes_to_start(config: RunConfig) -> int:
    """How many processes `craft train` should start; 0 if it is one of them already, or needs only itself."""
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        return 0
    import torch

    gpus = 0 if config.use_cpu else torch.cuda.device_count()
    wanted = config.num_processes or max(1, gpus)
    if gpus and wanted > gpus:
        raise CraftError(f"--num-processes {wanted}: only {gpus} GPUs are visible")
    return wanted if wanted > 1 else 0


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m craft_cli ARGUMENTS` in several processes and wait.

    SIGINT and SIGTERM go on to the processes, which then finish their update and save.

    Returns:
        0; the exit code of the first that failed; or 128 + the number of the signal that ended them.

    Raises:
        CraftError: a process was killed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):  # the processes speak for themselves
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="craft",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
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


@contextmanager
def _pass_on() -> Iterator[list[int]]:
    """Send SIGINT and SIGTERM on to the processes started; yields the signals that came."""
    import psutil

    came: list[int] = []

    def send(number: int, _: object) -> None:
        came.append(number)
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    former = {number: signal.signal(number, send) for number in StopSignals.SIGNALS}
    try:
        yield came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
