"""Run folders: their files, and the link to the latest run.

recipe.yaml           the resolved configuration; running it again repeats the run
metrics.jsonl         one line per logged update and per evaluation
training_curve.png
adapter/              the best adapter
checkpoints/step-N/   checkpoints for `--resume`; each is an adapter folder plus the training state
all_results.json      the summary; only a finished run has one
.craft.json           the list of files that craft wrote, written first

Only files that craft wrote are deleted or replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from craft_cli.config import how_to_repeat, load_recipe
from craft_cli.errors import FileError
from craft_cli.files import (
    ADAPTER,
    CHECKPOINT,
    LOCK_FILE,
    RUN,
    Busy,
    cannot_write,
    check_place,
    delete_folder,
    hidden,
    holds_something,
    is_kind,
    locked,
    make_folder,
    quoted,
    read_content,
    read_json,
    read_marker,
    steadily,
    tidied,
    turn,
    write_bytes,
    write_json,
    write_marker,
)
from craft_cli.methods.adapter_folder import BESIDE, CONFIG_FILE, adapter_at

RUNS = Path("runs")
"""Folder of runs without --output-dir and of the link `latest`, relative to the working folder."""
_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
_WRITTEN = ("all_results.json", "metrics.jsonl", "recipe.yaml", "samples.jsonl", "training_curve.png")
_TRACKERS = ("tensorboard/**/events.out.tfevents.*", "tensorboard/**/hparams.yml")
"""Folder of tensorboard, which chooses its own file names."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: path of the folder.
        runs: folder with the link to the latest run.
    """

    path: Path
    runs: Path = RUNS

    @property
    def adapter(self) -> Path:
        """Folder of the best adapter."""
        return self.path / BESIDE

    @property
    def curve(self) -> Path:
        """Picture of loss and metrics."""
        return self.path / "training_curve.png"

    def start(self, recipe: dict[str, Any]) -> None:
        """Start a run: delete the files of a previous training and point `runs/latest` here. `being_trained` must hold the folder.

        Args:
            recipe: settings of the run.

        Raises:
            FileError: the folder cannot be written.
        """
        try:
            if not self.is_ours():
                write_marker(self.path, RUN, _WRITTEN)
            self._clear()
            self.write_recipe(recipe)
            self._point_latest()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def go_on(self, recipe: dict[str, Any]) -> None:
        """Mark the run as unfinished, with these settings, and as the latest. `being_trained` must hold the folder.

        The rows of an update do not change on resume, so the recipe keeps the original data and batch settings.

        Raises:
            FileError: the folder cannot be written.
        """
        try:
            (self.path / "all_results.json").unlink(missing_ok=True)
            former = self.recipe()
            kept = {name: former[name] for name in _SIZES if name in former}
            self.write_recipe({n: value for n, value in recipe.items() if n not in _SIZES or n in kept} | kept)
            self._point_latest()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _clear(self) -> None:
        """Delete the files of a previous training."""
        for name in _WRITTEN:
            (self.path / name).unlink(missing_ok=True)
        for folder in self._folders():
            delete_folder(folder)
        for pattern in _TRACKERS:
            for file in self.path.glob(pattern):
                file.unlink()
        for folder in (self.checkpoints, *sorted(self.path.glob("tensorboard/**/"), reverse=True)):
            with contextlib.suppress(OSError):  # it holds files of the user's
                folder.rmdir()

    def _folders(self) -> list[Path]:
        """Folders that a training writes."""
        return [path for path in (self.adapter, *self.checkpoints.glob("step-*")) if path.is_dir()]

    def check_room(self) -> None:
        """Refuse to train if files of the user's are in the way.

        Raises:
            FileError: a file or folder that craft did not write is in the way.
        """
        for folder in self._folders():
            if holds_something(folder) and not is_kind(folder, ADAPTER if folder == self.adapter else CHECKPOINT):
                raise FileError(f"{folder} is in the way and was not written by craft; move it elsewhere")
        files = [self.path / name for name in _WRITTEN]
        odd = [path for path in files if path.is_symlink() or path.is_dir()]
        odd += [path for path in (self.adapter, self.checkpoints) if os.path.lexists(path) and not path.is_dir()]
        if odd:
            raise FileError(f"{odd[0]} is in the way and was not written by craft; move it elsewhere")

    def _point_latest(self) -> None:
        """Make `runs/latest` a link to this run."""
        self.runs.mkdir(exist_ok=True)
        latest = self.runs / "latest"
        if latest.exists() and not latest.is_symlink():  # a file of the user's
            return
        link = hidden(latest, "part")
        with contextlib.suppress(OSError), turn(self.runs):  # without symbolic links there is no latest run
            link.symlink_to(os.path.relpath(self.path.resolve(), self.runs.resolve()), target_is_directory=True)
            os.replace(link, latest)

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        """Write recipe.yaml."""
        import yaml

        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        path = self.path / "recipe.yaml"
        write_bytes(path, (how_to_repeat(path) + text).encode())

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """The log file, with one line per logged update and per evaluation."""
        return self.path / "metrics.jsonl"

    @contextlib.contextmanager
    def being_trained(self) -> Iterator[None]:
        """Lock the folder for one training; the system releases the lock when the process ends, for any reason.

        Raises:
            FileError: another process is training in the folder, or it cannot be created.
        """
        make_folder(self.path)
        with contextlib.ExitStack() as held:
            try:  # another process may be checking whether it is running
                held.enter_context(locked(self.path / LOCK_FILE, timeout=0.3))
            except Busy:
                raise FileError(
                    f"{self.path} is being trained by another process; wait until it ends, or choose another --output-dir"
                ) from None
            except OSError as error:
                raise cannot_write(self.path / LOCK_FILE, error) from error
            for folder in (self.path, self.checkpoints):
                if folder.is_dir():
                    with tidied(folder):
                        pass
            yield

    def is_running(self) -> bool:
        """Whether a process is training in it now."""
        if not (self.path / LOCK_FILE).is_file():
            return False
        try:
            with locked(self.path / LOCK_FILE, timeout=0):
                return False
        except Busy:
            return True
        except OSError:  # another user's folder
            return False

    def state(self) -> str:
        """`running`, `finished`, or `interrupted at step N`, with the last known step."""
        if self.is_running():
            return "running"
        if self.results():
            return "finished"
        saved = [int(path.name[5:]) for path in checkpoints(self)]
        return f"interrupted at step {max([line['step'] for line in self.metrics()] + saved, default=0)}"

    def recipe(self) -> dict[str, Any]:
        """The settings in recipe.yaml; empty if it does not exist yet."""
        path = self.path / "recipe.yaml"
        return load_recipe(str(path)) if path.is_file() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; incomplete or damaged lines are skipped."""
        return _lines(self.metrics_file)

    @property
    def samples_file(self) -> Path:
        """The file of generated answers, with one line per answer and evaluation."""
        return self.path / "samples.jsonl"

    def samples(self) -> list[dict[str, Any]]:
        """The lines of samples.jsonl, read as `metrics` are."""
        return _lines(self.samples_file)

    def append(self, file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines to metrics.jsonl or samples.jsonl."""
        try:
            with open(file, "a", encoding="utf-8") as opened:
                opened.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise cannot_write(file, error) from error

    def write_results(self, results: dict[str, Any]) -> None:
        """Write all_results.json."""
        write_json(self.path / "all_results.json", results)

    def results(self) -> dict[str, Any]:
        """Read all_results.json; empty for an unfinished run.

        Raises:
            FileError: the file is damaged.
        """
        path = self.path / "all_results.json"
        if not path.is_file():
            return {}
        content = read_json(path)
        try:
            _Results.model_validate(content)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise FileError(f"{path} is damaged: {quoted(where)}: {error.errors()[0]['msg']}") from None
        return content

    def is_run(self) -> bool:
        """Whether this looks like a run folder, even without a marker."""
        return (self.path / "recipe.yaml").is_file()

    def is_ours(self) -> bool:
        """Whether craft started a run here, which can be resumed or overwritten."""
        return is_kind(self.path, RUN)


class _Results(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    metrics: dict[str, float] | None = None
    baselines: dict[str, dict[str, float]] = {}
    tables: dict[str, Any] = {}
    examples: int = 0
    updates: int = 0
    epoch: float = 0.0


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file that belong to a step of the training."""
    lines = []
    if file.is_file():
        for line in read_content(file).decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(line)
                if isinstance(found, dict) and type(found.get("step")) is int and _plain(found):
                    lines.append(found)
    return lines


def _plain(line: dict[str, Any]) -> bool:
    return all(value is None or isinstance(value, (int, float, str)) for value in line.values())


def checkpoints(run: Run) -> list[Path]:
    """The checkpoints of a run, newest first."""
    paths = [path for path in run.checkpoints.glob("step-*") if path.name[5:].isdigit() and not _is_emptied(path)]
    return sorted(paths, key=lambda path: -int(path.name[5:]))


def _is_emptied(checkpoint: Path) -> bool:
    """Whether only files of the user's are left in it."""
    marker = read_marker(checkpoint)
    return marker is not None and not marker.files


def new_run(output_dir: str | None, label: str, runs: Path = RUNS, *, overwrite: bool) -> Run:
    """The folder of a new run.

    Args:
        output_dir: the folder. Default: `runs/LABEL-TIME`.
        label: task and model, for the name.
        runs: folder of runs.
        overwrite: whether the folder may hold a run, which `start` then deletes.

    Raises:
        FileError: the folder is not empty.
    """
    if output_dir:
        return usable_output(output_dir, runs, overwrite=overwrite)
    name, number = f"{label}-{datetime.now():%Y%m%d-%H%M%S}", 1
    while True:
        path = runs / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise cannot_write(path, error) from error
        else:
            return Run(path, runs)


def usable_output(output_dir: str, runs: Path = RUNS, *, overwrite: bool) -> Run:
    """A new run in this folder, which must be empty, or hold a run that may be overwritten.

    Raises:
        FileError: the folder is not empty.
    """
    run = Run(Path(output_dir).expanduser(), runs)
    check_place(run.path, RUN, overwrite=overwrite)
    run.check_room()
    return run


def find_adapter(path: Path) -> Path | None:
    """The adapter folder of a run, an adapter folder, or a Hub id (which is downloaded); None for anything else.

    Raises:
        FileError: the run has no adapter.
        ModelError: the path can only be a Hub id, but there is no such repository or the Hub cannot be reached.
    """
    run = Run(path)

    def read() -> Path:
        folder = adapter_at(path)
        if folder is None:
            raise FileError(
                f"{path} is a run without an adapter, because it stopped before its first evaluation; "
                f"resume it with `craft train --resume --output-dir {shlex.quote(str(path))}`"
            )
        return folder

    if run.is_run() and not (path / CONFIG_FILE).is_file():
        return steadily(run.adapter, read)
    return steadily(path, lambda: adapter_at(path))
