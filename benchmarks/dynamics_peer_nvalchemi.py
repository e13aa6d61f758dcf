"""nvalchemi-toolkit's half of benchmarks/dynamics.py, for 0.2."""

from __future__ import annotations

import warnings
from importlib.metadata import version
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
    NotHereError,
    Relaxed,
    Simulation,
    Structures,
    serve,
)
from nvalchemi.data import AtomicData, Batch
from nvalchemi.dynamics import FIRE, NPH, NPT, NVE, FIREVariableCell, NVTLangevin, NVTNoseHoover, SizeAwareSampler
from nvalchemi.dynamics.base import ConvergenceHook, DynamicsStage, FusedStage
from nvalchemi.dynamics.sinks import HostMemory
from nvalchemi.hooks import NeighborListHook
from nvalchemi.models.lj import LennardJonesModelWrapper

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
FIRE_STEPS = {"dt": 0.1, "dt_max": 1.0}
WITH_STRESS = ("mtk", "nph", "fire_cell")
SOURCE = "source"


def data_of(structures: Structures, index: int, unit_mass: bool) -> AtomicData:
    """A structure; FIRE moves with the masses that are there, and ASE's has masses of 1."""
    one, kind = structures.one(index), torch.float64
    n = len(one.positions)
    data = AtomicData(
        positions=torch.tensor(one.positions, dtype=kind),
        atomic_numbers=torch.full((n,), 18, dtype=torch.long),
        atomic_masses=torch.full((n,), 1.0 if unit_mass else MASS, dtype=kind),
        cell=torch.tensor(one.cell, dtype=kind),
        pbc=torch.ones(1, 3, dtype=torch.bool),
        forces=torch.zeros(n, 3, dtype=kind),
        energy=torch.zeros(1, 1, dtype=kind),
        velocities=torch.zeros(n, 3, dtype=kind) if unit_mass else torch.tensor(one.velocities, dtype=kind),
    )
    data.add_system_property(SOURCE, torch.tensor([[index]], dtype=torch.long))
    return data


def model_of(stress: bool = False) -> LennardJonesModelWrapper:
    """Lennard-Jones."""
    model = LennardJonesModelWrapper(epsilon=EPSILON, sigma=SIGMA, cutoff=CUTOFF)
    if stress:
        model.model_config.active_outputs = {"energy", "forces", "stress"}
    return model


def list_hook(model: LennardJonesModelWrapper, option: dict[str, Any]) -> NeighborListHook:
    """The neighbour list with its skin."""
    skin = option.get("skin", 0.0)
    return NeighborListHook(model.model_config.neighbor_config, skin=skin, stage=DynamicsStage.BEFORE_COMPUTE)


def dynamics_of(kind: str, model: LennardJonesModelWrapper) -> Any:
    """By the names of the benchmark."""
    bath = {"dt": TIMESTEP, "temperature": TEMPERATURE}
    barostat = {"pressure": 0.0, "barostat_time": 1000.0}
    makers = {
        "nve": lambda: NVE(model, dt=TIMESTEP, n_steps=1),
        "fire": lambda: FIRE(model, **FIRE_STEPS, n_steps=1),
        "fire_cell": lambda: FIREVariableCell(model, **FIRE_STEPS, n_steps=1),
        "langevin": lambda: NVTLangevin(model, **bath, friction=0.01, n_steps=1),
        "nose_hoover": lambda: NVTNoseHoover(model, **bath, thermostat_time=100.0, n_steps=1),
        "mtk": lambda: NPT(model, **bath, **barostat, thermostat_time=100.0, n_steps=1),
        "nph": lambda: NPH(model, dt=TIMESTEP, **barostat, n_steps=1),
    }
    if kind not in makers:
        raise NotHereError(kind)
    return makers[kind]()


def start(structures: Structures, kind: str, option: dict[str, Any]) -> Simulation:
    """All systems in one batch, with the forces of the start: `run` begins with zeros."""
    model = model_of(kind in WITH_STRESS)
    unit_mass = kind in ("fire", "fire_cell")
    batch = Batch.from_data_list([data_of(structures, index, unit_mass) for index in range(len(structures))])
    if kind in WITH_STRESS:
        batch["stress"] = torch.zeros(batch.num_graphs, 3, 3, dtype=torch.float64)
    dynamics = dynamics_of(kind, model)
    dynamics.register_hook(list_hook(model, option))
    dynamics._call_hooks(DynamicsStage.BEFORE_COMPUTE, batch)
    dynamics.compute(batch)
    return Simulation(lambda steps: dynamics.run(batch, n_steps=steps), lambda: batch.energy.flatten().tolist())


class DataSet:
    """What the sampler reads."""

    def __init__(self, items: list[AtomicData]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def get_metadata(self, index: int) -> tuple[int, int]:
        """Atoms and edges."""
        return self.items[index].num_nodes, 0

    def __getitem__(self, index: int) -> tuple[AtomicData, dict[str, Any]]:
        return self.items[index], {}


class Count:
    """Steps times systems in the batch."""

    stage = DynamicsStage.BEFORE_STEP
    frequency = 1

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, context: Any, stage: Any) -> None:
        self.total += context.batch.num_graphs


def keep(found: Relaxed, batch: Batch, rows: Any) -> None:
    """Take finished systems out of a batch."""
    ptr = batch.batch_ptr.tolist()
    for row in rows:
        index = int(batch[SOURCE][row])
        found.positions[index] = batch.positions[ptr[row] : ptr[row + 1]].numpy().copy()
        found.energies[index] = float(batch.energy[row])


class Keep(HostMemory):
    """HostMemory cannot read back what it wrote: its batches differ in the width of the neighbour matrix."""

    def __init__(self, found: Relaxed) -> None:
        super().__init__(len(found.positions))
        self.found = found

    def write(self, batch: Batch, mask: Any = None) -> None:
        """Keep positions and energies."""
        keep(self.found, batch, range(batch.num_graphs) if mask is None else torch.nonzero(mask)[:, 0].tolist())


def relax(structures: Structures, option: dict[str, Any]) -> Relaxed:
    """A fused stage of FIRE alone, in flight or all in one batch."""
    items = [data_of(structures, index, unit_mass=True) for index in range(len(structures))]
    found, model, count = Relaxed.empty(len(items)), model_of(), Count()
    fire = FIRE(model, **FIRE_STEPS, convergence_hook=ConvergenceHook.from_forces(FMAX))
    settings: dict[str, Any] = {}
    if option["in_flight"]:
        sampler = SizeAwareSampler(DataSet(items), max_atoms=ATOMS_IN_FLIGHT, max_batch_size=None)
        settings = {"sampler": sampler, "sinks": [Keep(found)], "refill_frequency": REFILL}
    fused = FusedStage([(0, fire)], **settings)
    fused.register_hook(list_hook(model, option))
    fused.register_hook(count)
    if option["in_flight"]:
        rest = fused.run(None, n_steps=10 * MOST_STEPS)
    else:
        rest = fused.run(Batch.from_data_list(items), n_steps=MOST_STEPS)
    if rest is not None and rest.num_graphs:
        keep(found, rest, np.flatnonzero(rest["status"].flatten().numpy() >= 1).tolist())
    found.batch_steps = count.total
    return found


def versions() -> dict[str, str]:
    """Of the packages that do the work."""
    names = ("nvalchemi-toolkit", "nvalchemi-toolkit-ops", "warp-lang", "torch")
    return {name: version(name) for name in names}


if __name__ == "__main__":
    serve(start, versions, relax, [(LennardJonesModelWrapper, "forward")])
