"""Run folders: what lies where, and which one is the latest.

recipe.yaml           the resolved configuration; running it again repeats the run
metrics.jsonl         a line for each logged update and each evaluation
training_curve.png
adapter/              the best adapter
all_results.json      the summary
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from craft_cli.attached import CONFIG_FILE
from craft_cli.errors import FileError
from craft_cli.files import cannot_write, check_free, read_json, write_bytes, write_json

RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path

    @property
    def adapter(self) -> Path:
        """Folder of the best adapter."""
        return self.path / "adapter"

    @property
    def curve(self) -> Path:
        """Picture of loss and metrics."""
        return self.path / "training_curve.png"

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        """Write recipe.yaml."""
        import yaml

        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        write_bytes(self.path / "recipe.yaml", f"# craft train --recipe {self.path / 'recipe.yaml'}\n{text}".encode())

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise cannot_write(path, error) from error

    def write_results(self, results: dict[str, Any]) -> None:
        """Write all_results.json."""
        write_json(self.path / "all_results.json", results)

    def results(self) -> dict[str, Any]:
        """What all_results.json says; empty for a run that did not end."""
        path = self.path / "all_results.json"
        return read_json(path) if path.is_file() else {}

    def is_run(self) -> bool:
        """Whether this is a run folder at all."""
        return (self.path / "recipe.yaml").is_file()


def start_run(output_dir: str | None, label: str, *, overwrite: bool) -> Run:
    """Make the folder of a new run and point `runs/latest` to it.

    Args:
        output_dir: the folder; `runs/LABEL-TIME` without.
        label: task and model, for the name.
        overwrite: empty a folder that is not empty. Only a run folder is emptied, nothing else.

    Raises:
        FileError: the folder is taken or cannot be made.
    """
    if output_dir:
        run = check_output(output_dir, overwrite=overwrite)
    else:
        run = Run(_free_name(RUNS / f"{label}-{datetime.now():%Y%m%d-%H%M%S}"))
    path = run.path
    try:
        if path.is_dir():
            _empty(path)
        path.mkdir(parents=True, exist_ok=True)
        _point_latest(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    return run


def check_output(output_dir: str, *, overwrite: bool) -> Run:
    """The run that may be made in this folder: it is empty, or may be overwritten and holds a run.

    Raises:
        FileError: the folder is taken.
    """
    run = Run(Path(output_dir).expanduser())
    check_free(run.path, overwrite=overwrite)
    if run.path.is_dir() and any(run.path.iterdir()) and not run.is_run():
        raise FileError(
            f"{run.path} is not empty and is no run of craft's: --overwrite does not touch it; choose another"
        )
    return run


def find_run(path: str | None) -> Path:
    """The path given, or the latest run.

    Raises:
        FileError: there is no latest run.
    """
    if path is not None:
        return Path(path).expanduser()
    latest = RUNS / "latest"
    if not latest.is_dir():
        raise FileError(f"no run yet below {RUNS.resolve()}: train one first, or give a path")
    return Path(os.path.relpath(latest.resolve()))


def find_adapter(path: Path) -> Path | None:
    """The adapter folder at a path: of a run, or itself; None for anything else.

    Raises:
        FileError: a run without an adapter.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    if Run(path).is_run():
        if not (Run(path).adapter / CONFIG_FILE).is_file():
            raise FileError(f"{path} is a run without an adapter: it stopped before its first evaluation")
        return Run(path).adapter
    return None


def _free_name(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def _empty(folder: Path) -> None:
    import shutil

    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _point_latest(path: Path) -> None:
    RUNS.mkdir(exist_ok=True)
    link = RUNS / f".latest.{os.getpid()}"
    with contextlib.suppress(OSError):  # a file system without symbolic links has no latest run
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(path.resolve(), RUNS.resolve()), target_is_directory=True)
        os.replace(link, RUNS / "latest")
