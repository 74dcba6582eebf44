"""Experiment trackers, all through Accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from craft_cli.errors import ConfigError, CraftError
from craft_cli.training.run import Run


def trackers(names: Sequence[str]) -> list[str]:
    """The trackers to start.

    Raises:
        ConfigError: a tracker is not installed.
    """
    wanted = [name for name in names if name != "none"]
    for name in wanted:
        if find_spec(name) is None:
            raise ConfigError(f"--report-to {name}: not installed; `pip install {name}`")
    return wanted


def finish_trackers(accelerator: Any) -> str | None:
    """Close the trackers; returns the error of one that failed, if any."""
    problem = None
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # the training is complete, so a server error is only a note
            problem = f"--report-to {tracker.name}: {' '.join(str(error).split())}"
    accelerator.trackers.clear()
    return problem


def start_trackers(accelerator: Any, run: Run, recipe: Mapping[str, Any], run_id: str, step: int) -> None:
    """Start the trackers of `--report-to`.

    Args:
        accelerator: an Accelerator created with `log_with`.
        run: the run, whose folder holds the files of tensorboard.
        recipe: settings to log with the metrics.
        run_id: the same for all parts of a resumed run (wandb; mlflow starts another run of the same name).
        step: updates made before; entries of later updates are removed (tensorboard).

    Raises:
        CraftError: a tracker does not start.
    """
    accelerator.project_configuration.logging_dir = str(run.path / "tensorboard")
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1} if step else {},
        "wandb": {"name": run.path.name, "dir": str(run.path), "id": run_id, "resume": "allow"},
        "mlflow": {"run_name": run.path.name},
    }
    try:
        accelerator.init_trackers("craft", config=dict(recipe), init_kwargs=options)
    except Exception as error:  # not logged in, no server, ...: each tracker raises its own errors
        reason = " ".join(str(error).split())
        raise CraftError(
            f"--report-to {','.join(map(str, accelerator.log_with))}: cannot start: {reason}; set it up, or remove it"
        ) from error
