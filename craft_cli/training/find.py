"""Find a run: the one given, the latest, or those in a folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from craft_cli.errors import FileError, listed
from craft_cli.models.hub import local_path
from craft_cli.training.run import RUNS, Run

_RESULTS = "all_results.json"
"""Summary file that only a finished run has."""


def find_run(path: str | None) -> Path:
    """The path given, or the latest run; if `runs/latest` is missing or broken, the newest finished run.

    Raises:
        FileError: there is no run.
        ModelError: the argument cannot be a path.
    """
    if path is not None:
        return local_path(path)
    latest = _latest()
    if latest is not None:
        return latest
    there = runs_below(RUNS)
    finished = [run for run in there if (run.path / _RESULTS).is_file()]
    if finished:
        return max(finished, key=lambda run: (run.path / _RESULTS).stat().st_mtime).path
    if there:
        raise FileError(f"no run in {RUNS.resolve()} is finished; pass one of them: {_named(there)}")
    raise FileError(f"no run in {RUNS.resolve()} yet; train one first, or pass a path")


def runs_below(folder: Path) -> list[Run]:
    """The runs directly in a folder, the most recently started or resumed last."""
    runs = [Run(path) for path in folder.iterdir() if not path.is_symlink()] if folder.is_dir() else []
    found = [run for run in runs if run.is_run()]
    return sorted(found, key=lambda run: ((run.path / "recipe.yaml").stat().st_mtime, run.path))


def _named(runs: Sequence[Run]) -> str:
    return listed([shlex.quote(str(run.path)) for run in reversed(runs)], 5)


def _latest(runs: Path = RUNS) -> Path | None:
    """The folder that `runs/latest` points to, from the working folder; None if it is missing."""
    link = runs / "latest"
    return Path(os.path.relpath(link.resolve())) if link.is_dir() else None


def resumed_run(output_dir: str | None, runs: Path = RUNS) -> Run:
    """The run to resume: the one given, or the latest."""
    return Run(Path(output_dir).expanduser() if output_dir else _latest(runs) or runs / "latest", runs)


def nothing_to_resume(run: Run) -> str:
    """The error if `--resume` finds no run, with the runs that exist."""
    there = [other for other in runs_below(run.runs) if not (other.path / _RESULTS).is_file()]
    named = f", such as one of these unfinished runs: {_named(there)}" if there else ""
    return f"--resume: there is no run in {run.path}; pass its folder as --output-dir{named}"
