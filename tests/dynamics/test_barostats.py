"""Barostats step by step: conserved quantities, ASE, independence of the batch, systems that do not fit."""

import itertools

import numpy as np
import pytest
import torch
from ase import units as ase_units
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, MaskedMTKNPT
from barostat_samples import BAROSTATS, MODES, ScaledSprings, equal_state, gas, triclinic_gas
from dynamics_samples import LennardJones, argon, batch_of, cluster

from carryall.data.units import GPa, kB
from carryall.dynamics import Checkpoint, NVTLangevin, Ramp, initialize_velocities, load_checkpoint
from carryall.dynamics.integrators.cell_motion import LARGEST_STRAIN, allowed, flow
from carryall.dynamics.integrators.cell_rescaling import NPTStochasticCellRescaling
from carryall.dynamics.integrators.mtk import NPH, NPT
from carryall.dynamics.integrators.velocity_rescaling import NVTVelocityRescaling
from carryall.dynamics.thermo import kinetic_energy, kinetic_tensor, pressure, pressure_tensor
from carryall.graph.systems import Systems

every_barostat = pytest.mark.parametrize("name", BAROSTATS)
every_mode = pytest.mark.parametrize("mode", MODES)


def moved(batch, strain):
    """What the potential sees when positions and cells follow a strain (3, 3)."""
    growth = torch.eye(3, dtype=torch.float64) + torch.from_numpy(strain)
    strained = batch.clone()
    strained.positions, strained.cell = batch.positions @ growth, batch.cell @ growth
    return Systems.of(strained)


def test_forces_and_virial_of_the_sample_are_derivatives_of_its_energy():
    potential, batch = ScaledSprings(), batch_of(gas(seed=1), triclinic_gas(2))
    found, h = potential(Systems.of(batch)), 1e-5
    for i, j in itertools.product(range(3), range(3)):
        strain = np.zeros((3, 3))
        strain[i, j] = h
        difference = potential(moved(batch, strain))["energy"] - potential(moved(batch, -strain))["energy"]
        torch.testing.assert_close(-difference / (2 * h), found["virial"][:, i, j], atol=1e-8, rtol=0)
    for atom, axis in ((0, 0), (20, 2)):
        energies = []
        for sign in (1, -1):
            batch.positions[atom, axis] += sign * h
            energies.append(float(potential(Systems.of(batch))["energy"].sum()))
            batch.positions[atom, axis] -= sign * h
        assert (energies[1] - energies[0]) / (2 * h) == pytest.approx(float(found["forces"][atom, axis]), abs=1e-8)


def test_flow_is_the_exponential_and_its_mean():
    rng = np.random.default_rng(0)
    for size in (1e-3, LARGEST_STRAIN / 3):
        a = allowed(rng.uniform(-size, size, (5, 3, 3)), "triclinic")
        ((growth, mean),) = flow(a)
        np.testing.assert_allclose(growth, torch.linalg.matrix_exp(torch.from_numpy(a)), atol=1e-15, rtol=0)
        nodes, weights = np.polynomial.legendre.leggauss(12)
        steps = [torch.linalg.matrix_exp(torch.from_numpy(a * (node + 1) / 2)).numpy() for node in nodes]
        np.testing.assert_allclose(mean, sum(w / 2 * one for w, one in zip(weights, steps, strict=True)), atol=1e-15, rtol=0)


def test_pressure_tensor_has_the_pressure_as_a_third_of_its_trace():
    atoms = argon()
    batch = initialize_velocities(batch_of(atoms), 60.0)
    atoms.set_velocities(batch.velocities.numpy())
    atoms.calc = AseLennardJones(sigma=3.4, epsilon=0.0104, rc=8.5)
    NPH(LennardJones()).run(batch, 0)
    expected = -atoms.get_stress(voigt=False, include_ideal_gas=True) / ase_units.GPa
    np.testing.assert_allclose(pressure_tensor(batch)[0], expected, atol=1e-10)
    torch.testing.assert_close(pressure_tensor(batch).diagonal(dim1=1, dim2=2).mean(1), pressure(batch))
    torch.testing.assert_close(kinetic_tensor(batch).diagonal(dim1=1, dim2=2).sum(1), 2 * kinetic_energy(batch))
    assert bool(pressure_tensor(batch_of(cluster())).isnan().all())


# -- conserved quantities


@every_mode
@pytest.mark.parametrize("name", ["NPH", "NPT"])
def test_drift_of_the_conserved_quantity_falls_with_the_square_of_the_timestep(name, mode):
    worst = []
    for timestep in (8.0, 4.0, 2.0):
        batch = batch_of(*(gas(seed=seed) for seed in range(3)))
        barostat = BAROSTATS[name](ScaledSprings(), timestep=timestep, mode=mode, pressure=[0.05, 0.12, 0.3])
        barostat.run(batch, 0)
        start, largest = barostat.conserved_energy(batch), torch.zeros(3, dtype=torch.float64)
        for _ in range(10):
            barostat.run(batch, int(16 / timestep))
            largest = torch.maximum(largest, (barostat.conserved_energy(batch) - start).abs())
        worst.append(largest)
    assert float(worst[0].max()) < 2e-3
    for coarse, fine in itertools.pairwise(worst):
        ratio = coarse / fine
        assert bool(((ratio > 3.5) & (ratio < 4.6)).all()), ratio


@pytest.mark.parametrize("mode", ["isotropic", "triclinic"])
def test_effective_energy_of_cell_rescaling_drifts_less_with_a_shorter_timestep(mode):
    # Over a given time; the noise differs, so the drift of many systems is compared.
    sizes = []
    for timestep in (4.0, 1.0):
        batch = batch_of(*(gas(n_atoms=24, seed=seed) for seed in range(40)))
        barostat = BAROSTATS["rescaling"](ScaledSprings(), timestep=timestep, mode=mode, compressibility=2.0)
        barostat.run(batch, 0)
        start = barostat.conserved_energy(batch)
        barostat.run(batch, int(160 / timestep))
        sizes.append(float((barostat.conserved_energy(batch) - start).square().mean().sqrt()))
        heat = (batch.get("cell_rescaling_heat")).square().mean().sqrt()
        assert sizes[-1] < 0.05 * float(heat)
    assert sizes[1] < sizes[0] / 3


@pytest.mark.parametrize("name", ["NPT", "rescaling"])
def test_a_ramp_does_not_show_in_the_conserved_quantity(name):
    settings = {"temperature": Ramp((0, 100), (300.0, 400.0)), "pressure": Ramp((0, 100), (0.1, 0.3)), "timestep": 1.0}
    batch = batch_of(gas(seed=1), gas(seed=2))
    settings |= {"compressibility": 0.5} if name == "rescaling" else {}
    barostat = BAROSTATS[name](ScaledSprings(), **settings)
    barostat.run(batch, 0)
    start = barostat.conserved_energy(batch)
    barostat.run(batch, 101)
    torch.testing.assert_close(barostat.conserved_energy(batch), start, atol=3e-3, rtol=0)
    torch.testing.assert_close(batch.get(barostat.key("kT")), torch.full((2,), 400.0 * kB, dtype=torch.float64))
    torch.testing.assert_close(batch.get(barostat.key("pressure")), torch.full((2,), 0.3 * GPa, dtype=torch.float64))


@every_mode
@pytest.mark.parametrize("name", ["NPH", "NPT"])
def test_time_can_be_turned_back(name, mode):
    batch = batch_of(gas(seed=4), gas(seed=5, n_atoms=9))
    start, barostat = batch.clone(), BAROSTATS[name](ScaledSprings(), mode=mode)
    barostat.run(batch, 60)
    assert float((batch.cell - start.cell).abs().max()) > 0.05
    batch.velocities = -batch.velocities
    for key in ("rate", "chain_rate"):
        if barostat.key(key) in batch:
            batch.set(barostat.key(key), -batch.get(barostat.key(key)))
    barostat.run(batch, 60)
    torch.testing.assert_close(batch.cell, start.cell, atol=1e-10, rtol=0)
    torch.testing.assert_close(batch.positions, start.positions, atol=1e-10, rtol=0)


# -- ASE


def ase_reference(atoms, mode):
    """ASE's dynamics, where it differs with the numbers of the equations.

    Its first link on an isotropic cell is 9 times as heavy; it counts 9 degrees of freedom for the symmetric rate of a full
    cell, which has 6.
    """
    kT, tau = 60.0 * ase_units.kB, 300 * ase_units.fs
    settings = {"timestep": 4 * ase_units.fs, "temperature_K": 60.0, "pressure_au": 0.05 * ase_units.GPa}
    settings |= {"tdamp": 100 * ase_units.fs, "pdamp": tau}
    if mode == "isotropic":
        reference = IsotropicMTKNPT(atoms, **settings)
        reference._barostat._R[0] = kT * tau**2
    elif mode == "anisotropic":
        reference = MaskedMTKNPT(atoms, **settings, mask=(True, True, True))
    else:
        reference = MTKNPT(atoms, **settings)
        reference._barostat._cell_dof = 6
        reference._barostat._R[0] = 6 * kT * tau**2
    return reference


@every_mode
def test_npt_is_ase_step_by_step(mode):
    atoms = argon(seed=2)
    if mode == "triclinic":
        atoms.set_cell(atoms.cell.array @ np.array([[1.0, 0.02, 0.0], [0.02, 0.97, 0.01], [0.0, 0.01, 1.03]]), scale_atoms=True)
    batch = initialize_velocities(batch_of(atoms), 60.0, seed=2)
    atoms.set_velocities(batch.velocities.numpy())
    atoms.calc = AseLennardJones(sigma=3.4, epsilon=0.0104, rc=8.5)
    settings = {"temperature": 60.0, "pressure": 0.05, "timestep": 4.0, "tau": 100.0, "barostat_tau": 300.0}
    npt, reference = NPT(LennardJones(), mode=mode, removed_degrees=0, **settings), ase_reference(atoms, mode)
    npt.run(batch, 0)
    offset = float(npt.conserved_energy(batch)) - reference.get_conserved_energy()
    for _ in range(6):
        npt.run(batch, 5)
        reference.run(5)
        np.testing.assert_allclose(batch.cell[0], atoms.cell.array, atol=1e-8, rtol=0)
        np.testing.assert_allclose(batch.positions, atoms.positions, atol=1e-8, rtol=0)
        np.testing.assert_allclose(batch.velocities, atoms.get_velocities(), atol=1e-8, rtol=0)
        assert float(npt.conserved_energy(batch)) - reference.get_conserved_energy() == pytest.approx(offset, abs=1e-9)
    assert np.abs(batch.cell[0].numpy() - np.diag(np.diag(batch.cell[0]))).max() > 0.05 or mode != "triclinic"


# -- equations, one step at a time


def test_cell_without_compliance_leaves_velocity_rescaling():
    settings = {"temperature": 200.0, "timestep": 2.0, "tau": 80.0, "seed": 9}
    npt, nvt = batch_of(gas(seed=3)), batch_of(gas(seed=3))
    NPTStochasticCellRescaling(ScaledSprings(), compressibility=1e-24, mode="triclinic", **settings).run(npt, 50)
    NVTVelocityRescaling(ScaledSprings(), **settings).run(nvt, 50)
    torch.testing.assert_close(npt.positions, nvt.positions, atol=1e-9, rtol=0)
    torch.testing.assert_close(npt.velocities, nvt.velocities, atol=1e-9, rtol=0)


@every_mode
def test_cold_rescaling_follows_the_pressure_alone(mode):
    # No noise, no kinetic energy: d ln V / dt = beta / tau (p - P), and the shape follows a third of the rest.
    batch = batch_of(triclinic_gas(1)) if mode == "triclinic" else batch_of(gas(seed=1, shape=np.diag([1.0, 1.1, 0.95])))
    batch.velocities = torch.zeros_like(batch.velocities)
    potential = ScaledSprings(gamma=0.2)
    barostat = NPTStochasticCellRescaling(potential, 0.0, 0.4, 1e-3, 1e9, 1000.0, 3.0, mode)
    virial = potential(Systems.of(batch))["virial"][0].numpy()
    p, before = virial / float(batch.volume[0]) / GPa, batch.cell[0].numpy()
    barostat.run(batch, 1)
    strain = (np.linalg.inv(before) @ batch.cell[0].numpy() - np.eye(3)) / (1e-3 / 1000.0 * 3.0)
    third = np.trace(p) / 3
    rest = {"isotropic": np.zeros((3, 3)), "anisotropic": np.diag(np.diag(p)) - third * np.eye(3)}.get(
        mode, p - third * np.eye(3)
    )
    np.testing.assert_allclose(strain, (third - 0.4) / 3 * np.eye(3) + rest / 3, atol=1e-6)


@every_barostat
def test_the_cell_of_an_isotropic_barostat_keeps_its_shape(name):
    batch = batch_of(triclinic_gas(3))
    before = batch.cell[0] / batch.volume[0] ** (1 / 3)
    BAROSTATS[name](ScaledSprings(), pressure=0.5).run(batch, 60)
    assert abs(float(batch.volume[0]) / 400.0 - 1) > 0.03
    torch.testing.assert_close(batch.cell[0] / batch.volume[0] ** (1 / 3), before, atol=1e-13, rtol=0)


@every_mode
@every_barostat
def test_centre_of_mass_stays_at_rest_in_the_scaled_cell(name, mode):
    batch = batch_of(gas(seed=6))
    BAROSTATS[name](ScaledSprings(), mode=mode).run(batch, 80)
    momentum = (batch.velocities * batch.masses[:, None]).sum(0)
    assert float(momentum.abs().max()) < 1e-12
    centre = batch.positions.mean(0) @ torch.linalg.inv(batch.cell[0])
    start = gas(seed=6)
    expected = np.asarray(start.positions).mean(0) @ np.linalg.inv(np.asarray(start.cell))
    np.testing.assert_allclose(centre, expected, atol=1e-12)


# -- the batch


def systems_of_a_batch(mode):
    skewed = triclinic_gas if mode == "triclinic" else gas
    return [gas(seed=1, n_atoms=7), skewed(seed=2, n_atoms=16), gas(seed=3, n_atoms=11), *(gas(seed=4 + k) for k in range(8))]


@every_mode
@every_barostat
def test_a_system_moves_alike_alone_and_in_any_batch(name, mode):
    group = systems_of_a_batch(mode)
    settings = {"mode": mode, "pressure": np.linspace(0.1, 0.2, len(group)), "temperature": np.linspace(250, 350, len(group))}
    batch = batch_of(*group)
    BAROSTATS[name](ScaledSprings(), **settings).run(batch, 40)
    assert not any("failure" in one for one in batch.info)
    for index in (0, 1, 10):
        alone = batch_of(group[index])
        alone.set("system_id", torch.tensor([index]), level="system")
        BAROSTATS[name](ScaledSprings(), **settings).run(alone, 40)
        assert equal_state(alone, batch.index_select([index]))


@every_barostat
def test_systems_that_are_done_keep_every_bit(name):
    batch = batch_of(*(triclinic_gas(seed) for seed in range(10)))
    barostat = BAROSTATS[name](ScaledSprings(), mode="triclinic")
    barostat.run(batch, 5)
    batch.set("status", torch.tensor([0, 1] * 5))
    before = batch.clone()
    barostat.run(batch, 5)
    rest = list(range(1, 10, 2))
    assert equal_state(batch.index_select(rest), before.index_select(rest))
    moving = list(range(0, 10, 2))
    assert not torch.equal(batch.index_select(moving).cell, before.index_select(moving).cell)
    whole = batch_of(*(triclinic_gas(seed) for seed in range(10)))
    BAROSTATS[name](ScaledSprings(), mode="triclinic").run(whole, 10)
    assert torch.equal(whole.index_select(moving).positions, batch.index_select(moving).positions)


@every_barostat
def test_a_run_in_two_parts_and_from_a_checkpoint_is_the_same_run(name, tmp_path):
    def start():
        return batch_of(triclinic_gas(1), gas(seed=2, n_atoms=9))

    settings = {"mode": "triclinic", "pressure": Ramp((0, 30), (0.1, 0.2))}
    whole, parts = start(), start()
    BAROSTATS[name](ScaledSprings(), **settings).run(whole, 24)
    barostat = BAROSTATS[name](ScaledSprings(), hooks=[Checkpoint(tmp_path / "state", 7)], **settings)
    barostat.run(parts, 7)
    again = BAROSTATS[name](ScaledSprings(), **settings)
    restarted = load_checkpoint(tmp_path / "state", again)
    barostat.run(parts, 17)
    again.run(restarted, 17)
    assert equal_state(whole, parts)
    assert equal_state(whole, restarted)


def test_noise_depends_on_seed_and_system_only():
    def end(seed, ids):
        batch = batch_of(gas(seed=1), gas(seed=1))
        batch.set("system_id", torch.tensor(ids), level="system")
        BAROSTATS["rescaling"](ScaledSprings(), seed=seed).run(batch, 5)
        return batch.volume.tolist()

    first = end(0, [4, 5])
    assert first[0] != first[1]
    assert end(0, [5, 4]) == first[::-1]
    assert end(1, [4, 5])[0] not in first


@pytest.mark.parametrize("name", ["NPT", "rescaling"])
def test_a_stage_of_its_own_is_the_same_as_one_after_another(name):
    one, other = batch_of(triclinic_gas(1), gas(seed=2)), batch_of(triclinic_gas(1), gas(seed=2))

    def stages():
        potential = ScaledSprings()
        return NVTLangevin(potential, n_steps=4), BAROSTATS[name](potential, mode="triclinic", n_steps=6)

    first, second = stages()
    (first + second).run(one)
    first, second = stages()
    second.run(first.run(other))
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.cell, other.cell)
