"""carryall's half of benchmarks/dynamics.py; with CARRYALL_NATIVE=0 in the environment, torch alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dynamics_common import (
    ATOMS_IN_FLIGHT,
    CUTOFF,
    EPSILON,
    FMAX,
    MASS,
    MOST_STEPS,
    REFILL,
    SIGMA,
    TEMPERATURE,
    TIMESTEP,
    Relaxed,
    Simulation,
    Structures,
    serve,
)

import carryall
from carryall.data import AtomicData, Batch
from carryall.dynamics import (
    ConvergenceHook,
    HookStageEnum,
    MemorySink,
    Outcome,
    SizeAwareSampler,
    integrators,
    optimizers,
)
from carryall.dynamics.status import OUTCOME, SYSTEM_ID
from carryall.graph.neighbor_search import graph_from_structures
from carryall.models import LennardJones
from carryall.models.eager import EagerPotential
from carryall.native import library

torch.set_num_threads(1)
BATH = {"temperature": TEMPERATURE, "timestep": TIMESTEP}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "nve": ("NVE", {"timestep": TIMESTEP}),
    "langevin": ("NVTLangevin", {**BATH, "friction": 10.0}),
    "nose_hoover": ("NVTNoseHoover", BATH),
    "rescaling": ("NVTVelocityRescaling", BATH),
    "cell_rescaling": ("NPTStochasticCellRescaling", {**BATH, "pressure": 0.0}),
    "mtk": ("NPT", {**BATH, "pressure": 0.0}),
    "nph": ("NPH", {**BATH, "pressure": 0.0}),
    "fire": ("FIRE", {}),
    "fire_cell": ("FIRE", {"cell_filter": "frechet"}),
    "lbfgs": ("LBFGS", {}),
    "gradient_descent": ("GradientDescent", {}),
}
"""Class and settings by the names of the benchmark."""


def potential() -> EagerPotential:
    """Lennard-Jones, cut off."""
    return EagerPotential(LennardJones(("Ar",), (EPSILON,), (SIGMA,), CUTOFF, "none"))


def data_of(structures: Structures, velocities: bool) -> list[AtomicData]:
    """One AtomicData a structure."""
    made = []
    for one in map(structures.one, range(len(structures))):
        n = len(one.positions)
        moving = one.velocities if velocities else None
        made.append(AtomicData(one.positions, [18] * n, one.cell[0], [True] * 3, masses=[MASS] * n, velocities=moving))
    return made


def dynamics_of(kind: str, option: dict[str, Any], **more: Any) -> Any:
    """A dynamics by its name in the benchmark; the option "skin" in Å, without it carryall's own."""
    name, settings = SETTINGS[kind]
    made = getattr(integrators if hasattr(integrators, name) else optimizers, name)
    skin = {name: value for name, value in option.items() if name == "skin"}
    return made(potential(), **settings, **skin, **more)


def start(structures: Structures, kind: str, option: dict[str, Any]) -> Simulation:
    """All systems in one batch; the forces of the start are evaluated before the first step."""
    batch = Batch.from_data_list(data_of(structures, velocities=True))
    dynamics = dynamics_of(kind, option)
    return Simulation(lambda steps: dynamics.run(batch, n_steps=steps), lambda: batch.energy.tolist())


class Count:
    """Steps times systems in the batch."""

    stage = HookStageEnum.BEFORE_STEP
    frequency = 1

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, batch: Batch, dynamics: Any) -> None:
        self.total += batch.n_systems


def relax(structures: Structures, option: dict[str, Any]) -> Relaxed:
    """FIRE in flight, or all in one batch."""
    items, count = data_of(structures, velocities=False), Count()
    found = Relaxed.empty(len(items))
    settings: dict[str, Any] = {"convergence_hook": ConvergenceHook.from_fmax(FMAX), "n_steps": MOST_STEPS, "hooks": [count]}
    if option["in_flight"]:
        sink = MemorySink()
        sampler = SizeAwareSampler(items, max_atoms=ATOMS_IN_FLIGHT)
        fire = dynamics_of("fire", option, **settings, sampler=sampler, sinks=[sink], refill_frequency=REFILL)
        fire.run()
        done = sink.read()
    else:
        fire = dynamics_of("fire", option, **settings)
        done = fire.run(Batch.from_data_list(items))
    ids, outcome, ptr = (values.tolist() for values in (done.get(SYSTEM_ID), done.get(OUTCOME), done.ptr))
    positions, energies = done.positions.numpy(), done.energy.tolist()
    for row, index in enumerate(ids):
        if outcome[row] == Outcome.CONVERGED:
            found.positions[index], found.energies[index] = positions[ptr[row] : ptr[row + 1]].copy(), energies[row]
    found.batch_steps, found.own_steps = count.total, int(fire.steps(done).sum())
    return found


def pairs(structures: Structures) -> dict[str, Any]:
    """Pairs of atoms within the cutoff, each counted once."""
    graph = graph_from_structures(data_of(structures, velocities=False), CUTOFF, ("Ar",))
    return {"pairs": graph.n_edges // 2, "atoms": graph.n_atoms, "systems": len(structures)}


def settings(structures: Structures) -> dict[str, Any]:
    """What carryall does when nothing is said, and whether its kernels are there."""
    return {"skin": dynamics_of("nve", {}).skin, "native": library() is not None}


def versions() -> dict[str, str]:
    """Of the packages that do the work."""
    return {"carryall": carryall.__version__, "torch": torch.__version__, "numpy": np.__version__}


if __name__ == "__main__":
    model = [(EagerPotential, "__call__"), (EagerPotential, "evaluate_systems")]
    serve(start, versions, relax, model, pairs=pairs, settings=settings)
