"""Are the built files whole, and does the installed wheel work? Called by `.ci/run` in an environment that has it.

python tests/installed.py FOLDER

FOLDER has one sdist and one wheel, as `python -m build` makes them.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tracked(*folders: str) -> set[str] | None:
    """The files of the repository, or None outside one."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    return set(listed.stdout.split("\n")) - {""} if listed.returncode == 0 else None


def check_sdist(path: Path) -> None:
    """It has every file of the repository, and besides them only the metadata."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    there = tracked()
    if there is not None and names != there | {"PKG-INFO"}:
        raise SystemExit(
            f"{path.name}: missing {sorted(there - names)}, not in the repository {sorted(names - there - {'PKG-INFO'})}"
        )


def check_wheel(path: Path) -> None:
    """It has the package with `py.typed`, samples and recipes, and nothing besides."""
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = tracked("craft_cli", "recipes") or {str(file.relative_to(ROOT)) for file in ROOT.glob("recipes/*")}
    wanted = {f"craft_cli/{name}" if name.startswith("recipes/") else name for name in there} | {"craft_cli/py.typed"}
    if missing := wanted - names:
        raise SystemExit(f"{path.name}: missing {sorted(missing)}")
    if strange := {name for name in names if not name.startswith("craft_cli/")}:
        raise SystemExit(f"{path.name}: files outside the package: {sorted(strange)}")


def craft(*arguments: str) -> str:
    """What the installed command prints, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "craft"), *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def main(folder: Path) -> None:
    """All checks; the first that fails ends them."""
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    check_sdist(sdist)
    check_wheel(wheel)
    files = metadata.files("lora-craft") or []
    if not any(str(file) == "craft_cli/py.typed" for file in files):
        raise SystemExit("the wheel is not what is installed here")
    if craft("--version").split()[1] != metadata.version("lora-craft"):
        raise SystemExit("`craft --version` is not the version of the distribution")
    craft("--help")
    shown = craft("recipes")
    if missing := [path.stem for path in (ROOT / "recipes").glob("*.yaml") if path.stem not in shown]:
        raise SystemExit(f"`craft recipes` does not find {missing}")
    print(f"{sdist.name} and {wheel.name} are whole")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
