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

    U = sum_i k u_i² / 2 + q sum_c u_ic⁴ / 4 + sum_i c d_i² / 2 + b sum_c d_ic⁴ / 4, with d_i = u_(i+1) - u_i, u from the site.
    """

    def __init__(self, size, k=1.0, q=40.0, c=1.0, b=40.0):
        self.spec, self.size, self.k, self.q, self.c, self.b = PotentialSpec(0.1, ("H", "He")), size, k, q, c, b

    def __call__(self, graph, *, atomic_virial=False):
        u = graph.positions.reshape(-1, self.size, 3) - sites(self.size)
        d = u.roll(-1, 1) - u
        u2, d2 = u * u, d * d
        pull = d * (self.c + self.b * d2)
        forces = pull - pull.roll(1, 1) - u * (self.k + self.q * u2)
        atomic = (u2 * (0.5 * self.k + 0.25 * self.q * u2) + d2 * (0.5 * self.c + 0.25 * self.b * d2)).sum(2).reshape(-1)
        energy = segment_sum(atomic, graph.system, graph.n_systems)
        virial = u.new_zeros(graph.n_systems, 3, 3)
        return {"energy": energy, "atomic_energy": atomic, "forces": forces.reshape(-1, 3), "virial": virial}


def ring(size, seed=0, spread=0.0, numbers=(1, 2), kelvin=None):
    """A ring's atoms, of the elements in turn, off their sites by `spread` Å."""
    rng = np.random.default_rng(seed)
    return AtomicData(sites(size) + spread * rng.normal(0, 1, (size, 3)), [numbers[i % len(numbers)] for i in range(size)])
