"""Compare settings and methods over several seeds. Each run is a process; the Optuna studies are shared."""

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
"""Folder of sweeps without --output-dir, relative to the working folder."""
STORAGE_FILE = "study.db"
_WRITTEN = (PLAN_FILE, STORAGE_FILE, BEST_FILE, RESULTS_FILE, "table.csv", "trials.csv", BY_NUMBERS, BY_RATE)


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep.

    Attributes:
        settings: settings of all trials, by field name.
        recipe: settings of a recipe; `settings` override them.
        sets: values to try, such as `learning_rate=1e-3,3e-3`.
        seeds: seeds of each setting.
        trials: number of settings to sample.
        timeout: seconds after which no trial starts.
        sampler: `grid`, `random` or `tpe`.
        pruner: `none`, `median` or `hyperband`.
        storage: URL of a database. Default: SQLite in the sweep's folder.
        jobs: number of concurrent trials. Default: one per GPU.
        test_file: test rows on which the best setting of each method is scored at the end.
        output_dir: folder of the sweep. Default: `sweeps/TASK-MODEL-TIME`.
        cache_dir: cache folder for factors.
        trust_remote_code: run Python code from the model's repository; must be given again with `resume`.
        resume: resume or join the sweep in `output_dir`, or the latest sweep.
        retry_failed: with `resume`, retry the failed trials.
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
        """Flags of the runs that a recipe cannot hold; `cache_dir` can also come from the sweep's recipe."""
        factors = self.cache_dir or {**(self.recipe or {}), **(self.settings or {})}.get("cache_dir")
        trusted = ["--trust-remote-code"] if self.trust_remote_code else []
        return trusted + (["--cache-dir", str(Path(factors).expanduser().resolve())] if factors else [])

    def plan(self, former: Plan | None = None) -> Plan:
        """Make and check the plan; a previous plan completes what is not given."""
        if self.retry_failed and not self.resume:
            raise ConfigError("--retry-failed requires --resume")
        return make_plan(
            self.settings or {}, self.recipe or {}, parse_sets(self.sets), seeds=self.seeds, trials=self.trials,
            timed=self.timeout is not None, sampler=self.sampler, pruner=self.pruner, former=former,
        )  # fmt: skip


def sweep(asked: SweepOptions, listener: Listener | None = None) -> Results:
    """Train all settings of a grid, or sampled settings, with every seed, and compare them.

    Raises:
        ConfigError: an option is invalid, or differs from the sweep in this folder.
        CraftError: no setting was trained to the end.
        KeyboardInterrupt: Ctrl-C, after the running trials have saved their checkpoints.
        SystemExit: SIGTERM, after the running trials have saved their checkpoints; the code is 143.
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
        reason = next((row.reason for row in results.rows if row.reason), "no trial was started")
        raise CraftError(f"{folder}: no setting was trained to the end: {reason}")
    return results


def rehearse(asked: SweepOptions, listener: Listener | None = None) -> dict[str, Any]:
    """Dry run of a sweep: its trials with their parameters and the estimated time, from one real step per trial.

    Nothing is written. For a sampled sweep, one trial per method is measured, and the spaces are returned.

    Raises:
        ConfigError: an option is invalid.
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


# -- folder and storage ----------------------------------------------------------------------------------------------------


def _open(asked: SweepOptions, listener: Listener) -> tuple[Path, Header, Studies]:
    """Start or resume a sweep, with its trials queued."""
    folder = _folder(asked)
    if asked.resume and folder and not is_sweep(folder) and asked.storage:
        _join(asked.storage, folder)
    if asked.resume and folder and is_sweep(folder):
        header = _former(asked, folder)
        _check_test_rows(asked, header.plan, listener)
        with locked(folder / LOCK_FILE):  # the starting process may be creating the database
            studies = Studies(folder, header.plan, _storage(asked, folder), header.name)
            studies.open()
    else:
        if asked.resume:
            listener.noticed(f"nothing to resume in {folder or SWEEPS}, starting from the beginning")
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
    """The folder given, or that of the latest sweep to resume; None for a new sweep."""
    if asked.output_dir:
        return Path(asked.output_dir).expanduser()
    found = [path for path in SWEEPS.glob("*") if is_sweep(path)] if asked.resume else []
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _storage(asked: SweepOptions, folder: Path) -> str | Path:
    return asked.storage or folder.resolve() / STORAGE_FILE


def _wanted(plan: Plan, asked: SweepOptions) -> int | None:
    return trials_wanted(plan, asked.trials, asked.timeout is not None)


def _begin(folder: Path, header: Header, storage: str | Path) -> Studies:
    """Create the folder and the studies; only one process can."""
    if is_sweep(folder):
        raise ConfigError(f"{folder} already has a sweep; pass --resume to resume it, or choose another --output-dir")
    _check_folder(folder)
    # Opened first, so that an unusable database leaves no folder behind.
    studies = Studies(folder, header.plan, storage, header.name) if header.elsewhere else None
    make_folder(folder)
    with locked(folder / LOCK_FILE):
        if is_sweep(folder):
            raise ConfigError(f"{folder} was just started by another process; pass --resume to join it")
        write_marker(folder, SWEEP, _WRITTEN)
        if studies:
            studies.claim(header.trials)
        write_header(folder, header)  # written first, so that a sweep killed after this can be resumed
        studies = studies or Studies(folder, header.plan, storage, header.name)
        studies.open()
    return studies


def _join(storage: str, folder: Path) -> None:
    """Join a sweep with this folder's name in the storage, from a local folder."""
    name = folder.resolve().name
    found = find_plan(storage, name)
    if found is None:
        return
    _check_folder(folder)
    make_folder(folder)
    write_marker(folder, SWEEP, _WRITTEN)
    write_header(folder, Header(name, found[0], True, found[1]))


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot become a sweep.

    Raises:
        FileError: the folder is not empty, is a file, or its name is not UTF-8.
    """
    check_place(folder, SWEEP, overwrite=True)
    if problems := no_utf8("output_dir", str(folder.resolve())):
        raise FileError(problems[0])


def _former(asked: SweepOptions, folder: Path) -> Header:
    """Open the sweep in a folder, if it has the requested plan; the number of trials may be increased."""
    header = read_header(folder)
    if header.elsewhere and not asked.storage:
        raise ConfigError(f"--resume: the trials of {folder} are in a database; pass its --storage")
    if asked.storage and not header.elsewhere:
        raise ConfigError(f"--resume: the trials of {folder} are in its own {STORAGE_FILE}; remove --storage")
    differing = header.plan.differences(asked.plan(header.plan))
    if differing:
        raise ConfigError(
            f"--resume: {folder} has a different plan: {', '.join(differing)}; "
            "use the original options, or choose another --output-dir"
        )
    if asked.trials and header.trials and asked.trials < header.trials:
        raise ConfigError(
            f"--trials {asked.trials}: {folder} already has {header.trials} trials; pass at least this many"
        )
    if asked.trials:
        header = replace(header, trials=asked.trials)
        write_header(folder, header)
    if header.trials is None and asked.timeout is None and not header.elsewhere:
        raise ConfigError(f"--resume: {folder} has a time limit only; pass --timeout again, or --trials")
    return header


def _new_folder(plan: Plan) -> Path:
    config = _first_run(plan)
    name, number = f"{config.task or 'own'}-{Path(config.model).name}-{datetime.now():%Y%m%d-%H%M%S}", 1
    while (SWEEPS / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return SWEEPS / (name if number == 1 else f"{name}-{number}")


# -- test rows -------------------------------------------------------------------------------------------------------------


def _check_test_rows(asked: SweepOptions, plan: Plan, listener: Listener) -> None:
    """Check the test rows before training: they must be readable and differ from training and validation rows.

    Raises:
        ConfigError: there are no test rows, or all are also training or validation rows.
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
        raise ConfigError(f"--test-file: {file} has no labels; pass a labeled file")
    used = {texts for one in loaded for split in one.splits.values() for texts in split.texts}
    known = sum(texts in used for texts in test.texts)
    overlap = f"--test-file: {known:,} of the {len(test):,} rows of {file} are also training or validation rows"
    if known == len(test):
        raise ConfigError(f"{overlap}; pass other rows")
    if known:
        listener.noticed(overlap)


def _score_on_test_rows(work: Sweep, file: Path, *, trusted: bool) -> None:
    """Score the runs of the best setting of each method once."""
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
