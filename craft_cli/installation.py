"""Detect conflicts with `craft-cli`, another project on PyPI with the same import name.

This module imports no other module of the package, so that it works even if those were replaced or removed. `craft-cli`
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
"""Names that `craft-cli` exports and this package does not."""


def collision() -> str | None:
    """Check for another distribution with files in `craft_cli`, or for our files that its removal deleted.

    Returns:
        One line with the fix, or None if there is no conflict.
    """
    repair = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
    others = set(metadata.packages_distributions().get(PACKAGE, ())) - {DISTRIBUTION}
    if others:
        names = sorted(others)
        shown = ", ".join(f"{name} {metadata.version(name)}" for name in names)
        return (
            f"{shown} is also installed. It has the same import name ({PACKAGE}), so it and {DISTRIBUTION} overwrite each "
            f"other's files. Use a separate environment for each, or run: pip uninstall {' '.join(names)} && {repair}"
        )
    if missing := _missing():
        return (
            f"files of {DISTRIBUTION} are missing ({', '.join(missing[:3])}), probably because {OTHER} was removed, which has "
            f"the same import name ({PACKAGE}). Run: {repair}"
        )
    return None


def _missing() -> list[str]:
    """Modules of this distribution that are missing."""
    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # imported from a checkout
        return []
    return sorted(str(file) for file in files if file.suffix == ".py" and not Path(file.locate()).exists())
