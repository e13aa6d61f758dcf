"""Barostats against ensembles known in closed form, and against an equation of state.

A mean is taken over each system's samples; systems are independent, so the spread between them gives the standard error.
"""

import math

import numpy as np
import pytest
from barostat_samples import LooseAtoms, ScaledSprings, canonical_gases, shape_of
from dynamics_samples import argon, batch_of

from carryall.data.units import GPa, fs, kB
from carryall.dynamics import NVTLangevin, initialize_velocities
from carryall.dynamics.integrators.cell_motion import CELL_DEGREES, squared
from carryall.dynamics.integrators.cell_rescaling import NPTStochasticCellRescaling
from carryall.dynamics.integrators.mtk import NPT
from carryall.dynamics.thermo import kinetic_energy, pressure
from carryall.models.eager import EagerPotential
from carryall.models.pair import LennardJones

KELVIN, KT = 300.0, 300.0 * kB
PRESSURES = np.tile([0.1, 0.2], 32)
"""GPa, one for each system: at each of the two, P V / kT has the same distribution."""


def chain_barostat(potential, mode):
    return NPT(potential, KELVIN, PRESSURES, 4.0, tau=50.0, barostat_tau=100.0, mode=mode)


def random_barostat(potential, mode):
    # with the compressibility that the volumes have, 1 / P, they relax in barostat_tau
    return NPTStochasticCellRescaling(potential, KELVIN, PRESSURES, 4.0, 50.0, 500.0, 1 / PRESSURES, mode, seed=5)


def samples(barostat, batch, n_steps, every=10):
    """Volumes and kinetic energies, P V / kT and K / kT, and cells: (samples, n_systems, ...)."""
    volumes, kinetic, cells, rates = [], [], [], []
    for _ in range(n_steps // every):
        barostat.run(batch, every)
        volumes.append(batch.volume.numpy() * PRESSURES * GPa / KT)
        kinetic.append(kinetic_energy(batch).numpy() / KT)
        cells.append(batch.cell.numpy())
        if isinstance(barostat, NPT):
            inertia = (3 * (len(batch.positions) / batch.n_systems - 1) + 3) * KT * (100.0 * fs) ** 2 / 3
            rates.append(inertia * squared(batch.get("npt_rate").numpy()) / KT)
    assert not any("failure" in one for one in batch.info)
    return tuple(np.array(one) for one in (volumes, kinetic, cells, rates))


def assert_mean(values, expected, what):
    """The mean of (samples, n_systems) is this, within 3 standard errors."""
    means = values.mean(0)
    error = means.std(ddof=1) / math.sqrt(len(means))
    assert abs(means.mean() - expected) < 3 * error, f"{what}: {means.mean():.4f} +- {error:.4f}, expected {expected:.4f}"
    return error


def assert_gamma(values, shape, what):
    """Mean and variance of a gamma distribution of unit scale."""
    error = assert_mean(values, shape, what)
    assert_mean((values - shape) ** 2, shape, f"variance of {what}")
    return error / shape


def check(barostat, potential, mode, n_atoms, n_steps):
    batch = canonical_gases(potential, mode, PRESSURES, n_atoms, KELVIN)
    barostat.run(batch, 150)
    volumes, kinetic, cells, rates = samples(barostat, batch, n_steps)
    k = potential.volume_shape(n_atoms)
    assert assert_gamma(volumes, k, "volume") < 0.035
    assert_mean(volumes[:, ::2], k, "volume at the lower pressure")
    assert_mean(volumes[:, 1::2], k, "volume at the higher pressure")
    assert_gamma(kinetic, 1.5 * (n_atoms - 1), "kinetic energy")
    free = CELL_DEGREES[mode]
    if free > 1:
        _, u, a = shape_of(cells.reshape(-1, 3, 3))
        shape = 0.5 * potential.k * ((a * a).sum(1) + (u * u).sum((1, 2))) / KT
        assert_gamma(shape.reshape(volumes.shape), (free - 1) / 2, "energy of the shape")
    if len(rates):
        assert_gamma(rates / 2, free / 2, "kinetic energy of the cell")


@pytest.mark.parametrize("mode", CELL_DEGREES)
def test_chains_and_cell_with_inertia_sample_the_ensemble(mode):
    potential = ScaledSprings(k=2.0)
    check(chain_barostat(potential, mode), potential, mode, n_atoms=8, n_steps=600)


@pytest.mark.parametrize("mode", CELL_DEGREES)
def test_cell_rescaling_samples_the_ensemble(mode):
    potential = ScaledSprings(k=2.0)
    check(random_barostat(potential, mode), potential, mode, n_atoms=16, n_steps=600)


@pytest.mark.parametrize("make", [chain_barostat, random_barostat])
def test_volumes_of_an_ideal_gas(make):
    potential = LooseAtoms()
    check(make(potential, "isotropic"), potential, "isotropic", n_atoms=6, n_steps=600)


def replicas(lengths):
    """Argon crystals of 108 atoms, with lattice constants and with velocities."""
    crystals = [argon(3, 0.15, seed, a) for seed, a in enumerate(lengths)]
    return initialize_velocities(batch_of(*crystals), 40.0, seed=1)


def mean_and_error(values):
    """Of (samples, n_systems)."""
    means = np.mean(values, axis=0)
    return means.mean(), means.std(ddof=1) / math.sqrt(len(means))


@pytest.mark.parametrize("kind", ["chains", "rescaling"])
def test_argon_has_the_pressure_of_the_barostat_at_constant_volume(kind):
    # A finite system's pressure at the mean volume is lower by some 4 kT / V, 6e-4 GPa here: well below the error.
    potential = EagerPotential(LennardJones(("Ar",), [0.0104], [3.4], 6.5, "switch"))
    targets, each = (0.1, 0.5), 5
    settings = {"temperature": 40.0, "pressure": np.repeat(targets, each), "timestep": 8.0, "tau": 200.0}
    if kind == "chains":
        barostat = NPT(potential, barostat_tau=400.0, **settings)
    else:
        barostat = NPTStochasticCellRescaling(potential, barostat_tau=300.0, compressibility=0.4, seed=2, **settings)
    batch, volumes = replicas([5.3] * each + [5.1] * each), []
    barostat.run(batch, 200)
    for _ in range(60):
        barostat.run(batch, 5)
        volumes.append(batch.volume.numpy())
    found, errors = [], []
    for part in (slice(0, each), slice(each, None)):
        volume, error = mean_and_error(np.array(volumes)[:, part])
        fixed, pressures = replicas([(volume / 27) ** (1 / 3)] * each), []
        langevin = NVTLangevin(potential, 40.0, 8.0, friction=5.0, seed=4)
        langevin.run(fixed, 200)
        for _ in range(40):
            langevin.run(fixed, 5)
            pressures.append(pressure(fixed).numpy())
        found.append((volume, *mean_and_error(pressures)))
        errors.append(error)
    slope = (found[1][1] - found[0][1]) / (found[1][0] - found[0][0])
    for target, (_, value, of_value), of_volume in zip(targets, found, errors, strict=True):
        error = math.hypot(of_value, slope * of_volume)
        assert error < 0.01
        assert abs(value - target) < 3 * error, f"{value:.4f} +- {error:.4f} GPa, the barostat's is {target}"
