"""Two small potentials and the structures to run them on."""

import ase.build
import numpy as np
import torch

from carryall.data import AtomicData, Batch
from carryall.graph import PotentialSpec, edge_vectors, segment_sum


class Well:
    """Every atom in the well k r² / 2 about the origin: no neighbours, so each system is a world of its own."""

    def __init__(self, k=1.0, cutoff=0.1):
        self.spec, self.k, self.n_calls = PotentialSpec(cutoff, ("H", "Ar", "Cu")), k, 0

    def __call__(self, graph, *, atomic_virial=False):
        self.n_calls += 1
        x = graph.positions
        atomic = 0.5 * self.k * (x[:, 0] * x[:, 0] + x[:, 1] * x[:, 1] + x[:, 2] * x[:, 2])
        virial = x.new_zeros(graph.n_systems, 3, 3)
        energy = segment_sum(atomic, graph.system, graph.n_systems)
        return {"energy": energy, "atomic_energy": atomic, "forces": -self.k * x, "virial": virial}


class LennardJones:
    """Shifted at the cutoff, as ASE's; derivatives by autograd through the edges, results still attached to the graph."""

    def __init__(self, epsilon=0.0104, sigma=3.4, cutoff=8.5):
        self.spec, self.epsilon, self.sigma, self.n_calls = PotentialSpec(cutoff, ("Ar", "Cu")), epsilon, sigma, 0

    def __call__(self, graph, *, atomic_virial=False):
        self.n_calls += 1
        edge = edge_vectors(graph).requires_grad_()
        s6, c6 = (self.sigma**2 / edge.square().sum(1)) ** 3, (self.sigma / self.spec.cutoff) ** 6
        pair = 2 * self.epsilon * ((s6 * s6 - s6) - (c6 * c6 - c6))
        atomic = segment_sum(pair, graph.edge_center, graph.n_local)
        energy = segment_sum(atomic, graph.system, graph.n_systems)
        (gradient,) = torch.autograd.grad(energy.sum(), edge, retain_graph=True)
        forces = segment_sum(gradient, graph.edge_center, graph.n_atoms) - segment_sum(
            gradient, graph.edge_neighbor, graph.n_atoms
        )
        outer = -edge[:, :, None] * gradient[:, None, :]
        virial = segment_sum(outer, graph.system[graph.edge_center], graph.n_systems)
        return {"energy": energy, "atomic_energy": atomic, "forces": forces, "virial": virial}


def argon(repeat=2, rattle=0.1, seed=0, a=5.4):
    """Rattled fcc argon, 4 repeat³ atoms."""
    atoms = ase.build.bulk("Ar", "fcc", a=a, cubic=True) * (repeat, repeat, repeat)
    atoms.rattle(rattle, seed=seed)
    return atoms


def cluster(n=5, seed=0, spread=3.6):
    """n argon atoms without a cell, apart from each other."""
    rng = np.random.default_rng(seed)
    grid = np.array([[i, j, k] for i in range(2) for j in range(2) for k in range(2)][:n], dtype=float) * spread
    return AtomicData(grid + rng.normal(0, 0.1, (n, 3)), [18] * n)


def atoms_in_well(n=4, seed=0, numbers=18, velocities=True):
    """n atoms near the origin."""
    rng = np.random.default_rng(seed)
    return AtomicData(rng.normal(0, 0.5, (n, 3)), [numbers] * n, velocities=rng.normal(0, 0.05, (n, 3)) if velocities else None)


def batch_of(*structures):
    """A batch of AtomicData or ase.Atoms."""
    return Batch.from_data_list([one if isinstance(one, AtomicData) else AtomicData.from_ase(one) for one in structures])


def record(stage, calls, frequency=1):
    """A hook that notes when it was called."""

    def hook(batch, dynamics):
        calls.append((dynamics.current_hook_stage.name, dynamics.step_count))

    hook.stage, hook.frequency = stage, frequency
    return hook
