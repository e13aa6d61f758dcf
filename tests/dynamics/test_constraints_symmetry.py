"""Space groups that are kept."""

import sys

import ase.build
import numpy as np
import pytest
import torch
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.constraints import FixSymmetry as AseFixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE as AseFIRE
from ase.spacegroup import crystal
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from dynamics_samples import LennardJones, argon, batch_of, cluster

from carryall.data import AtomicData, Batch
from carryall.dynamics import FIRE, NVE, Checkpoint, Outcome, initialize_velocities, load_checkpoint
from carryall.dynamics.constraints import FixAtoms, FixSymmetry
from carryall.dynamics.constraints.spglib import symmetry_dataset
from carryall.errors import InputError, MissingDependencyError

pytest.importorskip("spglib")


def quartz_like():
    return crystal(
        ["Ar", "Cu"], [(0.4697, 0, 1 / 3), (0.4135, 0.2669, 0.4524)], spacegroup=152, cellpar=[8.0, 8.0, 8.8, 90, 90, 120]
    )


CRYSTALS = {
    "fcc": lambda: ase.build.bulk("Ar", "fcc", a=5.4, cubic=True),
    "diamond": lambda: ase.build.bulk("Ar", "diamond", a=8.5),
    "hcp 2x2x1": lambda: ase.build.bulk("Ar", "hcp", a=3.8, c=6.2) * (2, 2, 1),
    "rocksalt 2x2x2": lambda: ase.build.bulk("ArCu", "rocksalt", a=6.5) * (2, 2, 2),
    "rutile": lambda: crystal(["Ar", "Cu"], [(0, 0, 0), (0.3, 0.3, 0)], spacegroup=136, cellpar=[7.5, 7.5, 5.0, 90, 90, 90]),
    "quartz": quartz_like,
    "monoclinic": lambda: crystal(["Ar"], [(0.2754, 0.0395, 0.2083)], spacegroup=14, cellpar=[6.5, 6.6, 6.8, 90, 99.2, 90]),
    "polar": lambda: ase.build.bulk("ArCu", "wurtzite", a=5.2, c=8.6) * (2, 2, 1),
}


def turned(name, rattle=0.0, seed=0):
    """A crystal in no special orientation, off the origin."""
    atoms = CRYSTALS[name]()
    atoms.arrays.pop("spacegroup_kinds", None)
    rng = np.random.default_rng(seed)
    atoms.rotate(40, rng.normal(size=3), rotate_cell=True)
    atoms.positions += rng.normal(size=3)
    if rattle:
        atoms.rattle(rattle, seed=seed)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(0, 0.3 * rattle, (3, 3))), scale_atoms=True)
    return atoms


def number(data, symprec=1e-6):
    cell = data.cell.numpy()
    return symmetry_dataset(cell, data.positions.numpy() @ np.linalg.inv(cell), data.atomic_numbers.numpy(), symprec).number


@pytest.mark.parametrize("name", CRYSTALS)
def test_forces_and_stress_are_averaged_as_ase_does(name):
    atoms = turned(name)
    batch = batch_of(atoms)
    constraint, oracle = FixSymmetry(), AseFixSymmetry(atoms.copy())
    constraint.check(batch)
    rng = np.random.default_rng(1)
    forces, stress = rng.normal(size=(len(atoms), 3)), rng.normal(size=(3, 3))
    stress += stress.T
    expected = forces.copy()
    oracle.adjust_forces(atoms, expected)
    voigt = full_3x3_to_voigt_6_stress(stress)
    oracle.adjust_stress(atoms, voigt)
    np.testing.assert_allclose(constraint.forces(batch, torch.from_numpy(forces)).numpy(), expected, atol=1e-10)
    found = constraint.virial(batch, torch.from_numpy(stress)[None])[0].numpy()
    np.testing.assert_allclose(found, voigt_6_to_full_3x3_stress(voigt), atol=1e-10)


@pytest.mark.parametrize("name", CRYSTALS)
def test_rattled_crystals_are_brought_to_their_symmetry(name):
    atoms = turned(name, rattle=1e-3)
    batch = batch_of(atoms)
    constraint = FixSymmetry(symprec=0.03)
    constraint.check(batch)
    expected = number(AtomicData.from_ase(turned(name)), 1e-4)
    assert constraint.numbers(batch) == [expected]
    assert number(batch.get_data(0), 1e-8) == expected
    np.testing.assert_allclose(batch.positions.numpy(), atoms.positions, atol=0.02)
    # nothing is turned: what takes the old cell to the new one is symmetric
    strain = np.linalg.inv(atoms.cell.array) @ batch.cell[0].numpy()
    np.testing.assert_allclose(strain, strain.T, atol=1e-12)
    before = batch.clone()
    constraint.check(batch)
    FixSymmetry(symprec=0.03).check(batch)
    assert torch.equal(before.positions, batch.positions)


@pytest.mark.parametrize("cell", [None, "unit_cell", "frechet"])
def test_relaxed_crystals_keep_their_space_group(cell):
    names = ["rutile", "quartz", "monoclinic", "fcc"]
    start = [turned(name, rattle=1e-3, seed=3) for name in names]
    wanted = [number(AtomicData.from_ase(turned(name)), 1e-4) for name in names]

    def relaxed(constraints):
        batch = batch_of(*start)
        FIRE(LennardJones(), cell_filter=cell, constraints=constraints, convergence_hook=1e-4).run(batch, 40)
        return batch

    batch, free = relaxed([FixSymmetry(symprec=0.03)]), relaxed([])
    found = [number(batch.get_data(i), 1e-5) for i in range(len(names))]
    assert found == wanted
    moved = batch.positions - batch_of(*start).positions
    assert moved.abs().max() > 0.05
    # without the constraint the disorder of the start is left
    assert [number(free.get_data(i), 1e-5) for i in range(3)] != wanted[:3]


@pytest.mark.parametrize("name", ["rutile", "quartz"])
def test_a_cell_relaxation_is_ases_step_for_step(name):
    atoms = turned(name)
    batch = batch_of(atoms)
    atoms.calc = AseLennardJones(epsilon=0.0104, sigma=3.4, rc=8.5)
    atoms.set_constraint(AseFixSymmetry(atoms))
    AseFIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-9, steps=15)
    FIRE(LennardJones(), cell_filter="frechet", constraints=[FixSymmetry()]).run(batch, 15)
    np.testing.assert_allclose(batch.cell[0].numpy(), atoms.cell.array, atol=1e-8)
    np.testing.assert_allclose(batch.positions.numpy(), atoms.positions, atol=1e-8)


def test_motion_keeps_the_space_group_and_its_degrees_of_freedom():
    batch = batch_of(turned("quartz"), turned("polar"), argon(1), turned("fcc"))
    initialize_velocities(batch, 200.0, seed=1)
    dynamics = NVE(LennardJones(), 2.0, constraints=[FixSymmetry()])
    dynamics.run(batch, 50)
    assert number(batch.get_data(0), 1e-6) == 152
    assert number(batch.get_data(1), 1e-6) == 186
    # quartz: u of one kind, x y z of the other; wurtzite: z of both kinds, where their centre of mass is removed; fcc: nothing
    assert dynamics.degrees_of_freedom(batch).tolist() == [4.0, 1.0, 9.0, 1.0]
    momentum = (batch.masses[:, None] * batch.velocities)[batch.system == 3]
    assert momentum.abs().max() < 1e-12


def test_a_system_without_symmetry_is_left_bit_for_bit():
    constraint = FixSymmetry(symprec=1e-3)
    batch = batch_of(argon(1), turned("fcc"))
    initialize_velocities(batch, 30.0)
    plain = batch_of(argon(1))
    initialize_velocities(plain, 30.0)
    NVE(LennardJones(), constraints=[constraint]).run(batch, 10)
    NVE(LennardJones()).run(plain, 10)
    assert constraint.numbers(batch) == [1, 225]
    assert torch.equal(batch.positions[:4], plain.positions)


def test_results_do_not_depend_on_the_batch_and_memory_follows_it():
    def start(*names):
        batch = batch_of(*(turned(name) for name in names))
        batch.set("system_id", torch.tensor([list(CRYSTALS).index(name) for name in names]), level="system")
        initialize_velocities(batch, 100.0)
        return batch

    constraint = FixSymmetry()
    together, alone = start("rutile", "quartz", "polar"), start("quartz")
    NVE(LennardJones(), constraints=[constraint]).run(together, 20)
    assert sorted(constraint._known) == [4, 5, 7]
    NVE(LennardJones(), constraints=[FixSymmetry()]).run(alone, 20)
    assert torch.equal(together.index_select([1]).positions, alone.positions)
    # systems leave and come: their operations go and are found from what the batch carries
    dynamics = NVE(LennardJones(), constraints=[constraint])
    some = together.index_select([2, 0])
    dynamics.run(some, 5)
    assert sorted(constraint._known) == [4, 7]
    new = start("quartz")
    dynamics.enlist(new)
    fill = dict.fromkeys(set(some.keys()) ^ set(new.keys()), 0.0)
    joined = Batch.joined([(some, None), (new, None)], fill=fill)
    assert FixSymmetry().numbers(joined) == [186, 136, 152]


def test_a_restarted_run_keeps_the_symmetry_that_it_began_with(tmp_path):
    def start():
        batch = batch_of(turned("rutile", rattle=1e-3), turned("fcc"))
        initialize_velocities(batch, 300.0)
        return batch

    whole = start()
    NVE(LennardJones(), constraints=[FixSymmetry(0.03)]).run(whole, 40)
    path = tmp_path / "a.ckpt"
    NVE(LennardJones(), constraints=[FixSymmetry(0.03)], hooks=[Checkpoint(path, 15)]).run(start(), 20)
    again = NVE(LennardJones(), constraints=[FixSymmetry(0.03)])
    batch = load_checkpoint(path, again)
    again.run(batch, 25)
    for key in whole.keys():  # noqa: SIM118
        assert torch.equal(batch.get(key), whole.get(key)), key


def test_a_system_that_was_moved_since_is_looked_at_again():
    batch = batch_of(turned("fcc"))
    constraint = FixSymmetry()
    NVE(LennardJones(), constraints=[constraint]).run(batch, 1)
    batch.positions = batch.positions + 0.3 * torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]]
    NVE(LennardJones(), constraints=[constraint]).run(batch, 1)
    assert constraint.numbers(batch) != [225]


def test_systems_without_a_space_group_to_keep_are_set_aside(caplog):
    slab = turned("fcc")
    slab.pbc = (True, True, False)
    twice = turned("fcc")
    twice.positions[1] = twice.positions[0]
    half = AtomicData.from_ase(turned("fcc"))
    mask = torch.ones(4, 3, dtype=torch.bool)
    given = [cluster(4), slab, half, twice]
    structures = [one if isinstance(one, AtomicData) else AtomicData.from_ase(one) for one in given]
    masks = [mask, mask, mask.clone(), mask]
    masks[2][1, 2] = False
    structures = [one.replace(atom_extras={"move_mask": own}) for one, own in zip(structures, masks, strict=True)]
    batch = batch_of(*structures)
    FIRE(LennardJones(), constraints=[FixSymmetry()]).run(batch, 2)
    assert batch.outcome.tolist() == [Outcome.FAILED] * 4
    reasons = [info["failure"] for info in batch.info]
    assert "periodic along three axes" in reasons[0]
    assert "periodic along three axes" in reasons[1]
    assert "along some axes only" in reasons[2]
    assert "spglib finds no space group" in reasons[3]


def test_fixed_atoms_stay_fixed_in_their_symmetry():
    batch = batch_of(turned("rutile"))
    before = batch.positions.clone()
    dynamics = FIRE(LennardJones(), constraints=[FixAtoms(elements=["Cu"]), FixSymmetry()])
    dynamics.run(batch, 5)
    fixed = batch.atomic_numbers == 29
    torch.testing.assert_close(batch.positions[fixed], before[fixed], atol=1e-12, rtol=0)
    # argon sits where every mirror fixes it
    assert dynamics.degrees_of_freedom(batch).tolist() == [1.0]


def test_one_fixed_atom_takes_the_symmetry_that_would_move_it():
    batch = batch_of(turned("fcc"))
    constraint = FixSymmetry()
    dynamics = NVE(LennardJones(), constraints=[FixAtoms([0]), constraint])
    dynamics.run(batch, 0)
    assert constraint.numbers(batch) == [221]
    forces = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forces[0] = 0
    assert constraint.forces(batch, forces)[0].abs().max() < 1e-15
    assert dynamics.degrees_of_freedom(batch).tolist() == [1.0]


def test_the_supercells_shape_does_not_take_symmetry_away():
    batch = batch_of(ase.build.bulk("Ar", "fcc", a=5.4, cubic=True) * (2, 2, 1))
    constraint = FixSymmetry()
    virial = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    constraint.check(batch)
    found = constraint.virial(batch, virial)[0]
    torch.testing.assert_close(found, torch.eye(3, dtype=torch.float64) * torch.trace(virial[0]) / 3, atol=1e-12, rtol=0)


def test_without_spglib_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "spglib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'carryall\[symmetry\]'"):
        FixSymmetry()
    monkeypatch.undo()
    with pytest.raises(InputError, match="symprec of FixSymmetry must be positive"):
        FixSymmetry(0.0)
