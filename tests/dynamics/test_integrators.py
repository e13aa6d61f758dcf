"""Integrators against ASE, against physics, and against themselves in other batches and processes."""

import itertools
import math

import numpy as np
import pytest
import torch
from ase import units as ase_units
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.md.verlet import VelocityVerlet
from dynamics_samples import LennardJones, Well, argon, atoms_in_well, batch_of, cluster

from carryall.data import AtomicData
from carryall.data.units import GPa, fs, kB
from carryall.dynamics import (
    NVE,
    EnergyDriftMonitor,
    NVTLangevin,
    NVTNoseHoover,
    NVTVelocityRescaling,
    Ramp,
    SizeAwareSampler,
    initialize_velocities,
    load_checkpoint,
    save_checkpoint,
)
from carryall.dynamics.constraints import FixAtoms, FixCenterOfMass
from carryall.dynamics.thermo import degrees_of_freedom, kinetic_energy, pressure, temperature
from carryall.errors import InputError

ASE_LJ = {"sigma": 3.4, "epsilon": 0.0104, "rc": 8.5}
KINDS = [NVE, NVTLangevin, NVTVelocityRescaling, NVTNoseHoover]
THERMOSTATS = KINDS[1:]


def moving_argon(seed, kelvin=40.0):
    atoms = argon(seed=seed)
    batch = initialize_velocities(batch_of(atoms), kelvin, seed=seed)
    atoms.set_velocities(batch.velocities.numpy())
    return atoms


def test_velocity_verlet_is_ase_step_by_step():
    images = [moving_argon(1), moving_argon(2, 80.0)]
    batch = batch_of(*images)
    nve = NVE(LennardJones(), timestep=[5.0, 2.0])
    for atoms in images:
        atoms.calc = AseLennardJones(**ASE_LJ)
    references = [VelocityVerlet(atoms, timestep=h * ase_units.fs) for atoms, h in zip(images, (5.0, 2.0), strict=True)]
    for _ in range(10):
        nve.run(batch, 1)
        for index, reference in enumerate(references):
            reference.run(1)
            one = batch.get_data(index)
            np.testing.assert_allclose(one.positions, images[index].positions, atol=1e-10)
            np.testing.assert_allclose(one.velocities, images[index].get_velocities(), atol=1e-10)
    np.testing.assert_allclose(kinetic_energy(batch), [atoms.get_kinetic_energy() for atoms in images], rtol=1e-9)
    np.testing.assert_allclose(temperature(batch), [atoms.get_temperature() for atoms in images], rtol=1e-9)
    expected = [-atoms.get_stress(include_ideal_gas=True)[:3].mean() / ase_units.GPa for atoms in images]
    np.testing.assert_allclose(pressure(batch), expected, rtol=1e-7)
    np.testing.assert_allclose(batch.stress[0], images[0].get_stress(voigt=False), atol=1e-10)


def test_energy_error_falls_with_the_square_of_the_timestep():
    atoms = moving_argon(3, 30.0)
    worst = []
    for timestep in (8.0, 4.0, 2.0):
        monitor = EnergyDriftMonitor(interval=1)
        NVE(LennardJones(), timestep, hooks=[monitor]).run(batch_of(atoms), int(160 / timestep))
        worst.append(float(monitor.largest))
    assert worst[0] < 1e-4
    for coarse, fine in itertools.pairwise(worst):
        assert 3.0 < coarse / fine < 5.5


def test_time_can_be_turned_back():
    batch = batch_of(atoms_in_well(5, 1), atoms_in_well(3, 2))
    start = batch.positions.clone()
    nve = NVE(Well(k=2.0), 2.0)
    nve.run(batch, 200)
    assert (batch.positions - start).abs().max() > 0.01
    batch.velocities = -batch.velocities
    nve.run(batch, 200)
    torch.testing.assert_close(batch.positions, start, atol=1e-10, rtol=0)


def test_langevin_samples_the_canonical_kinetic_energy():
    # Atoms in wells of their own: every degree of freedom is independent; samples lie further apart than the relaxation time.
    n_atoms, kelvin, every, n_samples = 150, 300.0, 40, 40
    batch = initialize_velocities(batch_of(atoms_in_well(n_atoms, 1, velocities=False)), kelvin, seed=3)
    langevin = NVTLangevin(Well(k=3.0), temperature=kelvin, timestep=2.0, friction=50.0, seed=5)
    langevin.run(batch, 50)
    samples = []
    for _ in range(n_samples):
        langevin.run(batch, every)
        samples.append(0.5 * batch.masses[:, None] * batch.velocities.square())
    energies = torch.stack(samples)
    n, mean = energies.numel(), kB * kelvin / 2
    # Half a chi-squared of one degree of freedom times kT: standard deviation mean * sqrt(2); its variance has kurtosis 15.
    assert abs(float(energies.mean()) - mean) < 3 * mean * math.sqrt(2 / n)
    assert abs(float(energies.var()) - 2 * mean**2) < 3 * 2 * mean**2 * math.sqrt(14 / n)
    spread = batch.positions.square().mean() * 3.0
    assert abs(float(spread) - kB * kelvin) < 4 * kB * kelvin * math.sqrt(2 / (3 * n_atoms))


def test_each_system_has_its_own_temperature_friction_and_timestep():
    batch = batch_of(*(atoms_in_well(200, n, velocities=False) for n in range(3)))
    NVTLangevin(Well(k=0.0), temperature=[100.0, 300.0, 0.0], timestep=[1.0, 2.0, 1.0], friction=[100.0, 100.0, 200.0]).run(
        batch, 150
    )
    found = temperature(batch)
    for index, kelvin in enumerate((100.0, 300.0)):
        assert abs(float(found[index]) - kelvin) < 4 * kelvin * math.sqrt(2 / 600)
    assert float(found[2]) < 5.0


def test_without_friction_langevin_is_velocity_verlet():
    data = atoms_in_well(4, 2)
    a, b = batch_of(data), batch_of(data)
    NVE(Well()).run(a, 20)
    NVTLangevin(Well(), friction=0.0).run(b, 20)
    torch.testing.assert_close(a.positions, b.positions, atol=1e-13, rtol=0)


def bits(batch, index=None):
    """Everything that a batch, or one system of it, holds."""
    one = batch if index is None else batch.index_select([index])
    return {key: one.get(key).clone() for key in one.keys()}  # noqa: SIM118


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 2, 11])
def test_a_system_moves_alike_alone_and_in_any_batch(kind, place):
    data = atoms_in_well(7, 9)
    others = [atoms_in_well(2 + n, n) for n in range(place + 2)]
    group = [*others[:place], data, *others[place:]]
    batch, alone = batch_of(*group), batch_of(data)
    batch.set("system_id", torch.tensor([(7 if one is data else 20 + i) for i, one in enumerate(group)]), level="system")
    alone.set("system_id", torch.tensor([7]), level="system")
    for one in (batch, alone):
        initialize_velocities(one, 200.0, seed=4)
        dynamics = kind(Well())
        dynamics.run(one, 10)
        assert torch.isfinite(dynamics.conserved_energy(one)).all()
    assert_same_bits(bits(batch, place), bits(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_systems_that_wait_keep_every_bit_and_their_state(kind):
    group = [atoms_in_well(3, 1), atoms_in_well(4, 2), atoms_in_well(2, 3), atoms_in_well(5, 4)]
    batch, free = batch_of(*group), batch_of(*group)
    settings = {} if kind is NVE else {"temperature": Ramp((0, 6), (300.0, 600.0))}
    dynamics = kind(Well(), **settings)
    dynamics.run(batch, 3)
    batch.status = torch.tensor([0, 1, 0, 1])
    before = [bits(batch, i) for i in range(4)]
    dynamics.run(batch, 4)
    for index in (1, 3):
        assert_same_bits(bits(batch, index), before[index])
    batch.status = torch.tensor([1, 0, 1, 0])
    dynamics.run(batch, 4)
    batch.status = torch.zeros(4, dtype=torch.int64)
    kind(Well(), **settings).run(free, 7)
    assert_same_bits(bits(batch), bits(free))


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_each_system_are_those_of_a_run_of_its_own(kind):
    group = [atoms_in_well(3, 1), atoms_in_well(4, 2), atoms_in_well(5, 3)]
    settings = {"timestep": [1.0, 2.0, 0.5]}
    if kind is not NVE:
        settings["temperature"] = Ramp((0, 4, 6), (300.0, [100.0, 200.0, 300.0], [50.0, 900.0, 1.0]))
    if kind in (NVTVelocityRescaling, NVTNoseHoover):
        settings["tau"] = [20.0, 10.0, 50.0]
    if kind is NVTLangevin:
        settings["friction"] = [1.0, 100.0, 10.0]
    batch = batch_of(*group)
    kind(Well(), **settings).run(batch, 8)
    for index, data in enumerate(group):
        alone = batch_of(data)
        alone.set("system_id", torch.tensor([index]), level="system")
        own = {name: value[index] for name, value in settings.items() if name != "temperature"}
        if kind is not NVE:
            ends = ((100.0, 50.0), (200.0, 900.0), (300.0, 1.0))[index]
            own["temperature"] = Ramp((0, 4, 6), (300.0, *ends))
        kind(Well(), **own).run(alone, 8)
        assert_same_bits(bits(batch, index), bits(alone))


@pytest.mark.parametrize("kind", THERMOSTATS)
def test_a_ramp_is_followed_step_by_step(kind):
    batch = batch_of(atoms_in_well(3, 1), atoms_in_well(4, 2))
    dynamics = kind(Well(), Ramp((2, 6), (300.0, [500.0, 100.0])))
    for step in range(9):
        dynamics.run(batch, 1)
        expected = [kB * np.interp(step, (2, 6), (300.0, end)) for end in (500.0, 100.0)]
        np.testing.assert_allclose(batch.get(dynamics.key("kT")), expected, rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint(kind, tmp_path):
    settings = {} if kind is NVE else {"temperature": Ramp((0, 9), (50.0, [80.0, 20.0]))}

    def made():
        return initialize_velocities(batch_of(cluster(3), cluster(4, 1)), 50.0), kind(LennardJones(), **settings)

    whole, dynamics = made()
    dynamics.run(whole, 10)
    assert dynamics.steps(whole).tolist() == [10, 10]
    parts, dynamics = made()
    dynamics.run(parts, 4)
    save_checkpoint(tmp_path / "state.pt", parts, dynamics)
    dynamics.run(parts, 6)
    assert_same_bits(bits(parts), bits(whole))
    dynamics = made()[1]
    resumed = load_checkpoint(tmp_path / "state.pt", dynamics)
    dynamics.run(resumed, 6)
    assert_same_bits(bits(resumed), bits(whole))


@pytest.mark.parametrize("kind", THERMOSTATS)
def test_in_flight_a_system_moves_as_alone(kind):
    group = [atoms_in_well(2 + n % 4, n) for n in range(7)]
    ramp = Ramp((0, 8), (300.0, [300.0 + 10 * n for n in range(7)]))
    dynamics = kind(Well(), ramp, n_steps=8, sampler=SizeAwareSampler(group, max_atoms=9), refill_frequency=3)
    result = dynamics.run()
    assert result.system_id.tolist() == list(range(7))
    for index, data in enumerate(group):
        alone = batch_of(data)
        alone.set("system_id", torch.tensor([index]), level="system")
        kind(Well(), ramp).run(alone, 8)
        found = bits(result, index)
        for key in ("positions", "velocities", *(key for key in bits(alone) if key.startswith(dynamics.prefix))):
            assert torch.equal(found[key], alone.get(key)), key


def test_a_new_object_goes_on_with_new_noise():
    batch, whole = batch_of(atoms_in_well()), batch_of(atoms_in_well())
    for _ in range(2):
        NVTLangevin(Well(), seed=1).run(batch, 3)
    NVTLangevin(Well(), seed=1).run(whole, 6)
    assert torch.equal(batch.positions, whole.positions)


@pytest.mark.parametrize("kind", [NVTLangevin, NVTVelocityRescaling])
def test_neighbouring_seeds_give_independent_trajectories(kind):
    # Free atoms with little memory: what the noise did to each velocity, or to each system's kinetic energy.
    n, found = 400, []
    strength = {"friction": 500.0} if kind is NVTLangevin else {"tau": 2.0, "removed_degrees": 0}
    for seed in (1, 2):
        batch = batch_of(*[atoms_in_well(3, 1)] * n)
        kind(Well(k=0.0), 300.0, 5.0, seed=seed, **strength).run(batch, 2)
        found.append(batch.velocities.flatten() if kind is NVTLangevin else kinetic_energy(batch))
    assert not (found[0] == found[1]).any()
    assert abs(np.corrcoef(*found)[0, 1]) < 3 / math.sqrt(len(found[0]))


def test_initial_velocities_have_the_temperature_and_no_drift():
    batch = batch_of(argon(4), argon(3, seed=1), AtomicData([[0, 0, 0]], [18]))
    initialize_velocities(batch, [50.0, 200.0, 10.0], seed=1)
    assert abs(float(temperature(batch, 3)[0]) - 50.0) < 4 * 50.0 * math.sqrt(2 / 768)
    momentum = torch.zeros(3, 3, dtype=torch.float64).index_add(0, batch.system, batch.velocities)
    assert momentum[:2].abs().max() < 1e-12
    assert batch.velocities[-1].abs().max() > 0
    initialize_velocities(batch, [50.0, 200.0, 10.0], seed=1, exact=True)
    torch.testing.assert_close(temperature(batch, 3), torch.tensor([50.0, 200.0, 10.0], dtype=torch.float64))
    initialize_velocities(batch, 0.0, exact=True)
    assert not batch.velocities.any()


def test_initial_velocities_obey_constraints():
    batch = batch_of(argon(2), cluster(4))
    fixed, center = FixAtoms(indices=[0, 1]), FixCenterOfMass()
    initialize_velocities(batch, [50.0, 80.0], seed=1, exact=True, constraints=[fixed])
    assert not batch.velocities[:2].any()
    expected = [3 * 30 * kB * 50.0 / 2, 3 * 2 * kB * 80.0 / 2]
    np.testing.assert_allclose(kinetic_energy(batch), expected, rtol=1e-12)
    free = batch_of(argon(2), cluster(4))
    for removed in (True, False):
        initialize_velocities(free, [50.0, 80.0], seed=1, exact=True, constraints=[center], remove_translation=removed)
        np.testing.assert_allclose(kinetic_energy(free), [93 * kB * 50.0 / 2, 9 * kB * 80.0 / 2], rtol=1e-12)
        momentum = torch.zeros(2, 3, dtype=torch.float64).index_add(0, free.system, free.velocities)
        assert momentum.abs().max() < 1e-12


def test_noise_obeys_constraints():
    batch = batch_of(argon(1), cluster(4))
    langevin = NVTLangevin(LennardJones(), friction=50.0, constraints=[FixCenterOfMass()])
    langevin.run(batch, 20)
    momentum = torch.zeros(2, 3, dtype=torch.float64).index_add(0, batch.system, batch.velocities)
    assert momentum.abs().max() < 1e-12
    assert batch.velocities.abs().max() > 1e-3
    assert langevin.degrees_of_freedom(batch).tolist() == [9.0, 9.0]


def test_atoms_that_may_not_move_stay():
    held = torch.tensor([True, False, True, True])
    data = atoms_in_well(4, 1, velocities=False).replace(atom_extras={"move_mask": held})
    batch = batch_of(data)
    start = batch.positions.clone()
    initialize_velocities(batch, 300.0)
    assert degrees_of_freedom(batch, 3).tolist() == [9.0]
    NVTLangevin(Well()).run(batch, 10)
    assert torch.equal(batch.positions[1], start[1])
    assert not torch.equal(batch.positions[0], start[0])
    assert not batch.forces[1].any()


def test_pressure_of_an_ideal_gas_and_without_a_cell():
    box = AtomicData([[0, 0, 0], [10, 10, 10]], [18, 18], torch.eye(3) * 20)
    batch = batch_of(box, cluster(2))
    NVTLangevin(LennardJones(cutoff=3.0), temperature=300.0, friction=100.0).run(batch, 5)
    expected = 2 * float(kinetic_energy(batch)[0]) / (3 * 8000.0) / GPa
    assert float(pressure(batch)[0]) == pytest.approx(expected)
    assert math.isnan(float(pressure(batch)[1]))


def test_time_is_counted_in_femtoseconds():
    batch = batch_of(atoms_in_well())
    nve = NVE(Well(), 0.5)
    nve.run(batch, 4)
    assert float(nve.time(batch)[0]) == pytest.approx(2.0)
    assert fs == pytest.approx(0.09822694788464063, rel=1e-15)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"timestep": 0.0}, "timestep must be positive"),
        ({"temperature": -1.0}, "temperature must be zero or more"),
        ({"friction": math.nan}, "friction must be zero or more and finite"),
        ({"timestep": "1 fs"}, "timestep must be a number"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        NVTLangevin(Well(), **setting)


def test_one_number_or_one_for_each_system():
    with pytest.raises(InputError, match="temperature has 2 values but there is a system with the id 2"):
        NVTLangevin(Well(), temperature=[1.0, 2.0]).run(batch_of(*[atoms_in_well()] * 3), 1)
