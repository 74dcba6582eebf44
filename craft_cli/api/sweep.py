"""Use-case: compare settings and methods over seeds. Trials are processes; the studies that they belong to are shared."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from craft_cli.config import no_utf8
from craft_cli.data.sources import TRAIN, VALIDATION, DataSource
from craft_cli.errors import ConfigError, CraftError, FileError
from craft_cli.files import LOCK_FILE, SWEEP, check_place, locked, make_folder, sha256_of, write_marker
from craft_cli.sweeps.loop import BEST_FILE, Listener, Sweep, devices
from craft_cli.sweeps.pictures import BY_NUMBERS, BY_RATE, draw
from craft_cli.sweeps.plan import PLAN_FILE, Header, Plan, make_plan, read_header, shown, trials_wanted, write_header
from craft_cli.sweeps.space import parse_sets
from craft_cli.sweeps.studies import Studies, find_plan, import_optuna
from craft_cli.sweeps.table import RESULTS_FILE, Results, is_sweep, write_tables
from craft_cli.sweeps.work import RUNS, one_step, run_name
from craft_cli.training.signals import end_by

SWEEPS = Path("sweeps")
"""Where sweeps without an output folder of their own lie, from the working folder."""
STORAGE_FILE = "study.db"
_WRITTEN = (PLAN_FILE, STORAGE_FILE, BEST_FILE, RESULTS_FILE, "table.csv", "trials.csv", BY_NUMBERS, BY_RATE)


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep is asked for; what may be left out is chosen.

    Attributes:
        settings: of all trials, by field name.
        recipe: the same, below them.
        sets: what is tried: `learning_rate=1e-3,3e-3` each.
        seeds: of each setting.
        trials: how many settings are sampled.
        timeout: seconds after which no trial begins.
        sampler: `grid`, `random` or `tpe`.
        pruner: `none`, `median` or `hyperband`.
        storage: URL of a database; SQLite in the sweep's folder without.
        jobs: trials at once; one for each GPU without.
        test_file: rows on which the best of each method is scored at the end.
        output_dir: folder of the sweep; `sweeps/TASK-MODEL-TIME` without.
        cache_dir: of the factors.
        trust_remote_code: the runs run Python code that comes with the model; said again with `resume`.
        resume: go on with the sweep in `output_dir`, or with the latest, or take part in it.
        retry_failed: with `resume`: the trials that failed are tried again.
    """

    settings: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    sets: Sequence[str] = ()
    seeds: Sequence[int] | None = None
    trials: int | None = None
    timeout: float | None = None
    sampler: str | None = None
    pruner: str | None = None
    storage: str | None = None
    jobs: int | None = None
    test_file: str | None = None
    output_dir: str | None = None
    cache_dir: str | None = None
    trust_remote_code: bool = False
    resume: bool = False
    retry_failed: bool = False

    @property
    def flags(self) -> list[str]:
        """What the runs are told by flags, as no recipe of theirs holds it; where the factors lie the sweep's may say."""
        factors = self.cache_dir or {**(self.recipe or {}), **(self.settings or {})}.get("cache_dir")
        trusted = ["--trust-remote-code"] if self.trust_remote_code else []
        return trusted + (["--cache-dir", str(Path(factors).expanduser().resolve())] if factors else [])

    def plan(self, former: Plan | None = None) -> Plan:
        """What is asked for, checked; what is not given is as in a former plan."""
        if self.retry_failed and not self.resume:
            raise ConfigError("--retry-failed needs --resume")
        return make_plan(
            self.settings or {}, self.recipe or {}, parse_sets(self.sets), seeds=self.seeds, trials=self.trials,
            timed=self.timeout is not None, sampler=self.sampler, pruner=self.pruner, former=former,
        )  # fmt: skip


def sweep(asked: SweepOptions, listener: Listener | None = None) -> Results:
    """Train every setting of a grid, or sampled ones, with every seed, and compare them.

    Raises:
        ConfigError: something asked for cannot be, or is not what the sweep in this folder compares.
        CraftError: no setting was trained to its end.
        KeyboardInterrupt: Ctrl-C, after the running trials have written their checkpoints.
        SystemExit: SIGTERM, likewise; the code is 143.
    """
    began = time.monotonic()
    import_optuna()
    listener = listener or Listener()
    folder, header, studies = _open(asked, listener)
    plan = header.plan
    work = Sweep(
        folder, plan, studies, header.trials, devices(_first_run(plan), asked.jobs), listener,
        None if asked.timeout is None else began + asked.timeout, asked.flags,
    )  # fmt: skip
    stopped = work.run()
    results = work.results()
    write_tables(folder, results)
    draw(folder, results)
    if stopped:
        listener.interrupted(folder)
        raise end_by(stopped)
    if asked.test_file:
        _score_on_test_rows(work, Path(asked.test_file).expanduser().resolve(), trusted=asked.trust_remote_code)
        results = work.results()
        write_tables(folder, results)
    if results.best is None:
        reason = next((row.reason for row in results.rows if row.reason), "none was begun")
        raise CraftError(f"{folder}: no setting was trained to its end: {reason}")
    return results


def rehearse(asked: SweepOptions, listener: Listener | None = None) -> dict[str, Any]:
    """What a sweep would try: its trials with their numbers, and the time, from one real step each. Nothing is written.

    Of a sampled sweep the first trial of each method is tried, and the spaces are told.

    Raises:
        ConfigError: something asked for cannot be.
    """
    listener = listener or Listener()
    plan = asked.plan()
    _check_test_rows(asked, plan, listener)
    settings = (
        plan.settings() if plan.sampler == "grid" else [(method, plan.start_of(method)) for method in plan.methods]
    )
    places = devices(_first_run(plan), asked.jobs)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (method, setting) in enumerate(settings):
            listener.tried(number, len(settings))
            found = one_step(Path(folder), plan, method, setting, asked.flags, places[0])
            rows.append({"method": method, "setting": setting, **found})
    trials = trials_wanted(plan, asked.trials, asked.timeout is not None)
    times = [row["seconds"] for row in rows if row["seconds"] is not None]
    return {
        "sampler": plan.sampler,
        "metric": plan.metric,
        "seeds": plan.seeds,
        "trials": trials,
        "jobs": len(places),
        "spaces": {m: {name: shown(values) for name, values in space.items()} for m, space in plan.spaces.items()},
        "rows": rows,
        "seconds": trials * len(plan.seeds) * fmean(times) / len(places) if trials and times else None,
    }


def _first_run(plan: Plan) -> Any:
    method = plan.methods[0]
    return plan.run(method, plan.settings()[0][1] if plan.sampler == "grid" else plan.start_of(method), plan.seeds[0])


# -- where a sweep lies ----------------------------------------------------------------------------------------------------


def _open(asked: SweepOptions, listener: Listener) -> tuple[Path, Header, Studies]:
    """The sweep that begins, or the one that goes on, with its trials queued."""
    folder = _folder(asked)
    if asked.resume and folder and not is_sweep(folder) and asked.storage:
        _join(asked.storage, folder)
    if asked.resume and folder and is_sweep(folder):
        header = _former(asked, folder)
        _check_test_rows(asked, header.plan, listener)
        with locked(folder / LOCK_FILE):  # who began it may just be making its database
            studies = Studies(folder, header.plan, _storage(asked, folder), header.name)
            studies.open()
    else:
        if asked.resume:
            listener.noticed(f"nothing to resume in {folder or SWEEPS}: starting from the beginning")
        plan = asked.plan()
        _check_test_rows(asked, plan, listener)
        folder = folder or _new_folder(plan)
        header = Header(folder.resolve().name, plan, bool(asked.storage), _wanted(plan, asked))
        studies = _begin(folder, header, _storage(asked, folder))
    studies.queue(header.trials)
    if asked.retry_failed:
        studies.retry()
    return folder, header, studies


def _folder(asked: SweepOptions) -> Path | None:
    """The folder given, or of the latest sweep to go on with; None for a new one."""
    if asked.output_dir:
        return Path(asked.output_dir).expanduser()
    found = [path for path in SWEEPS.glob("*") if is_sweep(path)] if asked.resume else []
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _storage(asked: SweepOptions, folder: Path) -> str | Path:
    return asked.storage or folder.resolve() / STORAGE_FILE


def _wanted(plan: Plan, asked: SweepOptions) -> int | None:
    return trials_wanted(plan, asked.trials, asked.timeout is not None)


def _begin(folder: Path, header: Header, storage: str | Path) -> Studies:
    """Make the folder and the studies; only one process can."""
    if is_sweep(folder):
        raise ConfigError(f"{folder} is a sweep already: --resume goes on with it; or choose another --output-dir")
    _check_folder(folder)
    # A database that cannot be used leaves nothing behind.
    studies = Studies(folder, header.plan, storage, header.name) if header.elsewhere else None
    make_folder(folder)
    with locked(folder / LOCK_FILE):
        if is_sweep(folder):
            raise ConfigError(f"{folder} was just begun by another process: --resume takes part in it")
        write_marker(folder, SWEEP, _WRITTEN)
        if studies:
            studies.claim(header.trials)
        write_header(folder, header)  # first: a sweep that is killed from here on goes on
        studies = studies or Studies(folder, header.plan, storage, header.name)
        studies.open()
    return studies


def _join(storage: str, folder: Path) -> None:
    """Take part in a sweep of this folder's name that is in the storage, from a folder of this machine's own."""
    name = folder.resolve().name
    found = find_plan(storage, name)
    if found is None:
        return
    _check_folder(folder)
    make_folder(folder)
    write_marker(folder, SWEEP, _WRITTEN)
    write_header(folder, Header(name, found[0], True, found[1]))


def _check_folder(folder: Path) -> None:
    """Refuse to make a sweep of a folder that holds something else.

    Raises:
        FileError: it does, it is a file, or its name is no UTF-8.
    """
    check_place(folder, SWEEP, overwrite=True)
    if problems := no_utf8("output_dir", str(folder.resolve())):
        raise FileError(problems[0])


def _former(asked: SweepOptions, folder: Path) -> Header:
    """The sweep in a folder, if it is the one asked for; more trials may be."""
    header = read_header(folder)
    if header.elsewhere and not asked.storage:
        raise ConfigError(f"--resume: the trials of {folder} are in a database: give its --storage")
    if asked.storage and not header.elsewhere:
        raise ConfigError(f"--resume: the trials of {folder} are in its own {STORAGE_FILE}: leave --storage out")
    differing = header.plan.differences(asked.plan(header.plan))
    if differing:
        raise ConfigError(
            f"--resume: {folder} cannot go on with another sweep: {', '.join(differing)}; "
            "give the former ones, or choose another --output-dir"
        )
    if asked.trials and header.trials and asked.trials < header.trials:
        raise ConfigError(
            f"--trials {asked.trials}: {folder} was asked for {header.trials} before; give as many or more"
        )
    if asked.trials:
        header = replace(header, trials=asked.trials)
        write_header(folder, header)
    if header.trials is None and asked.timeout is None and not header.elsewhere:
        raise ConfigError(f"--resume: {folder} ends by time: pass --timeout again, or --trials")
    return header


def _new_folder(plan: Plan) -> Path:
    config = _first_run(plan)
    name, number = f"{config.task or 'own'}-{Path(config.model).name}-{datetime.now():%Y%m%d-%H%M%S}", 1
    while (SWEEPS / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return SWEEPS / (name if number == 1 else f"{name}-{number}")


# -- test rows -------------------------------------------------------------------------------------------------------------


def _check_test_rows(asked: SweepOptions, plan: Plan, listener: Listener) -> None:
    """Refuse test rows that cannot be read, or are trained or chosen on, before anything is trained.

    Raises:
        ConfigError: there are none, or all of them are.
        DataError: they cannot be read.
    """
    from craft_cli.tasks.splits import load_splits

    if not asked.test_file:
        return
    file = Path(asked.test_file).expanduser()
    if not file.is_file():
        raise ConfigError(f"--test-file: {file}: no such file")
    config = _first_run(plan)
    sources = [DataSource.of(config)]
    for name in {path for space in plan.having("train_file") for path in space["train_file"]}:  # type: ignore[union-attr]
        sources.append(replace(sources[0], train_file=name))
    loaded = [load_splits(source, [TRAIN, VALIDATION]) for source in sources]
    test_source = replace(
        sources[0], validation_file=str(file), validation_share=None, data_dir=None, train_file=None, dataset_name=None
    )
    (test,) = load_splits(test_source, [VALIDATION], loaded[0].task).splits.values()
    if test.labels is None:
        raise ConfigError(f"--test-file: {file} has no labels")
    used = {texts for one in loaded for split in one.splits.values() for texts in split.texts}
    known = sum(texts in used for texts in test.texts)
    told = f"--test-file: {known:,} of the {len(test):,} rows of {file} are among those that are trained or chosen on"
    if known == len(test):
        raise ConfigError(f"{told}; give other ones")
    if known:
        listener.noticed(told)


def _score_on_test_rows(work: Sweep, file: Path, *, trusted: bool) -> None:
    """Score the runs of the best setting of each method, once."""
    from craft_cli.api.evaluate import evaluate

    plan, source = work.plan, DataSource(validation_file=str(file))
    content = sha256_of(file)
    for row in [row for row in work.results().rows if row.chosen]:
        known = work.studies.tests(row.method)
        if (known.get("trial"), known.get("file"), known.get("sha256")) == (row.trial, str(file), content):
            continue
        runs = {seed: work.folder / RUNS / run_name(row.trial, seed) for seed in plan.seeds}
        if not all(run.is_dir() for run in runs.values()):
            work.listener.noticed(
                f"--test-file: the runs of {row.trial} are not in {work.folder}, but on another machine"
            )
            continue
        use_cpu = plan.run(row.method, row.setting, plan.seeds[0]).use_cpu
        scores = {
            str(seed): evaluate(run, source=source, use_cpu=use_cpu, trust_remote_code=trusted).metrics[plan.metric]
            for seed, run in runs.items()
        }
        if not all(map(math.isfinite, scores.values())):
            work.listener.noticed(f"--test-file: the {plan.metric} of {row.trial} on {file} is not finite")
            continue
        work.studies.write_tests(
            row.method, {"trial": row.trial, "file": str(file), "sha256": content, "scores": scores}
        )
