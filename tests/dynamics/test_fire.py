"""FIRE against ASE's, step by step."""

import numpy as np
import pytest
import torch
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.constraints import FixAtoms
from ase.optimize import FIRE as AseFIRE
from dynamics_samples import LennardJones, argon, batch_of, cluster

from carryall.dynamics import FIRE
from carryall.errors import InputError

ASE_LJ = {"sigma": 3.4, "epsilon": 0.0104, "rc": 8.5}


@pytest.mark.parametrize("settings", [{}, {"dt": 0.5, "maxstep": 0.05, "dtmax": 3.0, "Nmin": 2, "astart": 0.25, "fa": 0.9}])
def test_every_system_of_a_batch_takes_the_steps_of_ase(settings):
    images = [cluster(6, 1).to_ase(), argon(1, rattle=0.3, seed=2), cluster(8, 3, spread=3.3).to_ase()]
    batch, fire = batch_of(*images), FIRE(LennardJones(), **settings)
    references = []
    for atoms in images:
        atoms.calc = AseLennardJones(**ASE_LJ)
        references.append(AseFIRE(atoms, logfile=None, a=settings.get("astart", 0.1), **settings))
    for _ in range(60):
        fire.run(batch, 1)
        for index, (atoms, reference) in enumerate(zip(images, references, strict=True)):
            reference.step()
            np.testing.assert_allclose(batch.get_data(index).positions, atoms.positions, atol=1e-8)
            assert float(batch.fire_dt[index]) == pytest.approx(reference.dt, rel=1e-12)
            assert float(batch.fire_alpha[index]) == pytest.approx(reference.a, rel=1e-12)
            assert int(batch.fire_n_positive[index]) == reference.Nsteps
    assert len(set(batch.fire_dt.tolist())) > 1


def test_the_number_of_steps_to_convergence_is_ase_s():
    atoms = cluster(7, 4).to_ase()
    batch = batch_of(atoms, cluster(4, 2))
    FIRE(LennardJones(), convergence_hook=0.001).run(batch, 500)
    atoms.calc = AseLennardJones(**ASE_LJ)
    reference = AseFIRE(atoms, logfile=None)
    assert reference.run(fmax=0.001, steps=500)
    assert batch.fire_steps[0] == reference.nsteps
    assert float(batch.energy[0]) == pytest.approx(atoms.get_potential_energy(), abs=1e-8)


def test_fixed_atoms_are_those_of_ase():
    atoms = cluster(6, 5).to_ase()
    atoms.set_constraint(FixAtoms([0, 3]))
    batch = batch_of(atoms)
    FIRE(LennardJones(), convergence_hook=0.01).run(batch, 300)
    start = atoms.positions.copy()
    atoms.calc = AseLennardJones(**ASE_LJ)
    AseFIRE(atoms, logfile=None).run(fmax=0.01, steps=300)
    np.testing.assert_allclose(batch.positions, atoms.positions, atol=1e-7)
    np.testing.assert_array_equal(batch.positions[[0, 3]], start[[0, 3]])


def test_a_fresh_optimizer_starts_afresh_and_the_batch_keeps_its_velocities():
    batch = batch_of(cluster(5).replace(velocities=torch.ones(5, 3)))
    FIRE(LennardJones()).run(batch, 15)
    assert float(batch.fire_dt[0]) != 0.1
    assert torch.equal(batch.velocities, torch.ones(5, 3, dtype=torch.float64))
    other = FIRE(LennardJones())
    other.run(batch, 0)
    assert batch.fire_dt.tolist() == [0.1]
    assert batch.fire_steps.tolist() == [0]


def test_settings_are_checked():
    with pytest.raises(InputError, match="maxstep of FIRE must be positive"):
        FIRE(LennardJones(), maxstep=0)
