"""The sweep loop: start trials on free devices, watch them, and collect their results, in a single thread.

Several processes can work on one sweep. Each takes waiting trials, and takes over the trials of other processes that
died.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from craft_cli.config import RunConfig, comment, how_to_repeat
from craft_cli.files import write_bytes
from craft_cli.sweeps.plan import Plan
from craft_cli.sweeps.studies import Studies, Taken
from craft_cli.sweeps.table import Results, collect, write_tables
from craft_cli.sweeps.work import Work, recipe_text
from craft_cli.training.signals import StopSignals

BEST_FILE = "best.yaml"
_PAUSE = 0.05
_LOOK = 1.0
"""Seconds between two polls for waiting trials, and between two heartbeats."""


class Listener:
    """Receives progress events of a sweep; the console displays them."""

    def started(self, results: Results, trials: int | None, jobs: int) -> None:
        """The trials start, or resume."""

    def ended(self, results: Results, trial: str, trials: int | None, seconds_left: float | None) -> None:
        """A trial ended; it is a row of the results."""

    def tried(self, done: int, total: int) -> None:
        """Trials that made one step, in a dry run."""

    def noticed(self, what: str) -> None:
        """A note for the user."""

    def stopping(self) -> None:
        """A signal was received; the running trials save their checkpoints."""

    def interrupted(self, output: Path) -> None:
        """The sweep was interrupted."""


@dataclass
class Sweep:
    """A sweep that this process works on.

    Attributes:
        folder: the sweep's folder.
        plan: the settings it compares.
        studies: its trials.
        trials: number of trials; None if only the time limits them.
        devices: environment variables for each concurrent trial.
        listener: receives events.
        deadline: `time.monotonic` value after which no trial starts.
        flags: flags of the runs that a recipe cannot hold.
        works: trials running in this process, by device number.
    """

    folder: Path
    plan: Plan
    studies: Studies
    trials: int | None
    devices: Sequence[Mapping[str, str]]
    listener: Listener
    deadline: float | None = None
    flags: Sequence[str] = ()
    works: dict[int, Work] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _ended: int = 0
    _looked: float = -math.inf

    def results(self) -> Results:
        """The current tables."""
        tests = {method: self.studies.tests(method) for method in self.plan.methods}
        return collect(str(self.folder), self.plan, self.studies.trials(), tests)

    def run(self) -> int:
        """Run until all trials have ended, the time is up, or a signal is received; returns the signal number, or 0."""
        self.listener.started(self.results(), self.trials, len(self.devices))
        try:
            with StopSignals() as stop:
                while not self._step(stop):
                    time.sleep(_PAUSE)
                return stop.received
        finally:  # only after an error are there any left
            for work in self.works.values():
                work.kill()
                self.studies.give_back(work.taken)

    def _step(self, stop: StopSignals) -> bool:
        """Poll everything once; returns whether the sweep is finished."""
        if stop.received and any(not work.stopped for work in self.works.values()):
            self.listener.stopping()
            for work in self.works.values():
                work.stop()
        for device, work in list(self.works.items()):
            if work.poll():
                del self.works[device]
                self._settle(work)
                self._looked = -math.inf  # its device is free now
        if time.monotonic() - self._looked < _LOOK:
            return False
        for work in self.works.values():
            self.studies.lives(work.taken)
        over = bool(stop.received) or (self.deadline is not None and time.monotonic() > self.deadline)
        if not over:
            self._begin()
        self._looked = time.monotonic()
        return not self.works and (over or not self.studies.running())

    def _begin(self) -> None:
        """Take a waiting trial for every free device."""
        for device, environment in enumerate(self.devices):
            if device in self.works:
                continue
            if self.trials is None:
                self.studies.queue(None)
            taken = self.studies.take()
            if taken is None:
                return
            work = Work(self.folder, self.plan, self.studies, taken, environment, self.flags)
            work.repeat(self._same(taken))
            self.works[device] = work

    def _same(self, taken: Taken) -> Sequence[Mapping[str, object]]:
        """The runs of a complete trial with the same setting, which need not be repeated."""
        for trial in self.studies.trials():
            if (trial.state, trial.method, trial.setting) == ("complete", taken.method, dict(taken.setting)):
                return [{**run, "reason": f"the same setting as {trial.name}"} for run in trial.runs]
        return []

    def _settle(self, work: Work) -> None:
        """Record a finished trial in the study and the files, or requeue a stopped one."""
        if not work.state:
            self.studies.give_back(work.taken)
            return
        self.studies.end(work.taken, work.state, work.score)
        self._ended += 1
        results = self.results()
        write_tables(self.folder, results)
        write_best(self.folder, self.plan, results)
        self.listener.ended(results, work.taken.name, self.trials, self._seconds_left(results))

    def _seconds_left(self, results: Results) -> float | None:
        """Estimate the remaining seconds from the trials that ended here, limited by the deadline."""
        now = time.monotonic()
        left = [] if self.deadline is None else [max(self.deadline - now, 0.0)]
        if self.trials is not None:
            left.append((self.trials - results.done) * (now - self._began) / self._ended)
        return min(left) if left else None


def write_best(folder: Path, plan: Plan, results: Results) -> None:
    """Write best.yaml: the best setting, with its best seed."""
    best = results.best
    if best is None:
        return
    choose = min if results.lower_is_better else max
    runs = [run for run in results.runs if run["trial"] == best.trial]
    run = choose(runs, key=lambda run: run["score"])
    over = f"{best.mean:.4f} over the seeds {','.join(map(str, plan.seeds))}" if len(runs) > 1 else f"{best.mean:.4f}"
    summary = f"The best of {folder.name}, {best.trial}: {plan.metric} {over}; with this seed {run['score']:.4f}"
    head = comment(summary) + how_to_repeat(folder / BEST_FILE)
    write_bytes(folder / BEST_FILE, recipe_text(plan, best.method, best.setting, run["seed"], head).encode())


def devices(config: RunConfig, jobs: int | None) -> list[dict[str, str]]:
    """Environment variables for each concurrent trial: its own GPUs, or its share of the cores.

    Args:
        config: settings of a run, with `use_cpu` and `num_processes`.
        jobs: number of concurrent trials. Default: one per GPU, or one on the CPU.
    """
    import torch

    asked = [number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
    there = 0 if config.use_cpu else torch.cuda.device_count()
    gpus = (asked or [str(number) for number in range(there)])[:there]
    each = config.num_processes or 1
    groups = [gpus[start : start + each] for start in range(0, len(gpus) - each + 1, each)]
    count = jobs or max(1, len(groups))
    if groups:
        return [{"CUDA_VISIBLE_DEVICES": ",".join(groups[number % len(groups)])} for number in range(count)]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    alone = count == 1 or "OMP_NUM_THREADS" in os.environ
    return [{} if alone else {"OMP_NUM_THREADS": threads} for _ in range(count)]
