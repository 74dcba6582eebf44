"""The trials of a sweep in an Optuna storage, shared by all workers, with one study per method.

A trial waits, is taken by one worker, and ends as complete, pruned or failed. Workers send heartbeats. If they stop, the
trial is queued again under the same name, so that it resumes in the same folder. Each method has its own study, so that
sampling and pruning compare settings of one method only, and every method gets the same number of trials.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_cli.errors import ConfigError, CraftError
from craft_cli.files import LOCK_FILE, locked
from craft_cli.sweeps.plan import Plan
from craft_cli.sweeps.space import Range
from craft_cli.tasks.metrics import lower_is_better

if TYPE_CHECKING:
    import optuna

HEARTBEAT = 10
"""Seconds between two heartbeats of a trial."""
GRACE = 60
"""Seconds without a heartbeat after which a worker counts as dead; on the same machine this is detected at once."""
_LOOK = 0.5
"""Seconds between two polls of a sweep whose trials are being queued."""
_BUSY = 100
"""Seconds to wait for an SQLite database that another worker has locked."""
_STARTUP_TRIALS = 5
"""Random trials of a method before TPE and pruning start."""


@dataclass(frozen=True)
class Taken:
    """A trial that this process is running.

    Attributes:
        name: its name, which its run folders start with; it stays the same if another worker takes the trial over.
        method: its method.
        setting: its settings.
        trial: the Optuna trial.
    """

    name: str
    method: str
    setting: Mapping[str, Any]
    trial: optuna.Trial


@dataclass(frozen=True)
class Tried:
    """A trial in the storage.

    Attributes:
        name: its name.
        method: its method.
        state: `waiting`, `running`, `complete`, `pruned` or `failed`.
        setting: its settings; empty before sampling.
        runs: records of its runs, one per seed.
    """

    name: str
    method: str
    state: str
    setting: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]


def import_optuna() -> Any:
    """Import Optuna and reduce its logging to errors.

    Raises:
        ConfigError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("craft sweep requires Optuna: pip install 'lora-craft[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Studies:
    """All trials of a sweep.

    Args:
        folder: folder of the sweep.
        plan: plan of the sweep.
        storage: URL of a database, or a file for SQLite.
        name: name of the sweep in this database.
    """

    def __init__(self, folder: Path, plan: Plan, storage: str | Path, name: str) -> None:
        self._optuna, self._plan, self._name = import_optuna(), plan, name
        self._lock = folder / LOCK_FILE
        self._storage = _connect(self._optuna, storage, self._wait_again)
        self._studies: dict[str, optuna.Study] = {}

    def claim(self, trials: int | None) -> None:
        """Create the sweep in the storage; only one worker can. After that, others can join.

        Raises:
            ConfigError: the storage already has a sweep of this name.
        """
        try:
            study = self._study(self._plan.methods[0], exists=False)
        except self._optuna.exceptions.DuplicatedStudyError:
            raise ConfigError(
                f"--storage already has a sweep '{self._name}': pass --resume to join it, or "
                "choose another --output-dir for a new sweep"
            ) from None
        study.set_user_attr("asked", trials)
        study.set_user_attr("plan", json.dumps(self._plan.record()))

    def open(self) -> None:
        """Load the studies, and create missing ones: the process that started the sweep may have been killed."""
        self._studies = {method: self._study(method, exists=True) for method in self._plan.methods}

    def _study(self, method: str, *, exists: bool) -> optuna.Study:
        study: optuna.Study = self._optuna.create_study(
            storage=self._storage,
            study_name=f"{self._name}/{method}",
            direction="minimize" if lower_is_better(self._plan.metric) else "maximize",
            pruner=_pruner(self._optuna, self._plan.pruner),
            load_if_exists=exists,
        )
        return study

    # -- the queue ------------------------------------------------------------------------------------------------------

    def queue(self, trials: int | None) -> None:
        """Queue this many trials in total, alternating between methods; without a number, one if none is waiting."""
        with locked(self._lock):
            there = {method: len(self._originals(study)) for method, study in self._studies.items()}
            if self._plan.sampler == "grid":
                for method, study in self._studies.items():
                    asked = [setting for its, setting in self._plan.settings() if its == method]
                    for setting in asked[there[method] :]:  # earlier ones were queued by a worker that was killed
                        study.enqueue_trial(setting, user_attrs={"queued": True})
            else:
                while sum(there.values()) < trials if trials else not self._waiting():
                    method = min(there, key=lambda method: there[method])
                    first = {} if there[method] else self._plan.start_of(method)
                    self._studies[method].enqueue_trial(first, user_attrs={"queued": True})
                    there[method] += 1
            for study in self._studies.values():  # lets other workers know that all trials are queued
                known = study.user_attrs
                if "plan" not in known:
                    study.set_user_attr("plan", json.dumps(self._plan.record()))
                if "trials" not in known or known["trials"] != trials:
                    study.set_user_attr("trials", trials)

    def take(self) -> Taken | None:
        """Take the next waiting trial; None if there is none."""
        with locked(self._lock):  # SQLite would let two workers take the same trial
            self._reclaim()
            waiting = self._waiting()
            if not waiting:
                return None
            _, _, method = waiting[0]
            study = self._studies[method]
            with _quiet():
                trial = study.ask()
            if not trial.user_attrs.get(
                "queued"
            ):  # a worker without this folder was faster, and Optuna created a new trial
                study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                return None
            self._storage.record_heartbeat(trial._trial_id)
            trial.set_user_attr("worker", _worker())
        number = int(trial.user_attrs.get("first", trial.number))
        study.sampler = _sampler(self._optuna, self._plan.sampler, number)
        setting = {name: self._suggest(trial, name, values) for name, values in self._plan.spaces[method].items()}
        return Taken(_name(method, number), method, setting, trial)

    def _suggest(self, trial: optuna.Trial, name: str, values: Any) -> Any:
        if not isinstance(values, Range):
            return trial.suggest_categorical(name, values)
        if values.whole:
            return trial.suggest_int(name, int(values.low), int(values.high), log=values.log)
        return values.rounded(trial.suggest_float(name, values.low, values.high, log=values.log))

    def _originals(self, study: optuna.Study) -> list[Any]:
        """Trials that do not continue another trial."""
        return [
            t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("queued") and "first" not in t.user_attrs
        ]

    def _waiting(self) -> list[tuple[int, int, str]]:
        """(number, position of the method, method) of all waiting trials, the next one first."""
        state = (self._optuna.trial.TrialState.WAITING,)
        return sorted(
            (trial.user_attrs.get("first", trial.number), place, method)
            for place, (method, study) in enumerate(self._studies.items())
            for trial in study.get_trials(deepcopy=False, states=state)
        )

    def running(self) -> bool:
        """Whether any worker is running a trial."""
        state = (self._optuna.trial.TrialState.RUNNING,)
        return any(study.get_trials(deepcopy=False, states=state) for study in self._studies.values())

    # -- running --------------------------------------------------------------------------------------------------------

    def lives(self, taken: Taken) -> None:
        """Send a heartbeat of a trial."""
        self._storage.record_heartbeat(taken.trial._trial_id)

    def runs(self, taken: Taken, runs: Sequence[Mapping[str, Any]]) -> None:
        """Record the state of its runs."""
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):  # another worker took it over
            taken.trial.set_user_attr("runs", list(runs))

    def should_prune(self, taken: Taken, evaluation: int, score: float) -> bool:
        """Report an evaluation; returns whether to prune the trial."""
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):  # another worker took it over
            if evaluation not in self._storage.get_trial(taken.trial._trial_id).intermediate_values:
                taken.trial.report(score, evaluation)
            return bool(taken.trial.should_prune())
        return False

    def end(self, taken: Taken, state: str, score: float | None = None) -> None:
        """Mark a trial as `complete`, `pruned` or `failed`."""
        study, states = self._studies[taken.method], self._optuna.trial.TrialState
        kind = {"complete": None, "pruned": states.PRUNED, "failed": states.FAIL}[state]
        study.tell(taken.trial, score if kind is None else None, state=kind, skip_if_finished=True)

    def give_back(self, taken: Taken) -> None:
        """Return a trial to the queue."""
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(taken.trial._trial_id, self._optuna.trial.TrialState.WAITING)

    # -- dead workers ---------------------------------------------------------------------------------------------------

    def _reclaim(self) -> None:
        """Requeue the trials of dead workers: those without a heartbeat, and those whose process is gone."""
        import psutil

        states = self._optuna.trial.TrialState
        for study in self._studies.values():
            with _quiet():
                self._optuna.storages.fail_stale_trials(study)
            for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
                if "worker" not in trial.user_attrs:  # killed before its first heartbeat, or just taking the trial
                    self._storage.record_heartbeat(trial._trial_id)
                    self._storage.set_trial_user_attr(trial._trial_id, "worker", "")
                host, _, process = str(trial.user_attrs.get("worker", "")).rpartition(":")
                if not process or host != socket.gethostname() or psutil.pid_exists(int(process)):
                    continue
                with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
                    self._storage.set_trial_state_values(trial._trial_id, states.FAIL)
                    self._wait_again(study, trial)

    def retry(self) -> None:
        """Requeue all failed trials."""
        with locked(self._lock):
            for study in self._studies.values():
                newest = {
                    t.user_attrs.get("first", t.number): t for t in study.get_trials() if t.user_attrs.get("queued")
                }
                for trial in newest.values():
                    if trial.state == self._optuna.trial.TrialState.FAIL:
                        trial.user_attrs.pop("runs", None)
                        self._wait_again(study, trial)

    def _wait_again(self, study: optuna.Study, trial: Any) -> None:
        """Queue an abandoned or failed trial again, with the same settings and name."""
        study.add_trial(
            self._optuna.trial.create_trial(
                state=self._optuna.trial.TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={"first": trial.number} | trial.user_attrs,
                system_attrs=trial.system_attrs,
            )
        )

    # -- results --------------------------------------------------------------------------------------------------------

    def trials(self) -> list[Tried]:
        """Every trial once, by method; an abandoned trial is represented by its continuation."""
        trials: dict[str, Tried] = {}
        for method, study in self._studies.items():
            for trial in study.get_trials(deepcopy=False):
                if not trial.user_attrs.get("queued"):
                    continue
                name = _name(method, trial.user_attrs.get("first", trial.number))
                state = {"fail": "failed"}.get(trial.state.name.lower(), trial.state.name.lower())
                fixed = trial.system_attrs.get("fixed_params", {}) if self._plan.sampler == "grid" else {}
                setting, space = fixed | trial.params, self._plan.spaces[method]
                order = {
                    key: values.rounded(setting[key]) if isinstance(values, Range) else setting[key]
                    for key, values in space.items()
                    if key in setting
                }
                trials[name] = Tried(name, method, state, order, trial.user_attrs.get("runs", []))
        methods = self._plan.methods
        return sorted(trials.values(), key=lambda trial: (methods.index(trial.method), len(trial.name), trial.name))

    def tests(self, method: str) -> dict[str, Any]:
        """The test results of a method's chosen setting; empty if there are none yet."""
        return dict(self._studies[method].user_attrs.get("test", {}))

    def write_tests(self, method: str, results: Mapping[str, Any]) -> None:
        """Save the test results of a method's chosen setting."""
        self._studies[method].set_user_attr("test", dict(results))


def find_plan(storage: str, name: str) -> tuple[Plan, int | None] | None:
    """The plan and the number of trials of an existing sweep in this storage.

    Waits until all trials are queued, or until none was queued for `GRACE` seconds because the starting process was killed.
    """
    optuna = import_optuna()
    connected, queued, since = _connect(optuna, storage, None), -1, time.monotonic()
    while True:
        studies = [s for s in optuna.get_all_study_summaries(connected) if s.study_name.startswith(f"{name}/")]
        known = next((s.user_attrs for s in studies if "plan" in s.user_attrs), None)
        if known is None:
            return None
        there = sum(study.n_trials for study in studies)
        if there != queued:
            queued, since = there, time.monotonic()
        if "trials" in known or time.monotonic() - since > GRACE:
            return Plan.of(json.loads(known["plan"])), known.get("trials", known.get("asked"))
        time.sleep(_LOOK)


def _connect(optuna: Any, storage: str | Path, stale: Any, *, again: bool = True) -> Any:
    from sqlalchemy.pool import QueuePool

    url = str(storage)
    if isinstance(storage, Path):  # a path may hold ?, #, % or {}, which are special in a URL
        url = "sqlite://"
        opened = partial(sqlite3.connect, storage, timeout=_BUSY, check_same_thread=False)
        settings: dict[str, Any] = {"creator": opened, "poolclass": QueuePool}
    elif url.startswith("sqlite"):
        settings = {"connect_args": {"timeout": _BUSY}}
    else:
        settings = {"pool_pre_ping": True}
    try:
        with _quiet():
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs=settings,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=stale,
            )
    except Exception as error:  # every database raises its own errors
        if (
            again
            and type(error).__module__.startswith(("sqlalchemy.exc", "optuna."))
            and "ArgumentError" not in repr(error)
        ):
            time.sleep(1)  # another worker may just have created the tables
            return _connect(optuna, storage, stale, again=False)
        reason = " ".join(str(error).split())[:200]
        raise CraftError(f"--storage: cannot be used: {reason}") from error


def _sampler(optuna: Any, kind: str, number: int) -> Any:
    """A sampler that depends only on the trial's number and earlier trials, so that a resumed sweep samples the same values."""
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=number, n_startup_trials=_STARTUP_TRIALS)
    return optuna.samplers.RandomSampler(seed=number)


def _pruner(optuna: Any, kind: str) -> Any:
    if kind == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS)
    return optuna.pruners.HyperbandPruner() if kind == "hyperband" else optuna.pruners.NopPruner()


def _name(method: str, number: int) -> str:
    return f"{method}-{number + 1:03d}"


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ignore Optuna's warnings that heartbeats are experimental and meant for its own loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
