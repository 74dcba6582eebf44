"""The name of the distribution, and an environment that `craft-cli`, with the same import name, was installed into too."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from craft_cli import __version__
from craft_cli.installation import DISTRIBUTION, OTHERS_NAMES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
START = "from craft_cli.__main__ import main; main()"
REPAIR = "pip install --force-reinstall --no-deps lora-craft"


def record(site: Path, name: str, version: str, files: list[str]) -> None:
    """What pip writes about an installed distribution."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    (folder / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an installed copy of ours."""
    site = tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__", "samples")
    shutil.copytree(ROOT / "craft_cli", site / "craft_cli", ignore=ignored)
    record(site, DISTRIBUTION, __version__, [str(path.relative_to(site)) for path in site.rglob("*.py")])
    return site


def install_the_other(site: Path, *, first: bool = False) -> None:
    """`craft-cli`, as far as it matters; what both have is ours if it came first."""
    package, files = site / "craft_cli", {"__init__.py": "from .messages import emit\n", "messages.py": "emit = print\n",
             "errors.py": "class CraftError(Exception): ...\n"}  # fmt: skip
    for name, text in files.items():
        if not (first and (package / name).exists()):
            (package / name).write_text(text)
    record(site, "craft-cli", "3.4.1", [f"craft_cli/{name}" for name in files])


def python(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without `site`, whose .pth files lead to the package under test."""
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), sysconfig.get_path("purelib")])},
        cwd=site.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [("doctor",), ("train", "--help")])
def test_ours_overwritten_is_one_line_with_the_remedy(site: Path, arguments: tuple[str, ...]) -> None:
    install_the_other(site)
    done = python(site, START, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: craft-cli 3.4.1 is also installed. It has the same import name (craft_cli)")
    assert line.endswith(f"pip uninstall craft-cli && {REPAIR}")


def test_the_other_removed_took_files_of_ours(site: Path) -> None:
    for name in ("__init__.py", "errors.py"):
        (site / "craft_cli" / name).unlink()
    done = python(site, START, "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert "files of lora-craft are missing (craft_cli/__init__.py, craft_cli/errors.py)" in line
    assert line.endswith(f"Run: {REPAIR}")


def test_the_other_overwritten_by_ours(site: Path) -> None:
    """Ours works, and its doctor warns; the programs of the other say what happened."""
    install_the_other(site, first=True)
    assert python(site, START, "--version").stdout == f"craft {__version__}\n"
    found = json.loads(
        python(site, "import json; from craft_cli.api import doctor; print(json.dumps(doctor._craft()))").stdout
    )
    assert found[0] == "note"
    assert "; craft-cli 3.4.1 is also installed." in found[1]
    done = python(site, "from craft_cli import emit")
    assert done.returncode == 1
    assert re.search(
        r"^ImportError: craft_cli has no 'emit': craft-cli 3.4.1 is also installed", done.stderr, re.MULTILINE
    )


def test_ours_alone(site: Path) -> None:
    """No word of the other, and an error in an import of ours is shown as it is."""
    code = "import craft_cli.installation as i; print(i.collision(), hasattr(i, 'x'))"
    assert python(site, code).stdout == "None False\n"
    assert (
        "AttributeError: module 'craft_cli' has no attribute 'emit'"
        in python(site, "import craft_cli; craft_cli.emit").stderr
    )
    (site / "craft_cli/cli/doctor.py").write_text("import not_there\n")
    assert "No module named 'not_there'" in python(site, START, "doctor").stderr


def test_names_of_the_other_are_not_ours() -> None:
    import craft_cli

    assert not OTHERS_NAMES & set(craft_cli.__all__)


def test_every_line_on_how_to_install_uses_the_name_and_an_extra_that_there_is() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    named = {"docs": set(), "code": set()}  # type: dict[str, set[str]]
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("craft_cli/**/*.py"), ROOT / "pyproject.toml"]:
        found = re.findall(r"([\w.-]+)\[(\w+(?:,\w+)*)\]['\"]", path.read_text())
        for name, extras in found:
            if name in (DISTRIBUTION, "craft-cli", "."):
                named["code" if path.suffix == ".py" else "docs"].add(name)
                assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), path
    assert named == {"docs": {".", DISTRIBUTION}, "code": {DISTRIBUTION}}


def test_the_workflow_runs_ci_on_the_pythons_of_the_package() -> None:
    [job] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    prefix = "Programming Language :: Python :: 3."
    named = [f"3.{line.removeprefix(prefix)}" for line in PROJECT["classifiers"] if line.startswith(prefix)]
    assert job["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert {"run": ".ci/run"}.items() <= job["steps"][-1].items()


def test_pre_commit_runs_what_ci_runs() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # the versions of the development environment, as in CI
    lines = (ROOT / ".ci/run").read_text().splitlines()
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert any(line.replace(" --check", "") == hook["entry"] for line in lines), hook["entry"]


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    paper = citation["references"][0]
    assert paper["identifiers"][0]["value"] == "arXiv:2602.17510"
    assert len(paper["authors"]) == 4
