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
        ConfigError: one is not installed.
    """
    wanted = [name for name in names if name != "none"]
    for name in wanted:
        if find_spec(name) is None:
            raise ConfigError(f"--report-to {name}: not installed; `pip install {name}`")
    return wanted


def finish_trackers(accelerator: Any) -> str | None:
    """Close them; what went wrong, if anything did."""
    problem = None
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # the training is done, whatever a server says
            problem = f"--report-to {tracker.name}: {' '.join(str(error).split())}"
    accelerator.trackers.clear()
    return problem


def start_trackers(accelerator: Any, run: Run, recipe: Mapping[str, Any], run_id: str, step: int) -> None:
    """Start what `--report-to` names.

    Args:
        accelerator: of Accelerate, made with `log_with`.
        run: files of tensorboard lie in its folder.
        recipe: the settings, to be kept beside the metrics.
        run_id: the same for all parts of a run that was cut (wandb; mlflow begins another run of the same name).
        step: updates made before; what was reported of later ones is withdrawn (tensorboard).

    Raises:
        CraftError: one does not start.
    """
    accelerator.project_configuration.logging_dir = str(run.path / "tensorboard")
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1} if step else {},
        "wandb": {"name": run.path.name, "dir": str(run.path), "id": run_id, "resume": "allow"},
        "mlflow": {"run_name": run.path.name},
    }
    try:
        accelerator.init_trackers("craft", config=dict(recipe), init_kwargs=options)
    except Exception as error:  # not logged in, no server, ...: each tracker has errors of its own
        reason = " ".join(str(error).split())
        raise CraftError(
            f"--report-to {','.join(map(str, accelerator.log_with))}: cannot start: {reason}; set it up, or leave it out"
        ) from error
