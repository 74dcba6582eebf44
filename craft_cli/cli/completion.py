"""Shell completion of names that are known without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from craft_cli.config import METHOD_OPTIONS, TRACKERS, RunConfig, shipped_recipes

TASKS = (
    "cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "mnli-mm", "qnli", "rte", "wnli", "ax", "opinions", "lighthouse",
)  # fmt: skip
"""Values of `--task`; a test compares them with the registered tasks."""
_NAMES = {
    "task": TASKS,
    "model": ("demo",),
    "method": tuple(METHOD_OPTIONS),
    "targets": ("query", "key", "value", "output"),
    "report_to": (*TRACKERS, "none"),
}

Completer = Callable[[str], list[str]]


def of_setting(name: str) -> Completer | None:
    """The completion of a setting; None if its values are unknown."""
    if name == "init_from":
        return runs
    names = _NAMES.get(name) or tuple(_words(get_type_hints(RunConfig)[name]))
    return beginning_with(names) if names else None


def _words(hint: Any) -> list[str]:
    """The values of a Literal, or of a Literal inside a union."""
    return [word for part in get_args(hint) for word in ([part] if isinstance(part, str) else _words(part))]


def beginning_with(names: Sequence[str]) -> Completer:
    """Complete what is typed from a list of names."""

    def offered(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return offered


def recipes(incomplete: str) -> list[str]:
    """Complete shipped recipes, and recipe files in the working folder."""
    files = [path.name for pattern in ("*.yaml", "*.yml") for path in sorted(Path().glob(pattern))]
    return beginning_with([*shipped_recipes(), *files])(incomplete)


def runs(incomplete: str) -> list[str]:
    """Complete runs in `runs` and in the working folder."""
    folders = [path for folder in (Path("runs"), Path()) if folder.is_dir() for path in sorted(folder.iterdir())]
    return beginning_with([str(path) for path in folders if (path / "recipe.yaml").is_file()])(incomplete)
