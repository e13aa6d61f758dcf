"""LAMMPS with carryall's driver, alone or one of the ranks of mpirun; writes what it found. Run by test_lammps_driver.py.

python lammps_driver_peer.py parity|serial|fault FOLDER [KIND]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from carryall import load
from carryall.engines.lammps import Attachment, attach, new_lammps
from carryall.engines.lammps.library import mpi
from carryall.engines.lammps.structures import create
from carryall.errors import InputError
from carryall.graph import PotentialSpec
from carryall.models import EagerPotential
from message_passing import Tangled, small_message_passing
from structures import geometries, small_alloy, small_lj, structure

QUIET = ("-screen", "none", "-log", "none", "-nocite")
VOIGT = ([0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2])


def potentials(folder: Path) -> dict[str, tuple[Any, tuple[str, str]]]:
    """By name, with the symbols that structures take."""
    metals, others = ("Cu", "Au"), ("O", "H")
    eager = {
        "tangled": (Tangled(), metals),
        "message passing": (small_message_passing(), metals),
        "alloy": (small_alloy(), metals),
        "lennard-jones": (small_lj(), others),
    }
    found: dict[str, Any] = {name: (EagerPotential(model), symbols) for name, (model, symbols) in eager.items()}
    return {**found, "tangled .pte": (folder / "tangled.pte", metals), "alloy .pte": (load(folder / "alloy.pte"), metals)}


def parity(folder: Path) -> None:
    """Every potential on every geometry."""
    lmp = new_lammps(args=QUIET)
    found: dict[str, np.ndarray] = {}
    for name, (potential, symbols) in potentials(folder).items():
        for geometry in geometries():
            placed = create(lmp, structure(geometry, symbols), symbols)
            attached = attach(lmp, potential, symbols)
            for key, value in evaluated(lmp).items():
                turned = {"forces": placed.back, "virial": placed.tensor_back}
                by_atom = key == "atomic_virial"
                found[f"{name}/{geometry}/{key}"] = (
                    np.stack([placed.tensor_back(one) for one in value]) if by_atom else turned.get(key, np.asarray)(value)
                )
            share = np.array([lmp.extract_setting("nlocal"), lmp.extract_setting("nghost")])
            every = mpi().COMM_WORLD.allgather(share.tolist())
            found[f"{name}/{geometry}/shares"] = np.array(every)
            assert attached.n_calls == 1
    lmp.close()
    if mpi().COMM_WORLD.Get_rank() == 0:
        np.savez(folder / f"parity{mpi().COMM_WORLD.Get_size()}.npz", **found)


def evaluated(lmp: Any) -> dict[str, np.ndarray]:
    """What LAMMPS makes of its atoms, by its own computes; eV and Å."""
    for command in (
        "compute e all pe/atom",
        "compute w all stress/atom NULL virial",
        "compute p all pressure NULL virial",
        "thermo_style custom step pe vol c_p[1]",
        "run 0 post no",
    ):
        lmp.command(command)
    to_virial = 1 / lmp.extract_global("nktv2p")
    pressure = np.array(lmp.numpy.extract_compute("p", 0, 1)) * lmp.get_thermo("vol") * to_virial
    return {
        "energy": np.array(lmp.get_thermo("pe")),
        "forces": np.array(lmp.gather_atoms("f", 1, 3)).reshape(-1, 3),
        "virial": matrices(pressure[None])[0],
        "atomic_energy": np.array(lmp.gather("c_e", 1, 1)),
        "atomic_virial": matrices(-np.array(lmp.gather("c_w", 1, 6)).reshape(-1, 6) * to_virial),
    }


def matrices(rows: np.ndarray) -> np.ndarray:
    """(n, 3, 3) symmetric matrices of xx yy zz xy xz yz."""
    out = np.zeros((len(rows), 3, 3))
    out[:, VOIGT[0], VOIGT[1]] = out[:, VOIGT[1], VOIGT[0]] = rows
    return out


def crystal(lmp: Any, units: str = "metal", atom_style: str = "atomic") -> None:
    """72 metal atoms, jittered; lattice lengths are numbers in the units."""
    from structures import fcc

    positions, cell = fcc((3, 3, 2))
    length = {"metal": 1.0, "real": 1.0, "electron": 1 / 0.5291772105638411, "si": 1e-10, "nano": 0.1}[units]
    a, b, c = np.diag(cell) * length
    for command in (
        "clear",
        f"units {units}",
        f"atom_style {atom_style}",
        "atom_modify map yes",
        f"neighbor {2 * length!r} bin",  # of units si LAMMPS' own default is a millimetre
        f"region box block 0 {a!r} 0 {b!r} 0 {c!r} units box".replace("np.float64(", "").replace(")", ""),
        "create_box 2 box" + (" bond/types 1 extra/bond/per/atom 4 extra/special/per/atom 9" if atom_style != "atomic" else ""),
        "mass * 63.5",
    ):
        lmp.command(command)
    n = len(positions)
    lmp.create_atoms(n, list(range(1, n + 1)), [1 + k % 2 for k in range(n)], (positions * length).reshape(-1).tolist())


class Spoiled:
    """The alloy, whose fourth call does something else."""

    def __init__(self, act: Callable[[dict[str, torch.Tensor]], None], spec: dict[str, Any] | None = None) -> None:
        self.inner, self.act, self.calls = EagerPotential(small_alloy()), act, 0
        self.spec = PotentialSpec.from_dict({**self.inner.spec.to_dict(), **(spec or {})})

    def __call__(self, graph: Any, **options: Any) -> dict[str, torch.Tensor]:
        out = self.inner(graph, **options)
        self.calls += 1
        if self.calls == 4:
            self.act(out)
        return out


def raises(out: dict[str, torch.Tensor]) -> None:
    raise ValueError("the model broke")


def refuses(out: dict[str, torch.Tensor]) -> None:
    raise InputError("the model wants something else")


def not_a_number(out: dict[str, torch.Tensor]) -> None:
    out["forces"][5, 1] = float("nan")


def infinite(out: dict[str, torch.Tensor]) -> None:
    out["energy"][0] = float("inf")


def interrupts(out: dict[str, torch.Tensor]) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupts_twice(out: dict[str, torch.Tensor]) -> None:
    interrupts(out)
    interrupts(out)


FAULTS = {one.__name__: one for one in (raises, refuses, not_a_number, infinite, interrupts, interrupts_twice)}


def serial(folder: Path) -> None:
    """What one process tells: faults, refusals, units, runs."""
    lmp = new_lammps(args=QUIET)
    found = {"faults": faults(lmp), "refusals": refusals(lmp), "units": unit_styles(lmp), "runs": runs(lmp)}
    found["two"] = two_at_once(lmp)
    lmp.close()
    (folder / "serial.json").write_text(json.dumps(found))


def said(call: Callable[..., Any], *arguments: Any) -> str:
    """The error of a call with its notes, or "none"."""
    try:
        call(*arguments)
    except BaseException as error:
        return "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return "none"


def faults(lmp: Any) -> dict[str, Any]:
    """Error, step and forces after a fault in step 3, whether the dump of that step is there, and a run after it."""
    found = {}
    for name, act in FAULTS.items():
        crystal(lmp)
        attached = attach(lmp, Spoiled(act), ["Cu", "Au"])
        seen: list[int] = []
        lmp.commands_string("fix nve all nve\nfix seen all external pf/callback 1 1")
        lmp.set_fix_external_callback("seen", lambda caller, step, *rest, seen=seen: seen.append(step))
        error = said(lmp.command, "run 10")
        before = [lmp.extract_global("ntimestep"), list(seen), attached.n_calls]
        again = said(lmp.commands_string, "variable a equal 1\nrun 2\nrun 2 pre no")
        found[name] = [error, *before, again, lmp.extract_global("ntimestep")]
    return found


def refusals(lmp: Any) -> dict[str, str]:
    """The error of each attach, or run, that has to fail."""
    alloy = EagerPotential(small_alloy())
    box = "region box block 0 9 0 9 0 9\ncreate_box 2 box"

    def fresh(text: str) -> Callable[[], Attachment]:
        lmp.commands_string(f"clear\n{text}")
        return lambda: attach(lmp, alloy, ["Cu", "Au"])

    found = {
        "lj": said(fresh(f"units lj\n{box}")),
        "no box": said(fresh("units metal")),
        "two dimensions": said(fresh("units metal\ndimension 2\nregion box block 0 9 0 9 -1 1\ncreate_box 2 box")),
        "pair style": said(fresh(f"units metal\n{box}\npair_style lj/cut 3")),
    }
    crystal(lmp)
    found["too few elements"] = said(attach, lmp, alloy, ["Cu"])
    found["unknown element"] = said(attach, lmp, alloy, ["Cu", "Ag"])
    found["no elements"] = said(attach, lmp, alloy)
    found["no file"] = said(attach, lmp, folder_of_nothing() / "model.pt2", ["Cu", "Au"])
    for name, spec in {"spin": {"spin": True}, "aparam": {"dim_aparam": 2}, "fparam": {"dim_fparam": 1}}.items():
        found[name] = said(attach, lmp, Spoiled(raises, spec), ["Cu", "Au"])
    found["default fparam"] = said(attach, lmp, Spoiled(raises, {"dim_fparam": 1, "default_fparam": (1.0,)}), ["Cu", "Au"])
    found["a second"] = said(attach, lmp, alloy, ["Cu", "Au"])
    lmp.command("neigh_modify exclude type 1 2")
    found["exclude"] = said(lmp.command, "run 0")
    lmp.command("neigh_modify exclude none")
    found["not excluded"] = said(lmp.command, "run 0")
    lmp.commands_string("pair_style lj/cut 3\npair_coeff * * 0 1")
    found["pair style after"] = said(lmp.command, "run 0")
    crystal(lmp)
    lmp.command("labelmap atom 1 Au 2 Cu")
    found["labels"] = attach(lmp, alloy)._evaluator.type_table.tolist()  # type: ignore[assignment]
    lmp.commands_string("group one type 1\natom_modify first one\nneigh_modify include one")
    found["include"] = said(lmp.command, "run 0")
    crystal(lmp)
    lmp.commands_string("set atom 3 x 1 y 1 z 1\nset atom 7 x 1 y 1 z 1")
    attach(lmp, alloy, ["Cu", "Au"])
    found["coincide"] = said(lmp.command, "run 0")
    crystal(lmp, atom_style="bond")
    attach(lmp, alloy, ["Cu", "Au"])
    lmp.commands_string("bond_style zero nocoeff\nbond_coeff *\ngroup one id 1\ngroup other id 2 3 4\nrun 0")
    lmp.command("create_bonds many one other 1 1.0 3.5")
    found["special"] = said(lmp.command, "run 0")
    lmp.command("special_bonds lj/coul 1 1 1")
    found["not special"] = said(lmp.command, "run 0")
    return found


def folder_of_nothing() -> Path:
    return Path(__file__).parent / "nothing"


def unit_styles(lmp: Any) -> dict[str, list[float]]:
    """Energy, a force, xx of the virial's pressure, in LAMMPS' units; and its nktv2p."""
    found = {}
    for units in ("metal", "real", "electron", "si", "nano"):
        crystal(lmp, units)
        attach(lmp, EagerPotential(small_alloy()), ["Cu", "Au"])
        values = evaluated(lmp)
        found[units] = [values["energy"].item(), *values["forces"][11].tolist(), values["virial"][0, 0].item()]
    return found


def runs(lmp: Any) -> dict[str, Any]:
    """Positions, forces, energy, pressure and box after several kinds of runs."""
    crystal(lmp)
    attached = attach(lmp, EagerPotential(Tangled()), ["Cu", "Au"])
    lmp.commands_string("timestep 0.002\nvelocity all create 900 4928459\nfix move all nve\nneighbor 0.3 bin\nthermo 2")
    found = {}
    trajectory = folder_of(lmp)
    for name, text in {
        "first": "run 0",
        "more": f"dump all all custom 2 {trajectory} id type x y z fx fy fz\ndump_modify all format float %.17g sort id\nrun 6",
        "pre no": "run 4 pre no",
        "every": 'run 6 every 3 "variable a equal pe"',
        "npt": "unfix move\nundump all\nfix move all npt temp 300 300 0.1 iso 0 0 1\nrun 5",
        "minimize": "unfix move\nminimize 0 1e-2 5 20",
        "box/relax": "fix relax all box/relax iso 0\nminimize 0 1e-2 5 20\nunfix relax",
        "fix energy": "thermo_style custom step temp\nthermo 100\nfix move all nve\nrun 3",
        "rerun": f"rerun {trajectory} dump x y z",
    }.items():
        lmp.commands_string(text)
        found[name] = state(lmp)
    found["plans"] = [attached.n_plans, attached.n_calls]
    found["dump"] = trajectory.read_text()
    attached.detach()
    found["after"] = [lmp.available_ids("fix"), lmp.extract_global("pair_style"), "command" in vars(lmp)]
    return found


def folder_of(lmp: Any) -> Path:
    return Path(sys.argv[2]) / "all.dump"


def state(lmp: Any) -> dict[str, Any]:
    lower, upper, *_ = lmp.extract_box()
    return {
        "positions": np.array(lmp.gather_atoms("x", 1, 3)).reshape(-1, 3).tolist(),
        "forces": np.array(lmp.gather_atoms("f", 1, 3)).reshape(-1, 3).tolist(),
        "cell": np.diag(np.subtract(upper, lower)).tolist(),
        "energy": lmp.numpy.extract_fix("carryall", 0, 0),
        "thermo": dict(lmp.last_thermo()),
        "step": lmp.extract_global("ntimestep"),
    }


def two_at_once(lmp: Any) -> list[float]:
    """Energies of two potentials in two LAMMPS objects, evaluated in turns."""
    crystal(lmp)
    attach(lmp, EagerPotential(small_alloy()), ["Cu", "Au"])
    with new_lammps(args=QUIET) as other:
        crystal(other)
        attach(other, EagerPotential(Tangled()), ["Cu", "Au"])
        found = []
        for one in (lmp, other, lmp):
            one.command("run 0")
            found.append(one.get_thermo("pe"))
    return found


def fault(folder: Path, kind: str) -> None:
    """A fault of rank 1 in step 3 of a run on all ranks."""
    rank = mpi().COMM_WORLD.Get_rank()
    lmp = new_lammps(args=QUIET)
    crystal(lmp)
    attach(lmp, Spoiled(FAULTS[kind] if rank == 1 else lambda out: None), ["Cu", "Au"])
    lmp.command("fix nve all nve")
    try:
        lmp.command("run 10")
    finally:
        (folder / f"{kind}{rank}").write_text(str(lmp.extract_global("ntimestep")))


def main() -> None:
    warnings.simplefilter("error")
    what, folder = sys.argv[1], Path(sys.argv[2])
    {"parity": parity, "serial": serial, "fault": fault}[what](folder, *sys.argv[3:])


if __name__ == "__main__":
    main()
