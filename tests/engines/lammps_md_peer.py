"""One rank of LAMMPS runs with the driver: every `NAME.in` that is asked for. Run by tests, alone and under mpirun.

    python lammps_md_peer.py FOLDER NAME ...

NAME is run as it stands; `NAME+model` gets the potential `model` beside it (`copper`: one of its own), `NAME+off` has its
exchanges switched off, and with `NAME+raise`, `+nan`, `+energy` and `+kill` rank 1 fails in step 5, at the time in the file
NAME+raise.time.
LAMMPS writes to FOLDER/ranks-P.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import carryall
from carryall.engines.lammps.library import mpi
from carryall.engines.lammps.run import run_script
from carryall.exchange import Exchange
from carryall.graph import NeighborGraph, Potential, PotentialSpec
from carryall.graph.edge_terms import AtomicVirial
from carryall.models import EagerPotential, SuttonChen

FAULTS, FAULTY_STEP = ("raise", "nan", "energy", "kill"), 5

FORWARD = Exchange.forward


class SwitchedOff:
    """Ghosts get zeros."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(FORWARD(self, rows))  # type: ignore[arg-type]


def copper() -> Potential:
    """Not packed, which takes longer than a run."""
    return EagerPotential(SuttonChen(("Cu",), cutoff=4.0))


@dataclass
class Faulty:
    """A potential that fails in step 5."""

    sound: Potential
    kind: str
    here: bool
    when: Path
    step: int = -1  # the first call is for step 0

    @property
    def spec(self) -> PotentialSpec:
        return self.sound.spec

    def __call__(self, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, torch.Tensor]:
        out = dict(self.sound(graph, atomic_virial=atomic_virial))
        self.step += 1
        if self.step != FAULTY_STEP or not self.here:
            return out
        self.when.write_text(repr(time.time()))
        if self.kind == "raise":
            raise RuntimeError("broken on purpose")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        key = "energy" if self.kind == "energy" else "forces"
        out[key] = out[key] * math.nan
        return out


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    comm = mpi().COMM_WORLD
    out = folder / f"ranks-{comm.Get_size()}"
    for whole in names:
        name, _, extra = whole.partition("+")
        potential = None
        if extra in FAULTS:
            potential = Faulty(copper(), extra, comm.Get_rank() == 1, folder / f"{whole}.time")
        elif extra == "copper":
            potential = copper()
        elif extra not in ("", "off"):
            potential = carryall.load(folder / f"{extra}.pte")
        Exchange.forward = SwitchedOff.forward if extra == "off" else FORWARD  # type: ignore[method-assign]
        arguments = ["-screen", "none", "-log", str(out / f"{whole}.log"), "-var", "folder", str(folder)]
        arguments += ["-var", "out", str(out / whole)]
        run_script(folder / f"{name}.in", potential, lammps_args=arguments, load=carryall.load)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
