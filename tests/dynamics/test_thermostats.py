"""Thermostats against closed forms, ASE and the canonical distribution."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import units as ase_units
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.md.nose_hoover_chain import NoseHooverChainNVT
from dynamics_samples import LennardJones, Well, argon, atoms_in_well, batch_of
from scipy import stats
from thermostat_samples import Lattice, displacements, ring

from carryall.data.units import kB
from carryall.dynamics import (
    FIRE,
    NVE,
    NVTLangevin,
    NVTNoseHoover,
    NVTVelocityRescaling,
    Ramp,
    initialize_velocities,
    integrators,
)
from carryall.dynamics.thermo import kinetic_energy
from carryall.errors import InputError

THREE_SIGMA = 0.0027
"""Probability of what lies beyond three standard errors."""


def within(samples, expected):
    """Whether the mean of independent samples is `expected` within three of its standard errors."""
    error = float(samples.std()) / math.sqrt(len(samples))
    return abs(float(samples.mean()) - expected) < 3 * error


@pytest.mark.parametrize(
    ("kind", "settings", "wells"),
    [
        (NVTLangevin, {"friction": 30.0, "seed": 4}, True),
        (NVTVelocityRescaling, {"tau": 10.0, "seed": 4, "removed_degrees": 0}, True),
        (NVTVelocityRescaling, {"tau": 10.0, "seed": 5}, False),
        (NVTNoseHoover, {"tau": 10.0, "removed_degrees": 0}, True),
        (NVTNoseHoover, {"tau": 10.0}, False),
    ],
)
def test_the_canonical_distribution_is_reached(kind, settings, wells):
    # Started at 450 K; 64 independent systems give the standard errors, whatever the correlation in time.
    kelvin, size, n = 300.0, 4, 64
    potential = Lattice(size) if wells else Lattice(size, k=0.0, q=0.0)
    batch = batch_of(*[ring(size)] * n)
    NVTLangevin(potential, 450.0, 0.5, friction=50.0, seed=1).run(batch, 300)
    initialize_velocities(batch, 450.0, seed=3, remove_translation=not wells)
    dynamics = kind(potential, kelvin, 0.5, **settings)
    dynamics.run(batch, 400)
    kinetic, virial = [], []
    for _ in range(300):
        dynamics.run(batch, 6)
        kinetic.append(kinetic_energy(batch))
        work = -(displacements(batch, size) * batch.forces).sum(1)
        virial.append(torch.zeros(n, dtype=torch.float64).index_add(0, batch.system, work))
    kT, degrees = kB * kelvin, 3 * size - (0 if wells else 3)
    variances = (torch.stack(kinetic) - degrees * kT / 2).square().mean(0)
    # Equipartition of the potential energy: the mean of u dU/du is kT for each degree of freedom, harmonic or not.
    found = {"mean": (torch.stack(kinetic).mean(0) / kT, degrees / 2), "variance": (variances / kT**2, degrees / 2)}
    found["virial"] = (torch.stack(virial).mean(0) / kT, degrees)
    for samples, expected in found.values():
        assert within(samples, expected)
        assert float(samples.std()) / n**0.5 < 0.04 * expected


# -- Nosé-Hoover chains


@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_chain_is_ase_step_by_step(length):
    images, settings = [], [(80.0, 4.0, 100.0), (30.0, 2.0, 40.0)]
    for seed in (1, 2):
        atoms = argon(seed=seed)
        atoms.set_velocities(initialize_velocities(batch_of(atoms), 50.0, seed=seed).velocities.numpy())
        atoms.calc = AseLennardJones(sigma=3.4, epsilon=0.0104, rc=8.5)
        images.append(atoms)
    batch = batch_of(*images)
    kelvin, timestep, tau = zip(*settings, strict=True)
    # ASE counts 3 N degrees of freedom
    dynamics = NVTNoseHoover(LennardJones(), kelvin, timestep, tau, length, removed_degrees=0)
    references = [
        NoseHooverChainNVT(atoms, step * ase_units.fs, temperature_K=warm, tdamp=time * ase_units.fs, tchain=length)
        for atoms, (warm, step, time) in zip(images, settings, strict=True)
    ]
    for _ in range(6):
        dynamics.run(batch, 5)
        for index, (atoms, reference) in enumerate(zip(images, references, strict=True)):
            reference.run(5)
            one = batch.get_data(index)
            np.testing.assert_allclose(one.positions, atoms.positions, atol=1e-10)
            np.testing.assert_allclose(one.velocities, atoms.get_velocities(), atol=1e-10)
            assert float(dynamics.conserved_energy(batch)[index]) == pytest.approx(reference.get_conserved_energy(), abs=1e-10)


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_the_error_of_the_conserved_energy_of_a_chain_falls_with_the_square_of_the_timestep(parts):
    start = initialize_velocities(batch_of(argon(seed=3)), 30.0, seed=3).to_data_list()
    worst = []
    for timestep in (8.0, 4.0, 2.0):
        batch = batch_of(*start)
        # the chain of another temperature is far from its steady state: it takes and gives much more than the error
        dynamics = NVTNoseHoover(LennardJones(), 60.0, timestep, tau=60.0, suzuki_yoshida=parts)
        energies, total = [], []
        for _ in range(int(240 / timestep)):
            dynamics.run(batch, 1)
            energies.append(float(dynamics.conserved_energy(batch)))
            total.append(float(batch.energy + kinetic_energy(batch)))
        worst.append(max(energies) - min(energies))
        assert max(total) - min(total) > 100 * worst[-1]
    for coarse, fine in itertools.pairwise(worst):
        assert 3.0 < coarse / fine < 5.5


def test_a_chain_can_be_turned_back():
    batch = initialize_velocities(batch_of(ring(4), ring(4, 1, 0.02)), 300.0)
    start = batch.positions.clone()
    dynamics = NVTNoseHoover(Lattice(4), [300.0, 600.0], 0.5, tau=20.0)
    dynamics.run(batch, 100)
    assert (batch.positions - start).abs().max() > 0.01
    batch.velocities = -batch.velocities
    batch.set("nose_hoover_eta_velocity", -batch.get("nose_hoover_eta_velocity"))
    dynamics.run(batch, 100)
    torch.testing.assert_close(batch.positions, start, atol=1e-10, rtol=0)
    torch.testing.assert_close(batch.get("nose_hoover_eta"), torch.zeros(2, 3, dtype=torch.float64), atol=1e-10, rtol=0)


def test_the_conserved_energy_of_a_chain_counts_a_changing_temperature():
    batch = initialize_velocities(batch_of(*[ring(4)] * 3), 300.0)
    ramp = Ramp((0, 200), (300.0, [300.0, 600.0, 50.0]))
    dynamics = NVTNoseHoover(Lattice(4), ramp, 0.25, tau=20.0)
    dynamics.run(batch, 1)
    energies, shifts = [], []
    for _ in range(300):
        dynamics.run(batch, 1)
        energies.append(dynamics.conserved_energy(batch))
        shifts.append(batch.get("nose_hoover_shift"))
    spread = torch.stack(energies).amax(0) - torch.stack(energies).amin(0)
    given = torch.stack(shifts).amax(0) - torch.stack(shifts).amin(0)
    assert (spread < 0.05 * kB * 300.0).all()
    assert float(given[0]) == 0.0
    assert (given[1:] > 3 * spread[1:]).all()


# -- velocity rescaling


def one_factor(n, n_atoms, tau, kelvin=300.0, start=150.0):
    """n systems of free atoms with the same velocities, before and after one step."""
    batch = batch_of(*[atoms_in_well(n_atoms, 1)] * n)
    batch.velocities = batch.velocities * math.sqrt(start / 300.0)
    before = batch.velocities.clone()
    dynamics = NVTVelocityRescaling(Well(k=0.0), kelvin, 1.0, tau, seed=7, removed_degrees=0)
    dynamics.run(batch, 1)
    return before, batch


@pytest.mark.parametrize(("n_atoms", "tau"), [(1, 0.5), (2, 3.0), (30, 20.0)])
def test_one_factor_has_the_distribution_of_an_ornstein_uhlenbeck_process(n_atoms, tau):
    # Of velocities that each relax as c^(1/2) v + ((1 - c) kT / m)^(1/2) R, only the kinetic energy is taken over:
    # it is a noncentral chi-squared variable.
    before, batch = one_factor(4000, n_atoms, tau)
    c, kT = math.exp(-1.0 / tau), kB * 300.0
    kinetic = 0.5 * float((batch.masses[:n_atoms, None] * before[:n_atoms].square()).sum())
    reduced = 2.0 * kinetic_energy(batch).numpy() / ((1 - c) * kT)
    expected = stats.ncx2(3 * n_atoms, 2.0 * kinetic * c / ((1 - c) * kT))
    assert stats.kstest(reduced, expected.cdf).pvalue > THREE_SIGMA
    turned = (batch.velocities * before)[::n_atoms, 0] < 0
    chance = stats.norm.cdf(-math.sqrt(2.0 * kinetic * c / ((1 - c) * kT)))
    assert abs(float(turned.double().mean()) - chance) <= 3 * math.sqrt(chance * (1 - chance) / 4000)


def test_a_single_degree_of_freedom_is_an_ornstein_uhlenbeck_process_itself():
    data = atoms_in_well(1, 1).replace(atom_extras={"move_mask": torch.tensor([[True, False, False]])})
    batch = batch_of(*[data] * 4000)
    speed = 0.02
    batch.velocities = torch.tensor([[speed, 0.0, 0.0]], dtype=torch.float64).expand(4000, 3).clone()
    NVTVelocityRescaling(Well(k=0.0), 300.0, 1.0, 2.0, seed=3).run(batch, 1)
    mass, c = float(batch.masses[0]), math.exp(-0.5)
    expected = stats.norm(math.sqrt(c) * speed, math.sqrt((1 - c) * kB * 300.0 / mass))
    assert stats.kstest(batch.velocities[:, 0].numpy(), expected.cdf).pvalue > THREE_SIGMA


def test_a_hot_start_relaxes_with_the_time_constant():
    n, tau, kelvin = 300, [50.0, 20.0], 300.0
    batch = initialize_velocities(batch_of(*[atoms_in_well(5, 1, velocities=False)] * (2 * n)), 1500.0, seed=2, exact=True)
    times = [tau[i % 2] for i in range(2 * n)]
    dynamics = NVTVelocityRescaling(Well(k=0.0), kelvin, 2.0, times, seed=3)
    for step in (1, 5, 20, 60):
        dynamics.run(batch, step - dynamics.step_count)
        for part in range(2):
            found = kinetic_energy(batch)[part::2] / (6 * kB)
            assert within(found, kelvin + (1500.0 - kelvin) * math.exp(-step * 2.0 / tau[part]))


def test_towards_zero_kelvin_the_kinetic_energy_decays_exactly():
    batch = batch_of(atoms_in_well(3, 1), atoms_in_well(2, 2))
    start = kinetic_energy(batch)
    NVTVelocityRescaling(Well(k=0.0), 0.0, 1.5, tau=10.0).run(batch, 20)
    torch.testing.assert_close(kinetic_energy(batch), start * math.exp(-3.0), rtol=1e-12, atol=0)


def test_with_an_endless_time_constant_it_is_velocity_verlet_bit_for_bit():
    a, b = batch_of(argon(seed=1)), batch_of(argon(seed=1))
    for batch in (a, b):
        initialize_velocities(batch, 40.0)
    NVE(LennardJones(), 4.0).run(a, 20)
    dynamics = NVTVelocityRescaling(LennardJones(), 300.0, 4.0, tau=1e30)
    dynamics.run(b, 20)
    assert torch.equal(a.positions, b.positions)
    assert torch.equal(a.velocities, b.velocities)
    assert not b.get("velocity_rescaling_heat").any()


# -- Langevin dynamics


def test_a_free_particle_forgets_its_velocity_exponentially():
    batch = initialize_velocities(batch_of(atoms_in_well(3000, 1, velocities=False)), 300.0, seed=3, remove_translation=False)
    start = batch.velocities.flatten()
    langevin = NVTLangevin(Well(k=0.0), 300.0, 2.0, friction=10.0, seed=5)
    for _ in range(4):
        langevin.run(batch, 20)
        # sum of v(0) v(t) over independent components: mean c v(0)², variance (1 - c²) v(0)² kT / m, given the start
        c = math.exp(-10.0e-3 * 2.0 * langevin.step_count)
        product = (batch.velocities.flatten() * start).sum() / start.square().sum()
        spread = math.sqrt((1 - c * c) * kB * 300.0 / float(batch.masses[0]) / float(start.square().sum()))
        assert abs(float(product) - c) < 3 * spread


def test_at_zero_kelvin_a_free_particle_slows_down_exactly():
    batch = batch_of(atoms_in_well(3, 1))
    start = batch.velocities.clone()
    NVTLangevin(Well(k=0.0), 0.0, 2.0, friction=10.0).run(batch, 50)
    torch.testing.assert_close(batch.velocities, start * math.exp(-1.0), rtol=1e-12, atol=0)


# -- heat


@pytest.mark.parametrize(("kind", "settings"), [(NVTLangevin, {"friction": 20.0}), (NVTVelocityRescaling, {"tau": 30.0})])
def test_without_forces_all_energy_that_is_gained_is_heat(kind, settings):
    batch = batch_of(atoms_in_well(5, 1), atoms_in_well(2, 2))
    dynamics = kind(Well(k=0.0), [300.0, 900.0], 1.0, seed=3, **settings)
    start = kinetic_energy(batch)
    dynamics.run(batch, 100)
    assert ((kinetic_energy(batch) - start).abs() > 1e-3).all()
    torch.testing.assert_close(dynamics.conserved_energy(batch), start, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "settings"), [(NVTLangevin, {"friction": 20.0}), (NVTVelocityRescaling, {"tau": 30.0})])
def test_the_error_of_the_effective_energy_falls_with_the_square_of_the_timestep(kind, settings):
    errors = []
    for timestep in (2.0, 1.0, 0.5):
        batch = initialize_velocities(batch_of(*[ring(4)] * 60), 300.0, seed=1)
        dynamics = kind(Lattice(4, k=1.0, q=0.0, c=1.0, b=0.0), 300.0, timestep, seed=3, **settings)
        dynamics.run(batch, 1)
        start = dynamics.conserved_energy(batch)
        dynamics.run(batch, int(60 / timestep))
        errors.append(float((dynamics.conserved_energy(batch) - start).square().mean().sqrt()))
    assert errors[0] < 0.3 * kB * 300.0
    for coarse, fine in itertools.pairwise(errors):
        assert 3.0 < coarse / fine < 5.5


# -- settings


@pytest.mark.parametrize("kind", [NVTNoseHoover, NVTVelocityRescaling])
def test_a_system_at_rest_is_set_aside_since_no_factor_moves_it(kind):
    batch = batch_of(atoms_in_well(3, 1), atoms_in_well(3, 2))
    batch.velocities = batch.velocities * torch.tensor([1.0] * 3 + [0.0] * 3, dtype=torch.float64)[:, None]
    kind(Well(), 300.0).run(batch, 3)
    assert "at rest" in batch.info[1]["failure"]
    assert "failure" not in batch.info[0]
    # after another stage it is not asked: that one sets it moving
    batch, potential = batch_of(atoms_in_well(3, 1, velocities=False)), Well()
    (FIRE(potential, n_steps=2) + kind(potential, 300.0, n_steps=2)).run(batch)
    assert "failure" not in batch.info[0]


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (NVTNoseHoover, {"temperature": 0.0}, "temperature must be positive"),
        (NVTNoseHoover, {"tau": 0.0}, "tau must be positive"),
        (NVTNoseHoover, {"chain_length": 0}, "chain_length must be a whole number of at least 1, got 0"),
        (NVTNoseHoover, {"chain_length": 2.0}, "chain_length must be a whole number"),
        (NVTNoseHoover, {"suzuki_yoshida": 4}, "suzuki_yoshida must be 1, 3 or 5, got 4"),
        (NVTNoseHoover, {"removed_degrees": 1}, "removed_degrees must be 3"),
        (NVTVelocityRescaling, {"tau": [1.0, -1.0]}, "tau must be positive"),
        (NVTVelocityRescaling, {"temperature": -1.0}, "temperature must be zero or more"),
        (NVTVelocityRescaling, {"seed": 1.5}, "seed must be an integer"),
        (NVTVelocityRescaling, {"removed_degrees": True}, "removed_degrees must be 3"),
    ],
)
def test_settings_out_of_range_are_refused(kind, setting, message):
    with pytest.raises(InputError, match=message):
        kind(Well(), **setting)


def test_the_page_on_integrators_runs():
    text = (Path(__file__).parents[2] / "docs" / "integrators.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"structures": [atoms_in_well(3, 1), atoms_in_well(2, 2)], "potential": Well()}
    exec(first.replace("10_000", "10") + second, names)
    assert names["drift"].shape == (2,)
    described = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert set(described) == {name for name in vars(integrators) if name[0] == "N"}
