"""One rank under torchrun, in one of several modes; run by test_domain_torchrun.py and test_domain_faults.py."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from carryall.data import AtomicData, Batch
from carryall.dynamics import NVE, BaseDynamics, HookStageEnum, NVTLangevin, initialize_velocities
from carryall.dynamics.inflight import moving_batch
from carryall.engines import domain
from carryall.engines.domain.single_point import single_points
from carryall.engines.domain.system import evaluator_of
from carryall.exchange import Transport
from carryall.models import EagerPotential, SuttonChen
from message_passing import small_message_passing
from structures import fcc, geometries, structure

SPREADS = {"atoms": tuple(geometries()), "none": ("periodic", "slab", "open", "one_atom_periodic", "two_atoms")}
"""How space is cut, where the atoms are or into bricks of one size in a row, and what for."""
STEPS, HOT = 100, 4000.0


def hot_crystal(repeats: tuple[int, int, int] = (2, 2, 2)) -> Batch:
    """Gold so hot that its atoms soon are elsewhere; a box smaller than two cutoffs and the skin."""
    positions, cell = fcc(repeats, a=4.08, jitter=0.02)
    batch = moving_batch([AtomicData(positions, [79] * len(positions), cell)], [0])
    return initialize_velocities(batch, HOT, seed=3)


def dynamics_of(name: str) -> BaseDynamics:
    """Those that are run in full."""
    if name == "nve":
        return NVE(EagerPotential(small_message_passing()), timestep=2.0)
    return NVTLangevin(EagerPotential(SuttonChen(("Au",), cutoff=4.6)), HOT, timestep=2.0, friction=5.0, seed=8)


def points(transport: Transport) -> dict[str, Any]:
    """Every small structure."""
    potential, found = EagerPotential(small_message_passing()), {}
    for balance, names in SPREADS.items():
        grid = (transport.size, 1, 1) if balance == "none" else None
        for name in names:
            out = single_points(potential, [structure(name, ("Cu", "Au"))], transport, grid=grid, balance=balance)
            found[name, balance] = None if out is None else out[0]
    return found


def trajectories(transport: Transport) -> dict[str, Any]:
    found = {}
    for name in ("nve", "langevin"):
        dynamics = dynamics_of(name)
        part = domain.spread(hot_crystal(), dynamics, transport)
        dynamics.run(part, STEPS)
        whole = domain.gather(part, dynamics)
        decomposition = evaluator_of(dynamics).decomposition
        moved = transport.all_reduce(torch.tensor([decomposition.n_migrations]))
        conserved = float(dynamics.conserved_energy(part)[0])
        found[name] = {"migrations": int(moved), "rebuilds": decomposition.n_rebuilds, "conserved": conserved}
        if whole is not None:
            found[name] |= {key: whole.get(key).numpy() for key in ("positions", "velocities", "forces", "virial")}
    return found


class Trouble:
    """What goes wrong on rank 1 in step 3."""

    stage = HookStageEnum.AFTER_PRE_UPDATE
    frequency = 1

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder

    def __call__(self, batch: Batch, dynamics: Any) -> None:
        if dynamics.step_count != 3:
            return
        (self.folder / "began").write_text(str(time.time()))
        if self.kind == "raise":
            raise ValueError("the disk of rank 1 is full")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        batch.positions = batch.positions * torch.nan


def fault(transport: Transport, kind: str, folder: Path) -> None:
    dynamics = dynamics_of("nve")
    if transport.rank == 1:
        dynamics.register_hook(Trouble(kind, folder))
    part = domain.spread(hot_crystal(), dynamics, transport)
    dynamics.run(part, 1000)


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    with domain.joined() as transport:
        if mode == "results":
            found = {"points": points(transport), "trajectories": trajectories(transport)}
            if transport.rank == 0:
                (folder / f"{transport.size}.pkl").write_bytes(pickle.dumps(found))
        else:
            fault(transport, mode, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
