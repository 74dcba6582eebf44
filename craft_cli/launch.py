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
from contextlib import contextmanager

from craft_cli.config import RunConfig
from craft_cli.errors import CraftError


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


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C takes effect when the block ends.

    For what must not be cut in the middle: a C extension that is being imported (the first picture brings matplotlib)
    turns the interrupt into an error of its own, or aborts the interpreter.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    pressed = False

    def remember(*_: object) -> None:
        nonlocal pressed
        pressed = True

    former = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if pressed:
        raise KeyboardInterrupt


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m craft_cli ARGUMENTS` in several processes and wait.

    Returns:
        The exit code of the first that failed, or 0.

    Raises:
        CraftError: a process was killed.
        KeyboardInterrupt: Ctrl-C, after all have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):  # the processes speak for themselves
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
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
    try:
        elastic_launch(config, sys.executable)("-m", "craft_cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise CraftError(f"process {rank} was killed by {name}; the others were stopped") from error
        return failure.exitcode
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise SystemExit(128 + error.sigval) from error
    return 0
