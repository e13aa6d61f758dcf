"""`carryall lammps`: a LAMMPS input with a potential, on one rank or under mpirun."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

from tyro.conf import Positional, UseAppendAction

from carryall.cli.arguments import parse
from carryall.cli.build_lammps import command as build_command
from carryall.cli.console import show_settings
from carryall.cli.inputs import notify
from carryall.errors import CarryallError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from carryall.graph import Potential

RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
"""Where launchers say which rank a process is, before MPI does."""


@dataclass(frozen=True)
class LammpsConfig:
    """Run a LAMMPS input with `pair_style carryall FILE` and `pair_coeff * * Cu Au ...`; on P ranks after `mpirun -n P`."""

    script: Positional[Path]
    """The input. The same text runs with both engines."""
    model: str | None = None
    """A packed file or built-in name, for an input that names none; one without pair style gets it before its first run."""
    elements: tuple[str, ...] = ()
    """Symbol of each atom type in order, for an input that names none and has no type labels."""
    engine: Literal["driver", "plugin"] = "driver"
    """The driver in Python, which needs no compiler, or the pair style that carryall build-lammps has compiled."""
    var: Annotated[tuple[tuple[str, ...], ...], UseAppendAction] = ()
    """Name and values of a variable of the input, as LAMMPS' own -var; may be given several times."""
    log: Path | None = None
    """LAMMPS' log file; left out: log.lammps."""
    quiet: bool = False
    """Print nothing of LAMMPS; its log has it all."""


def run(argv: Sequence[str]) -> int:
    """The verb."""
    with _only_first_speaks():
        config = parse(LammpsConfig, "lammps", argv)
        if any(len(words) < 2 for words in config.var):
            raise InputError("--var takes a name and at least one value, as in --var temperature 300")
        if not config.script.is_file():
            raise InputError(f"{config.script}: no such file")
        if config.engine == "plugin":
            _become_lammps(config)
        from carryall.engines.lammps.library import lammps_class, mpi

        lammps_class()
        comm = mpi().COMM_WORLD
        _show(config, {"ranks": comm.Get_size()})
    from carryall.engines.lammps.run import run_script

    def load(name: str) -> Potential:
        from carryall.package.open import load as load_any

        # the others wait until rank 0 has it
        return load_any(name, notify=notify if comm.Get_rank() == 0 else lambda _: None)

    run_script(config.script, config.model, config.elements or None, comm, lammps_arguments(config), load=load)
    return 0


def lammps_arguments(config: LammpsConfig) -> list[str]:
    """What LAMMPS itself is started with."""
    found = [word for words in config.var for word in ("-var", *words)]
    found += [] if config.log is None else ["-log", str(config.log)]
    return [*found, *(["-screen", "none"] if config.quiet else [])]


def _show(config: LammpsConfig, facts: dict[str, object]) -> None:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    settings["var"] = [" ".join(words) for words in config.var]
    show_settings({**settings, "log": str(config.log or "log.lammps"), **facts})
    sys.stdout.flush()  # LAMMPS writes by itself


def _become_lammps(config: LammpsConfig) -> NoReturn:
    """Go on as LAMMPS' own program, which needs no Python, with the plugin."""
    if config.model is not None or config.elements:
        raise InputError(
            "the compiled pair style reads file and elements from the input: write `pair_style carryall ${model}` and "
            "`pair_coeff * * Cu ...` there, and give --var model FILE in place of --model"
        )
    if find_spec("lammps") is None:
        raise MissingDependencyError("LAMMPS is not installed: pip install 'carryall[lammps]'")
    done = subprocess.run(build_command(check=True), capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InputError(f"the compiled pair style cannot be used: {reason}; carryall build-lammps compiles it")
    plugin = Path(done.stdout.strip().splitlines()[-1])
    _show(config, {"plugin": str(plugin)})
    program = [sys.executable, "-c", "from lammps.executable import lmp; lmp()", "-in", str(config.script)]
    os.execve(sys.executable, [*program, *lammps_arguments(config)], {**os.environ, "LAMMPS_PLUGIN_PATH": str(plugin.parent)})


@contextmanager
def _only_first_speaks() -> Iterator[None]:
    """What every rank finds out by itself is said by the first alone."""
    if next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0":
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except CarryallError:
            raise SystemExit(2) from None
