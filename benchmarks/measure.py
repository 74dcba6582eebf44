"""What the benchmarks share: arms timed in turn within one run, memory of a fresh process, a table, a json file.

Times on a shared machine drift by more than the differences of interest, so arms take turns, and what is compared is the
median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def arguments(description: str | None, *places: str, **options: dict[str, Any]) -> argparse.Namespace:
    """Command line of a benchmark: `--small`, `--json FILE`, its own options (names with underscores), and optional places."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works; the times mean nothing")
    parser.add_argument("--json", metavar="FILE", type=lambda path: Path(path).resolve())
    for name in places:
        parser.add_argument(name, nargs="?")
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    return parser.parse_args()


def in_turn(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every arm in each round; another arm begins each round.

    Args:
        arms: what to time, by name.
        rounds: how often.
        warm: rounds before, not counted.
        wait: called before a clock is read, such as `torch.cuda.synchronize`.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait()
            began = time.perf_counter()
            arms[name]()
            wait()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Sequence[float], to: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(one / other for one, other in zip(seconds, to, strict=True))


def peak_memory(work: Callable[..., Any], *given: Any) -> tuple[int, Any]:
    """Bytes that `work` needed at most above what its fresh process held before, and what it returned.

    `work` is a function of a module; it may return (bytes held before, result) from `after_imports` to leave out imports.
    Counts anonymous memory and mapped files, as the system does (VmHWM). Linux only.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_with_peak, (work, given))


def _with_peak(work: Callable[..., Any], given: tuple[Any, ...]) -> tuple[int, Any]:
    reset_peak()
    before = peak()
    result = work(*given)
    return peak() - before, result


def reset_peak() -> None:
    """Set this process's VmHWM to what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes this process held at most since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def most_alive(work: Callable[[], object]) -> int:
    """Most bytes of CPU tensors alive at once during `work` above those alive before, as torch's allocator counts them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = most = 0
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def machine() -> dict[str, Any]:
    """Where it was measured, in general terms."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def write(file: Path | None, results: Any) -> None:
    """Write results and machine as json, where a file is asked for."""
    if file:
        file.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
