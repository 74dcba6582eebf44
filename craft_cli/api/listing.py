"""Use-case: the runs of a folder at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from craft_cli.errors import CraftError
from craft_cli.training.run import Run
from craft_cli.methods.adapter_folder import CONFIG_FILE, read_record


@dataclass(frozen=True)
class Listed:
    """One run.

    Attributes:
        run: its folder.
        state: `finished`, `running`, `interrupted at step N` or `damaged`.
        task: as given.
        model: as given.
        ranks: OUT,IN,LAYERS, as given.
        metrics: of the best evaluation so far; empty before the first.
        step: the last update that was logged.
        problem: what is damaged.
    """

    run: str
    state: str
    task: str | None = None
    model: str | None = None
    ranks: str | None = None
    metrics: Mapping[str, float] | None = None
    step: int = 0
    problem: str | None = None


def list_runs(folder: Path) -> list[Listed]:
    """The runs directly below a folder, the one last started or resumed at the end; none if there are none."""
    runs = [Run(path) for path in folder.iterdir() if not path.is_symlink()] if folder.is_dir() else []
    found = [run for run in runs if run.is_run()]
    return [
        _listed(run) for run in sorted(found, key=lambda run: ((run.path / "recipe.yaml").stat().st_mtime, run.path))
    ]


def _listed(run: Run) -> Listed:
    try:
        recipe = run.recipe()
        metrics = run.results().get("metrics")
        if metrics is None and (run.adapter / CONFIG_FILE).is_file():
            metrics = read_record(run.adapter).get("training", {}).get("metrics")
        return Listed(
            str(run.path),
            run.state(),
            task=recipe.get("task") or "own",
            model=recipe.get("model"),
            ranks=recipe.get("ranks"),
            metrics=metrics or {},
            step=max((line["step"] for line in run.metrics()), default=0),
        )
    except CraftError as error:
        return Listed(str(run.path), "damaged", problem=str(error))
