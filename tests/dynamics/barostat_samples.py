"""A potential of scaled coordinates, volume and shape, whose constant-pressure ensemble is known in closed form."""

import numpy as np
import torch

from carryall.data import AtomicData, Batch
from carryall.data.units import GPa, kB
from carryall.dynamics.integrators.cell_rescaling import NPTStochasticCellRescaling
from carryall.dynamics.integrators.mtk import NPH, NPT
from carryall.graph import PotentialSpec

MASS = 39.948


class ScaledSprings:
    """Springs from each atom to the centre of its system in scaled coordinates, and springs on the shape of the cell.

    U = c / 2 (V / V0)^gamma V0^(2/3) sum |s_i - <s>|² + k / 2 (sum a_i² + sum u_ij²), with h = T Q, T lower triangular, Q
    a rotation, a_i = ln T_ii - <ln T>, u_ij = T_ij / T_ii (i > j). At constant pressure the volume is gamma-distributed:
    the momenta and positions of N - 1 atoms give V^(N - 1), the springs V^(-3 gamma (N - 1) / 2), and the measure of the cell
    (dV, dh_1 dh_2 dh_3, or det(h)^-2 d^9 h) is V dln(V) times a measure in which a_i and u_ij are uniform.
    """

    def __init__(self, c=0.5, gamma=1 / 3, k=0.5, v0=400.0, cutoff=0.1):
        self.c, self.gamma, self.k, self.v0 = c, gamma, k, v0
        self.spec = PotentialSpec(cutoff, ("Ar",))

    def volume_shape(self, n_atoms):
        """Shape parameter of the gamma distribution of P V / (k_B T)."""
        return (n_atoms - 1) * (1 - 1.5 * self.gamma) + 1

    def __call__(self, graph, *, atomic_virial=False):
        r, h, system = graph.positions.numpy(), graph.cell.numpy(), graph.system.numpy()
        n, volume = len(h), np.abs(np.linalg.det(h))
        counts = np.bincount(system, minlength=n)[:, None]
        inverse = np.linalg.inv(h)
        s = np.einsum("ai,aij->aj", r, inverse[system])
        centre = np.stack([np.bincount(system, s[:, k], n) for k in range(3)], 1) / counts
        x = s - centre[system]
        stiffness = self.c * (volume / self.v0) ** self.gamma * self.v0 ** (2 / 3)
        atomic = 0.5 * stiffness[system] * (x * x).sum(1)
        springs = np.bincount(system, atomic, n)
        forces = -stiffness[system, None] * np.einsum("aj,aij->ai", x, inverse[system])
        shape, slope = self.shape_energy(h)
        virial = -self.gamma * springs[:, None, None] * np.eye(3) - slope
        atomic = atomic + (shape / counts[:, 0])[system]
        values = {"energy": springs + shape, "atomic_energy": atomic, "forces": forces, "virial": virial}
        return {key: torch.from_numpy(value) for key, value in values.items()}

    def evaluate_systems(self, neighbors, systems):
        """No neighbours are needed."""
        return self(systems)

    def shape_energy(self, h):
        """Energy (n,) of the shape and its derivative (n, 3, 3) by a strain that takes h to h (1 + e)."""
        triangle, u, a = shape_of(h)
        energy = 0.5 * self.k * ((a * a).sum(1) + (u * u).sum((1, 2)))
        slope = np.zeros_like(h)
        for i in range(3):
            slope[:, i, i] = a[:, i] - (u[:, i] ** 2).sum(1) + (u[:, :, i] ** 2).sum(1)
            for j in range(i):
                slope[:, i, j] = slope[:, j, i] = u[:, i, j] + (u[:, i + 1 :, j] * u[:, i + 1 :, i]).sum(1)
        q = np.linalg.solve(triangle, h)
        return energy, self.k * q.transpose(0, 2, 1) @ slope @ q


def shape_of(h):
    """T (n, 3, 3), its off-diagonal elements u over the diagonal of their row, and a (n, 3), as in `ScaledSprings`."""
    triangle = np.linalg.cholesky(h @ h.transpose(0, 2, 1))
    diagonal = np.diagonal(triangle, axis1=1, axis2=2)
    u = np.tril(triangle, -1) / diagonal[:, :, None]
    logs = np.log(diagonal)
    return triangle, u, logs - logs.mean(1, keepdims=True)


class LooseAtoms(ScaledSprings):
    """Atoms that feel nothing: an ideal gas."""

    def __init__(self):
        super().__init__(c=0.0, gamma=0.0, k=0.0)


def gas(n_atoms=16, volume=400.0, kelvin=300.0, seed=0, spread=0.03, shape=None):
    """Atoms at random about a centre in a cubic cell (or one of this shape), with velocities and the centre of mass at rest."""
    rng = np.random.default_rng(seed)
    cell = np.eye(3) if shape is None else np.asarray(shape, dtype=float)
    cell = cell * (volume / abs(np.linalg.det(cell))) ** (1 / 3)
    velocities = rng.normal(size=(n_atoms, 3)) * np.sqrt(kB * kelvin / MASS)
    velocities -= velocities.mean(0)
    positions = (0.5 + spread * rng.normal(size=(n_atoms, 3))) @ cell
    fixed = {"masses": np.full(n_atoms, MASS), "pbc": [True] * 3, "velocities": velocities}
    return AtomicData(positions, [18] * n_atoms, cell=cell, **fixed)


def canonical_gases(potential, mode, pressures, n_atoms, kelvin):
    """A batch with one system for each pressure (GPa), drawn from its constant-pressure ensemble."""
    kT, systems = kB * kelvin, []
    for seed, pressure in enumerate(pressures):
        rng = np.random.default_rng(1000 + seed)
        volume = rng.gamma(potential.volume_shape(n_atoms)) * kT / (pressure * GPa)
        shape = np.eye(3)
        if mode != "isotropic" and potential.k:
            logs, u = rng.normal(size=(2, 3)) * np.sqrt(kT / potential.k)
            shape = np.diag(np.exp(logs - logs.mean()))
            if mode == "triclinic":
                for (i, j), value in zip(((1, 0), (2, 0), (2, 1)), u, strict=True):
                    shape[i, j] = value * shape[i, i]
        stiffness = potential.c * (volume / potential.v0) ** potential.gamma * potential.v0 ** (2 / 3)
        spread = np.sqrt(kT / stiffness) if stiffness else 0.3
        systems.append(gas(n_atoms, volume, kelvin, seed, spread, shape))
    return Batch.from_data_list(systems)


def triclinic_gas(seed=0, **settings):
    """A gas in a skewed cell."""
    return gas(seed=seed, shape=[[1.0, 0.0, 0.0], [0.3, 1.1, 0.0], [-0.2, 0.1, 0.9]], **settings)


def equal_state(one, other):
    """Whether two batches hold the same keys with the same bits."""
    assert sorted(one.keys()) == sorted(other.keys())
    different = [key for key in sorted(one.keys()) if not torch.equal(one.get(key), other.get(key))]
    assert not different, f"differ: {different}"
    return True


MODES = ("isotropic", "anisotropic", "triclinic")
FAST = {"pressure": 0.12, "timestep": 2.0, "barostat_tau": 300.0, "temperature": 300.0}
BAROSTATS = {
    "NPH": lambda potential, **settings: NPH(potential, **{**FAST, **settings}),
    "NPT": lambda potential, **settings: NPT(potential, **{**FAST, "tau": 60.0, **settings}),
    "rescaling": lambda potential, **settings: NPTStochasticCellRescaling(
        potential, **{**FAST, "tau": 60.0, "compressibility": 5.0, "seed": 3, **settings}
    ),
}
