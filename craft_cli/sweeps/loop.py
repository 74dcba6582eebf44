"""The working of a sweep: trials begin where a device is free, are watched, and end; all of it in one thread.

Several processes may work on one sweep. Each takes what waits, and waits for what others have at work, to take it over if
they die.
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
"""Seconds between two looks at what waits, and between two signs of life."""


class Listener:
    """Hears of a sweep's progress; the console shows it."""

    def started(self, results: Results, trials: int | None, jobs: int) -> None:
        """The trials begin, or go on."""

    def ended(self, results: Results, trial: str, trials: int | None, seconds_left: float | None) -> None:
        """A trial is over; it is a row of the results."""

    def tried(self, done: int, total: int) -> None:
        """Trials of which one step was made, in a dry run."""

    def noticed(self, what: str) -> None:
        """Something the user should know."""

    def stopping(self) -> None:
        """A signal came; the running trials write their checkpoints."""

    def interrupted(self, output: Path) -> None:
        """The sweep ended before its time."""


@dataclass
class Sweep:
    """A sweep that this process works on.

    Attributes:
        folder: of its files.
        plan: what it compares.
        studies: its trials.
        trials: how many there are to be; None where the time alone ends them.
        devices: for each trial at once the environment of its processes.
        listener: receives events.
        deadline: by `time.monotonic`; no trial begins after it.
        flags: of the runs, which no recipe holds.
        works: the trials at work here, by the number of their device.
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
        """The tables of now."""
        tests = {method: self.studies.tests(method) for method in self.plan.methods}
        return collect(str(self.folder), self.plan, self.studies.trials(), tests)

    def run(self) -> int:
        """Work until nothing waits and nobody works, until the time is over, or until a signal comes; its number, or 0."""
        self.listener.started(self.results(), self.trials, len(self.devices))
        try:
            with StopSignals() as stop:
                while not self._step(stop):
                    time.sleep(_PAUSE)
                return stop.received
        finally:  # only where something went wrong is there one left
            for work in self.works.values():
                work.kill()
                self.studies.give_back(work.taken)

    def _step(self, stop: StopSignals) -> bool:
        """Look after everything once; whether all is over."""
        if stop.received and any(not work.stopped for work in self.works.values()):
            self.listener.stopping()
            for work in self.works.values():
                work.stop()
        for device, work in list(self.works.items()):
            if work.poll():
                del self.works[device]
                self._settle(work)
                self._looked = -math.inf  # its device is free
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
        """Take what waits, for every device that is free."""
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
        """The runs of a complete trial with the same setting: they would only be repeated."""
        for trial in self.studies.trials():
            if (trial.state, trial.method, trial.setting) == ("complete", taken.method, dict(taken.setting)):
                return [{**run, "reason": f"the same setting as {trial.name}"} for run in trial.runs]
        return []

    def _settle(self, work: Work) -> None:
        """Tell the study and the files of a trial that is over, or let it wait again where it was stopped."""
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
        """By the trials that ended here; no longer than there is time."""
        now = time.monotonic()
        left = [] if self.deadline is None else [max(self.deadline - now, 0.0)]
        if self.trials is not None:
            left.append((self.trials - results.done) * (now - self._began) / self._ended)
        return min(left) if left else None


def write_best(folder: Path, plan: Plan, results: Results) -> None:
    """Write best.yaml: the best setting with the best of its seeds."""
    best = results.best
    if best is None:
        return
    choose = min if results.lower_is_better else max
    runs = [run for run in results.runs if run["trial"] == best.trial]
    run = choose(runs, key=lambda run: run["score"])
    over = f"{best.mean:.4f} over the seeds {','.join(map(str, plan.seeds))}" if len(runs) > 1 else f"{best.mean:.4f}"
    told = f"The best of {folder.name}, {best.trial}: {plan.metric} {over}; with this seed {run['score']:.4f}"
    head = comment(told) + how_to_repeat(folder / BEST_FILE)
    write_bytes(folder / BEST_FILE, recipe_text(plan, best.method, best.setting, run["seed"], head).encode())


def devices(config: RunConfig, jobs: int | None) -> list[dict[str, str]]:
    """For each trial at once the environment of its processes: GPUs of its own, or its part of the cores.

    Args:
        config: of a run, which says whether to stay on the CPU and how many processes it wants.
        jobs: trials at once; one for each GPU, or one, without.
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
