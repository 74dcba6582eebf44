"""The name on PyPI, and what another project with the same import name does to an installation.

Imports nothing of ours, so that it works where other files of the package were replaced or removed. `craft-cli` on PyPI
has no file of this name.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

DISTRIBUTION = "lora-craft"
PACKAGE = "craft_cli"
OTHER = "craft-cli"
"""A library for command lines by Canonical, imported as `craft_cli` too."""
OTHERS_NAMES = {
    "ArgumentParsingError", "BaseCommand", "CommandGroup", "CraftCommandError", "Dispatcher", "EmitterMode",
    "GlobalArgument", "HIDDEN", "ProvideHelpException", "emit",
}  # fmt: skip
"""What people import from `craft-cli`, and we do not have."""


def collision() -> str | None:
    """Another distribution with files in `craft_cli`, or files of ours that its removal took away.

    Returns:
        One line with the remedy, or None if there is neither.
    """
    repair = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
    others = set(metadata.packages_distributions().get(PACKAGE, ())) - {DISTRIBUTION}
    if others:
        names = sorted(others)
        shown = ", ".join(f"{name} {metadata.version(name)}" for name in names)
        return (
            f"{shown} is installed too. It has the same import name ({PACKAGE}), so it and {DISTRIBUTION} overwrite each "
            f"other's files. Use an environment for each, or: pip uninstall {' '.join(names)} && {repair}"
        )
    if missing := _missing():
        return (
            f"files of {DISTRIBUTION} are missing ({', '.join(missing[:3])}), as after the removal of {OTHER}, which has "
            f"the same import name ({PACKAGE}). Run: {repair}"
        )
    return None


def _missing() -> list[str]:
    """Modules that were installed with us and are no longer there."""
    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # a checkout on the path
        return []
    return sorted(str(file) for file in files if file.suffix == ".py" and not Path(file.locate()).exists())
