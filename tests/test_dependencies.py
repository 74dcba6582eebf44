"""Every third-party package that the code imports is declared, and nothing else is."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_structure import imported

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED_FOR = {"bitsandbytes", "gguf", "optuna", "sqlalchemy"}
"""What the package imports only where the user asks for it, with a line on how to install it."""
BY_ANOTHER = {"setfit", "trl"}
"""Compared with in benchmarks, in an environment of its own."""


def declared(lines: list[str]) -> set[str]:
    return {re.sub(r"[-_.]+", "-", Requirement(line).name).lower() for line in lines}


def third_party(*folders: str) -> set[str]:
    """Distributions that the files of these folders import, wherever in them."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    own = {path.stem for path in files} | {"craft_cli"} | set(sys.stdlib_module_names)
    modules = {name.split(".")[0] for path in files for name in imported(path)} - own - BY_ANOTHER
    distributions = packages_distributions()
    return {re.sub(r"[-_.]+", "-", distributions[module][0]).lower() for module in modules}


def test_all_that_is_imported_is_declared_and_the_other_way_round() -> None:
    assert third_party("craft_cli") - ASKED_FOR == declared(PROJECT["dependencies"])


def test_what_tests_and_benchmarks_import_is_declared() -> None:
    known = declared(
        [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    )
    assert third_party("tests", "benchmarks", "docs") <= known


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_every_dependency_has_a_lowest_version(line: str) -> None:
    assert any(bound.operator in (">=", "==") for bound in Requirement(line).specifier), line
