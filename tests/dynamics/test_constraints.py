"""Fixed atoms and a fixed centre of mass."""

import ase.constraints
import numpy as np
import pytest
import torch
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.optimize import FIRE as AseFIRE
from dynamics_samples import LennardJones, Well, argon, atoms_in_well, batch_of, cluster

from carryall.data import AtomicData, Batch
from carryall.data.units import kB
from carryall.dynamics import FIRE, NVE, NVTLangevin, Outcome, initialize_velocities
from carryall.dynamics.constraints import FixAtoms, FixCenterOfMass, Unconstrained
from carryall.dynamics.thermo import kinetic_energy
from carryall.errors import InputError


def mixed(n=4, seed=0, velocities=True):
    """Argon and copper in the well."""
    data = atoms_in_well(n, seed, velocities=velocities)
    return data.replace(atomic_numbers=torch.tensor(([18, 29] * n)[:n]))


CHOICES = {
    "indices": lambda: FixAtoms(indices=[0, -1]),
    "mask": lambda: FixAtoms(mask=[True, False, False, True]),
    "where": lambda: FixAtoms(where=lambda batch: torch.isin(batch.positions[:, 0], ENDS)),
}
ENDS = torch.cat([mixed(4, seed).positions[[0, 3], 0] for seed in (1, 2)])


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("make", [lambda **k: NVTLangevin(Well(), seed=1, friction=20.0, **k), lambda **k: FIRE(Well(), **k)])
def test_fixed_atoms_stay_bit_for_bit_and_the_others_move(kind, make):
    batch = batch_of(mixed(4, 1), mixed(4, 2))
    before = batch.positions.clone()
    make(constraints=[CHOICES[kind]()]).run(batch, 20)
    fixed = torch.tensor([True, False, False, True] * 2)
    assert torch.equal(batch.positions[fixed], before[fixed])
    assert (batch.positions[~fixed] != before[~fixed]).all()
    assert (batch.forces[fixed] == 0).all()
    assert (batch.velocities[fixed] == 0).all() or "fire_dt" in batch


def test_atoms_are_fixed_by_element():
    batch = batch_of(mixed(5, 1), mixed(2, 2))
    before = batch.positions.clone()
    NVE(Well(), constraints=[FixAtoms(elements=["Cu"])]).run(batch, 5)
    copper = batch.atomic_numbers == 29
    assert torch.equal(batch.positions[copper], before[copper])
    assert (batch.positions[~copper] != before[~copper]).all()


def test_a_relaxation_with_fixed_atoms_is_ases():
    atoms = argon(1, rattle=0.2)
    atoms.set_constraint(ase.constraints.FixAtoms([0, 3]))
    batch = batch_of(argon(1, rattle=0.2))
    dynamics = FIRE(LennardJones(), constraints=[FixAtoms([0, 3])])
    atoms.calc = AseLennardJones(epsilon=0.0104, sigma=3.4, rc=8.5)
    AseFIRE(atoms, logfile=None).run(fmax=1e-9, steps=12)
    dynamics.run(batch, 12)
    np.testing.assert_allclose(batch.positions.numpy(), atoms.positions, atol=1e-10)


def test_a_mask_of_the_structures_own_adds_to_the_constraint():
    data = mixed(4, 1)
    own = torch.ones(4, 3, dtype=torch.bool)
    own[1, 2] = False
    batch = batch_of(data.replace(atom_extras={"move_mask": own}))
    before = batch.positions.clone()
    dynamics = NVE(Well(), constraints=[FixAtoms([0])])
    dynamics.run(batch, 5)
    still = batch.positions == before
    assert still.tolist() == [[True] * 3, [False, False, True], [False] * 3, [False] * 3]
    assert dynamics.degrees_of_freedom(batch).tolist() == [8.0]


def test_velocities_that_fixed_atoms_came_with_are_taken():
    batch = batch_of(atoms_in_well(4, 1))
    dynamics = NVE(Well(), constraints=[FixAtoms([2])])
    dynamics.run(batch, 0)
    assert (batch.velocities[2] == 0).all()
    assert (batch.velocities[[0, 1, 3]] != 0).all()
    assert dynamics.degrees_of_freedom(batch).tolist() == [9.0]


def test_a_function_is_asked_once_about_each_system(tmp_path):
    asked = []

    def low(batch):
        asked.append(batch.system_id.tolist())
        return batch.positions[:, 0] < 0

    batch = batch_of(mixed(4, 1), mixed(3, 2))
    held = batch.positions[:, 0] < 0
    before = batch.positions.clone()
    dynamics = NVTLangevin(Well(), friction=50.0, constraints=[FixAtoms(where=low)])
    dynamics.run(batch, 10)
    NVE(Well(), constraints=[FixAtoms(where=low)]).run(batch, 5)
    assert asked == [[0, 1]]
    assert torch.equal(batch.positions[held], before[held])
    # one that comes later is asked about alone, by its positions at that time
    new = batch_of(mixed(4, 3))
    new.set("system_id", torch.tensor([7]), level="system")
    joined = Batch.joined([(batch, None), (new, None)], fill={key: 0 for key in batch.keys() if key not in new})  # noqa: SIM118
    joined.set("fix_atoms_asked", torch.tensor([True, True, False]))
    NVE(Well(), constraints=[FixAtoms(where=low)]).run(joined, 1)
    assert asked == [[0, 1], [7]]


def test_masks_and_indices_that_do_not_fit_are_refused_before_work_starts():
    potential = Well()

    def run(constraint):
        batch = batch_of(mixed(4, 1), mixed(3, 2))
        NVE(potential, constraints=[constraint]).run(batch, 1)

    with pytest.raises(InputError, match=r"mask of FixAtoms has 4 entries, but system 1 has 3 atoms"):
        run(FixAtoms(mask=[True] * 4))
    with pytest.raises(InputError, match=r"FixAtoms names atom 3, but system 1 has 3 atoms"):
        run(FixAtoms([0, 3]))
    with pytest.raises(InputError, match=r"names atom -4, but system 1 has 3 atoms"):
        run(FixAtoms([-4]))
    with pytest.raises(InputError, match=r"returned \(2,\) of torch.bool, expected \(7,\)"):
        run(FixAtoms(where=lambda batch: torch.zeros(2, dtype=torch.bool)))
    assert potential.n_calls == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs one of indices, mask, elements and where to say which atoms, got none"),
        ({"indices": [0], "elements": ["H"]}, "got indices and elements"),
        ({"indices": [0.5]}, "must be whole numbers"),
        ({"indices": [True, False]}, "is a mask"),
        ({"mask": [0, 1]}, "one bool for each atom"),
        ({"elements": ["Xx"]}, "no element 'Xx'"),
        ({"elements": [0]}, "symbols or atomic numbers"),
    ],
)
def test_selections_that_say_nothing_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        FixAtoms(**arguments)


def test_forces_are_projected_as_ase_does_with_unit_masses():
    atoms = argon(1)
    atoms.symbols[1] = "Cu"
    batch = batch_of(atoms, atoms)
    forces = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = FixCenterOfMass(unit_masses=True).forces(batch, forces)
    for rows in (slice(0, 4), slice(4, 8)):
        expected = forces[rows].numpy().copy()
        ase.constraints.FixCom().adjust_forces(atoms, expected)
        np.testing.assert_allclose(found[rows].numpy(), expected, atol=1e-12)


def test_momenta_are_projected_as_ase_does_and_forces_do_not_accelerate_the_centre():
    atoms = argon(1)
    atoms.symbols[1] = "Cu"
    batch = batch_of(atoms)
    mass = torch.from_numpy(atoms.get_masses())[:, None]
    batch.masses = mass[:, 0]
    random = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    momenta = (mass * random).numpy()
    ase.constraints.FixCom().adjust_momenta(atoms, momenta)
    constraint = FixCenterOfMass()
    np.testing.assert_allclose((mass * constraint.velocities(batch, random)).numpy(), momenta, atol=1e-12)
    found = constraint.forces(batch, random)
    assert found.sum(0).abs().max() < 1e-14
    # what is taken accelerates all atoms alike
    assert ((random - found) / mass).std(0).max() < 1e-14


def test_the_centre_of_mass_rests_in_a_thermostat_that_pushes_it():
    batch = batch_of(mixed(4, 1), mixed(6, 2), atoms_in_well(1, 3))
    ends = {}
    for name, constraints in {"free": (), "held": (FixCenterOfMass(),)}.items():
        run = batch.clone()
        dynamics = NVTLangevin(Well(), temperature=3000.0, friction=50.0, constraints=constraints)
        dynamics.run(run, 0)
        start = center(run)
        dynamics.run(run, 50)
        ends[name] = (center(run) - start).abs().amax(1)
        degrees = dynamics.degrees_of_freedom(run).tolist()
        assert degrees == ([12.0, 18.0, 3.0] if name == "free" else [9.0, 15.0, 3.0])
    assert (ends["free"] > 0.01).all()
    assert (ends["held"][:2] < 1e-12).all()
    assert ends["held"][2] == ends["free"][2]  # a single atom is its own centre


def test_systems_with_fixed_atoms_keep_their_centre_of_mass():
    batch = batch_of(mixed(4, 1))
    constraint = FixCenterOfMass()
    NVE(Well(), constraints=[FixAtoms([0]), constraint]).run(batch, 3)
    assert (batch.positions[0] == mixed(4, 1).positions[0]).all()
    assert constraint.removed_degrees(batch).tolist() == [0.0]
    assert torch.equal(constraint.forces(batch, batch.forces), batch.forces)


def test_the_temperature_of_a_held_centre_of_mass_is_right():
    batch = batch_of(*(mixed(5, seed) for seed in range(40)))
    initialize_velocities(batch, 300.0, seed=3)
    dynamics = NVTLangevin(Well(), temperature=300.0, timestep=4.0, friction=100.0, constraints=[FixCenterOfMass()])
    means = []
    for _ in range(60):
        dynamics.run(batch, 20)
        means.append((2 * kinetic_energy(batch) / (kB * dynamics.degrees_of_freedom(batch))).mean())
    # 12 degrees each, 40 systems, 60 samples a decay time and more apart
    error = 300.0 * np.sqrt(2 / (12 * 40 * len(means)))
    assert abs(float(torch.stack(means).mean()) - 300.0) < 3 * error


def center(batch):
    mass = batch.masses[:, None]
    zeros = torch.zeros(batch.n_systems, 3, dtype=torch.float64)
    return zeros.index_add(0, batch.system, mass * batch.positions) / zeros.index_add(0, batch.system, mass.expand(-1, 3))


def test_systems_that_do_not_move_keep_the_bits_of_their_forces():
    batch = batch_of(cluster(4, 1), cluster(7, 2))
    FIRE(LennardJones(), constraints=[FixCenterOfMass(), FixAtoms([0])], convergence_hook=0.01).run(batch, 300)
    assert batch.outcome.tolist() == [Outcome.CONVERGED] * 2
    alone = batch_of(cluster(4, 1))
    FIRE(LennardJones(), constraints=[FixCenterOfMass(), FixAtoms([0])], convergence_hook=0.01).run(alone, 300)
    assert torch.equal(alone.forces, batch.forces[:4])
    assert torch.equal(alone.positions, batch.positions[:4])


def test_what_a_constraint_does_not_change_it_inherits():
    class OnlyAlongZ(Unconstrained):
        def forces(self, batch, forces):
            return forces * torch.tensor([0.0, 0.0, 1.0], dtype=forces.dtype)

    batch = batch_of(AtomicData([[0.1, 0.2, 0.3]], [18]))
    dynamics = NVE(Well(), constraints=[OnlyAlongZ()])
    dynamics.run(batch, 3)
    assert batch.positions[0, :2].tolist() == [0.1, 0.2]
    assert float(batch.positions[0, 2]) < 0.3
    assert dynamics.degrees_of_freedom(batch).tolist() == [3.0]
