"""torch-sim's half of benchmarks/dynamics.py, for torch-sim 0.6.

0.6.2 wants Python 3.12, for the syntax of type parameters alone: on Python 3.11 a copy of it with `[T: ...]` taken out of the
heads of its functions and classes runs unchanged.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch_sim as ts
from ase import Atoms
from dynamics_common import (
    ATOMS_IN_FLIGHT,
    CUTOFF,
    EPSILON,
    FMAX,
    KELVIN,
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
from torch_sim.models.lennard_jones import LennardJonesModel
from torch_sim.neighbors import torchsim_nl, vesin_nl_ts
from torch_sim.units import MetalUnits

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
LISTS = {"default": torchsim_nl, "vesin": vesin_nl_ts}
INTEGRATORS = {
    "nve": "nve",
    "langevin": "nvt_langevin",
    "nose_hoover": "nvt_nose_hoover",
    "rescaling": "nvt_vrescale",
    "cell_rescaling": "npt_crescale_isotropic",
    "mtk": "npt_nose_hoover_isotropic",
}
OPTIMIZERS = {"fire": "fire", "fire_cell": "fire", "lbfgs": "lbfgs", "gradient_descent": "gradient_descent"}
WITH_STRESS = ("cell_rescaling", "mtk", "fire_cell")


def images_of(structures: Structures) -> list[Atoms]:
    """With velocities."""
    images = []
    for one in map(structures.one, range(len(structures))):
        images.append(Atoms("Ar" * len(one.positions), positions=one.positions, cell=one.cell[0], pbc=True))
        images[-1].set_masses(np.full(len(one.positions), MASS))
    return images


def model_of(option: dict[str, Any], stress: bool = False) -> LennardJonesModel:
    """Lennard-Jones; the option "list" names its neighbour search."""
    return LennardJonesModel(
        sigma=SIGMA,
        epsilon=EPSILON,
        cutoff=CUTOFF,
        dtype=torch.float64,
        device=torch.device("cpu"),
        compute_forces=True,
        compute_stress=stress,
        neighbor_list_fn=LISTS[option.get("list", "default")],
    )


def start(structures: Structures, kind: str, option: dict[str, Any]) -> Simulation:
    """All systems in one state."""
    model = model_of(option, kind in WITH_STRESS)
    state = ts.io.atoms_to_state(images_of(structures), device=torch.device("cpu"), dtype=torch.float64)
    settings: dict[str, Any] = {}
    if kind in OPTIMIZERS:
        init, step = ts.OPTIM_REGISTRY[ts.Optimizer(OPTIMIZERS[kind])]
        box = [init(state, model, **({"cell_filter": ts.CellFilter.frechet} if kind == "fire_cell" else {}))]
    elif kind not in INTEGRATORS:
        raise NotHereError(kind)
    else:
        init, step = ts.INTEGRATOR_REGISTRY[ts.Integrator(INTEGRATORS[kind])]
        time = torch.tensor(TIMESTEP / 1000 * MetalUnits.time, dtype=torch.float64)
        kT = torch.tensor(TEMPERATURE * KELVIN, dtype=torch.float64)
        settings = {"dt": time} if kind == "nve" else {"dt": time, "kT": kT}
        box = [init(state, model, kT=kT, **({} if kind in ("nve", "langevin", "rescaling") else {"dt": time}))]
        box[0].momenta = torch.tensor(structures.velocities * MASS, dtype=torch.float64)
        if kind in WITH_STRESS:
            settings["external_pressure"] = torch.tensor(0.0, dtype=torch.float64)

    def run(steps: int) -> None:
        for _ in range(steps):
            box[0] = step(state=box[0], model=model, **settings)

    return Simulation(run, lambda: box[0].energy.tolist())


def relax(structures: Structures, option: dict[str, Any]) -> Relaxed:
    """`optimize`, in flight or all in one batch."""
    model, count = model_of(option), [0]
    init, step = ts.OPTIM_REGISTRY[ts.Optimizer.fire]

    def counted(state: Any, model: Any, **settings: Any) -> Any:
        count[0] += state.n_systems
        return step(state, model, **settings)

    batcher: Any = False
    if option["in_flight"]:
        batcher = ts.InFlightAutoBatcher(model, memory_scales_with="n_atoms", max_memory_scaler=ATOMS_IN_FLIGHT)
    done = ts.optimize(
        system=images_of(structures),
        model=model,
        optimizer=(init, counted),
        convergence_fn=ts.generate_force_convergence_fn(FMAX),
        max_steps=MOST_STEPS,
        steps_between_swaps=REFILL,
        autobatcher=batcher,
    )
    finished = (ts.quantities.system_wise_max_force(done) < FMAX).tolist()
    found = Relaxed.empty(len(structures))
    for index, rows in enumerate(torch.split(done.positions, np.diff(structures.ptr).tolist())):
        if finished[index]:
            found.positions[index], found.energies[index] = rows.numpy(), float(done.energy[index])
    found.batch_steps = count[0]
    return found


def versions() -> dict[str, str]:
    """Of the packages that do the work."""
    return {"torch-sim": version("torch-sim-atomistic"), "torch": torch.__version__, "vesin": version("vesin")}


if __name__ == "__main__":
    serve(start, versions, relax, [(LennardJonesModel, "forward")])
