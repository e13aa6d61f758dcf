"""A cheap, strongly coupled potential: thermostats must reach the canonical distribution on it, not only keep it."""

import numpy as np
import torch

from carryall.data import AtomicData
from carryall.graph import PotentialSpec, segment_sum

SPACING = 3.0


def sites(size):
    """(size, 3) where a ring's atoms belong."""
    return torch.tensor([[SPACING * i, 0.0, 0.0] for i in range(size)], dtype=torch.float64)


class Lattice:
    """Rings of `size` atoms with quartic wells at their sites and quartic bonds to the next atom; all systems alike.

    U = sum_i u_i.K.u_i / 2 + q u_i⁴ / 4 + d_i.C.d_i / 2 + b d_i⁴ / 4, with u_i from the site and d_i = u_(i+1) - u_i. The
    quadratic parts differ along x, y and z, so that the energy (and, without wells, the momentum) is all that is conserved.
    """

    def __init__(self, size, k=0.5, q=500.0, c=0.5, b=500.0):
        self.spec, self.size, self.q, self.b = PotentialSpec(0.1, ("H", "He", "Li", "Be")), size, q, b
        self.k, self.c = (stiffness * torch.tensor([1.0, 1.7, 2.6], dtype=torch.float64) for stiffness in (k, c))

    def __call__(self, graph, *, atomic_virial=False):
        u = graph.positions.reshape(-1, self.size, 3) - sites(self.size)
        d = u.roll(-1, 1) - u
        uu, dd = (u * u).sum(2, keepdim=True), (d * d).sum(2, keepdim=True)
        pull = d * (self.c + self.b * dd)
        forces = pull - pull.roll(1, 1) - u * (self.k + self.q * uu)
        atomic = (u * u * (0.5 * self.k + 0.25 * self.q * uu) + d * d * (0.5 * self.c + 0.25 * self.b * dd)).sum(2).reshape(-1)
        energy = segment_sum(atomic, graph.system, graph.n_systems)
        virial = u.new_zeros(graph.n_systems, 3, 3)
        return {"energy": energy, "atomic_energy": atomic, "forces": forces.reshape(-1, 3), "virial": virial}


def ring(size, seed=0, spread=0.0, numbers=(1, 2, 3, 4)):
    """A ring's atoms, of the elements in turn, off their sites by `spread` Å."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (size, 3)))
    return AtomicData(sites(size) + spread * noise, [numbers[i % len(numbers)] for i in range(size)])


def displacements(batch, size):
    """(n_atoms, 3) from the sites."""
    return (batch.positions.reshape(-1, size, 3) - sites(size)).reshape(-1, 3)
