"""Cell filters: matrix functions, generalised forces, masks, pressures, systems that have no cell to change."""

import ase.build
import numpy as np
import pytest
import torch
from ase.constraints import FixAtoms, FixCartesian
from dynamics_samples import batch_of, cluster
from optimizer_samples import (
    FILTERS,
    OURS,
    THEIRS,
    ase_calculator,
    ase_view,
    batch_and_references,
    crystals,
    potential,
    strained,
)
from scipy.linalg import expm, expm_frechet, logm

from carryall.data.units import GPa
from carryall.dynamics import Ramp
from carryall.dynamics.optimizers import FIRE, LBFGS, GradientDescent, matrices
from carryall.dynamics.status import OUTCOME, Outcome
from carryall.errors import InputError


def random_matrices(size, n=40, seed=0):
    return np.random.default_rng(seed).uniform(-size, size, (n, 3, 3))


@pytest.mark.parametrize("size", [1e-5, 0.02, 0.2, 0.8, 2.5])
def test_exponential_and_its_derivative_are_those_of_scipy(size):
    a, direction = random_matrices(size), random_matrices(1.0, seed=1)
    ours = matrices.exponential(torch.from_numpy(a)).numpy()
    slope = matrices.exponential_derivative(torch.from_numpy(a), torch.from_numpy(direction)).numpy()
    for i in range(len(a)):
        exact = expm(a[i])
        np.testing.assert_allclose(ours[i], exact, rtol=0, atol=1e-12 * abs(exact).max())
        exact = expm_frechet(a[i], direction[i], compute_expm=False)
        np.testing.assert_allclose(slope[i], exact, rtol=0, atol=1e-12 * abs(exact).max())


@pytest.mark.parametrize("size", [1e-5, 0.02, 0.2, 0.8])
def test_logarithm_undoes_the_exponential_and_is_scipy_s(size):
    a = random_matrices(size, seed=2)
    grown = np.stack([expm(one) for one in a])
    ours = matrices.logarithm(torch.from_numpy(grown)).numpy()
    np.testing.assert_allclose(ours, a, rtol=0, atol=3e-14)
    np.testing.assert_allclose(ours, np.stack([logm(one) for one in grown]), rtol=0, atol=1e-12)


def test_a_mirrored_cell_has_no_logarithm():
    assert bool(matrices.logarithm(torch.diag(torch.tensor([1.0, 1.0, -1.0]))[None]).isnan().all())


def test_determinant_trace_and_inverse():
    a = torch.from_numpy(random_matrices(1.0))
    torch.testing.assert_close(matrices.determinant(a), torch.linalg.det(a), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(matrices.inverse(a), torch.linalg.inv(a), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(matrices.trace(a), a.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-14, atol=1e-14)


def test_matrix_functions_do_not_depend_on_the_batch():
    # sizes that need different numbers of roots and squarings stand side by side
    a = torch.from_numpy(np.concatenate([random_matrices(size, 30, seed=5) for size in (1e-4, 0.3, 2.0)]))
    other = torch.from_numpy(random_matrices(1.0, 90, seed=6))
    grown = matrices.exponential(a)
    functions = [matrices.exponential, matrices.inverse, matrices.logarithm, matrices.determinant]
    for function in functions:
        whole = function(grown)
        for step in (1, 7):
            parts = torch.cat([function(grown[i : i + step]) for i in range(0, 90, step)])
            assert torch.equal(parts.nan_to_num(7.0), whole.nan_to_num(7.0))
    parts = [matrices.exponential_derivative(a[i : i + 7], other[i : i + 7]) for i in range(0, 90, 7)]
    assert torch.equal(torch.cat(parts), matrices.exponential_derivative(a, other))


# -- generalised forces


@pytest.mark.parametrize("pressure", [0.0, 0.5])
@pytest.mark.parametrize("kind", FILTERS)
def test_forces_are_minus_the_derivatives_of_the_enthalpy(kind, pressure):
    batch = batch_of(crystals()[1])
    optimizer = FIRE(potential(), cell_filter=kind, pressure=pressure, cell_factor=1.0)
    optimizer.run(batch, 3)
    forces = optimizer.cell.point(batch, optimizer.key).forces
    atom_forces, cell_forces = forces.atoms.clone(), forces.cell.clone()
    reference, here = batch.get("fire_reference_cell").numpy()[0], batch.clone()
    gradient = np.linalg.solve(reference, here.cell[0].numpy()).T
    rows, strain = here.positions.numpy() @ np.linalg.inv(gradient.T), gradient if kind == "unit_cell" else logm(gradient)

    def enthalpy(rows, strain):
        deformed = strain if kind == "unit_cell" else expm(strain)
        atoms = here.to_ase()[0]
        atoms.set_cell(reference @ deformed.T)
        atoms.positions = rows @ deformed.T
        atoms.calc = ase_calculator()
        return atoms.get_potential_energy() + pressure * GPa * atoms.get_volume()

    h = 1e-4
    for i in range(3):
        for j in range(3):
            up, down = (strain + sign * h * np.eye(3)[[i]].T @ np.eye(3)[[j]] for sign in (1, -1))
            slope = (enthalpy(rows, up) - enthalpy(rows, down)) / (2 * h)
            assert float(cell_forces[0, i, j]) == pytest.approx(-slope, abs=2e-6)
    move = np.zeros_like(rows)
    move[2, 1] = h
    slope = (enthalpy(rows + move, strain) - enthalpy(rows - move, strain)) / (2 * h)
    assert float(atom_forces[2, 1]) == pytest.approx(-slope, abs=2e-6)


@pytest.mark.parametrize("name", ["fire", "lbfgs"])
@pytest.mark.parametrize("kind", FILTERS)
def test_fmax_and_the_number_of_steps_are_ase_s(kind, name):
    settings = {"alpha": 5.0} if name == "lbfgs" else {"dtmax": 3.0}
    cell = {"cell_filter": kind, "pressure": 0.3}
    images = crystals()[:2]
    batch, ours, references = batch_and_references(name, images, cell, fmax=0.002, **settings)
    ours.run(batch, 400)
    assert batch.get(OUTCOME).tolist() == [Outcome.CONVERGED] * 2
    for index, reference in enumerate(references):
        assert reference.run(fmax=0.002, steps=400)
        assert int(ours.steps(batch)[index]) == reference.nsteps > 5
        forces = reference.optimizable.filterobj.get_forces()
        assert float(batch.fmax[index]) == pytest.approx(np.linalg.norm(forces, axis=1).max(), abs=1e-9)
        # a minimum of the enthalpy: the stress is minus the pressure
        np.testing.assert_allclose(batch.stress[index], -0.3 * GPa * np.eye(3), atol=1e-4)


@pytest.mark.parametrize("kind", FILTERS)
def test_each_system_has_its_own_pressure_by_its_id(kind):
    one = crystals()[0]
    settings = {"dtmax": 3.0, "convergence_hook": 1e-4, "cell_filter": kind}
    batch = batch_of(one, one, one).index_select([2, 0])
    batch.set("system_id", torch.tensor([2, 0]), level="system")
    FIRE(potential(), pressure=[0.5, 9.0, -0.1], **settings).run(batch, 400)
    for index, pressure in enumerate([-0.1, 0.5]):
        alone = batch_of(one)
        FIRE(potential(), pressure=pressure, **settings).run(alone, 400)
        assert torch.equal(alone.cell[0], batch.cell[index])
        np.testing.assert_allclose(batch.stress[index], -pressure * GPa * np.eye(3), atol=1e-5)
    assert float(batch.volume[0]) > float(batch.volume[1])


def test_a_mask_holds_its_components_still():
    batch = batch_of(ase.build.bulk("Ar", "fcc", a=5.0, cubic=True))
    before = batch.cell.clone()
    FIRE(potential(), cell_filter="frechet", cell_mask=[True, True, False, False, False, False]).run(batch, 20)
    assert float(batch.cell[0, 0, 0]) > 5.05
    assert torch.equal(batch.cell[0, 2], before[0, 2])


def test_shape_and_volume_alone():
    images = crystals()
    batch, volume = batch_of(*images), batch_of(*images).volume
    FIRE(potential(), cell_filter="frechet", constant_volume=True, dt=0.05).run(batch, 30)
    torch.testing.assert_close(batch.volume, volume, rtol=1e-3, atol=0)
    batch = batch_of(*images)
    before = batch.cell / batch.volume[:, None, None] ** (1 / 3)
    FIRE(potential(), cell_filter="frechet", hydrostatic_strain=True).run(batch, 30)
    assert float((batch.volume - volume).abs().min()) > 0.1
    torch.testing.assert_close(batch.cell / batch.volume[:, None, None] ** (1 / 3), before, rtol=0, atol=1e-12)


# -- atoms that are held


@pytest.mark.parametrize("name", ["fire", "lbfgs"])
@pytest.mark.parametrize("kind", FILTERS)
def test_held_atoms_move_with_the_cell_as_in_ase(kind, name):
    images = crystals()[:2]
    images[0].set_constraint(FixAtoms([1]))
    images[1].set_constraint([FixAtoms([0]), FixCartesian([2], mask=(True, False, True))])
    batch = batch_of(*[atoms.copy() for atoms in images])
    mask = torch.ones(batch.n_atoms, 3, dtype=torch.bool)
    mask[1] = mask[4] = False
    mask[6, 0] = mask[6, 2] = False
    batch.set("move_mask", mask, level="atom")
    optimizer = OURS[name](potential(), cell_filter=kind)
    references = [THEIRS[name](ase_view(atoms, kind), logfile=None) for atoms in images]
    for _ in range(30):
        optimizer.run(batch, 1)
        for index, (atoms, reference) in enumerate(zip(images, references, strict=True)):
            reference.step()
            np.testing.assert_allclose(batch.get_data(index).positions, atoms.positions, atol=1e-9)
            np.testing.assert_allclose(batch.cell[index], atoms.cell.array, atol=1e-9)
    fractional = batch.positions[1].numpy() @ np.linalg.inv(batch.cell[0].numpy())
    start = batch_of(crystals()[0])
    np.testing.assert_allclose(fractional, start.positions[1].numpy() @ np.linalg.inv(start.cell[0].numpy()), atol=1e-12)


# -- systems without a cell that can change


def slab():
    atoms = ase.build.bulk("Ar", "fcc", a=5.2, cubic=True) * (1, 1, 2)
    atoms.center(vacuum=6.0, axis=2)
    atoms.pbc = (True, True, False)
    atoms.rattle(0.1, seed=4)
    return atoms


def test_systems_without_a_cell_are_set_aside_with_the_reason():
    flat = crystals()[0]
    flat.cell[2] = flat.cell[0]
    batch = batch_of(cluster(4), crystals()[0], slab(), flat)
    FIRE(potential(), cell_filter="frechet").run(batch, 5)
    assert batch.get(OUTCOME).tolist() == [Outcome.FAILED, Outcome.RUNNING, Outcome.FAILED, Outcome.FAILED]
    assert "no cell with volume" in batch.info[0]["failure"]
    assert "no cell with volume" in batch.info[3]["failure"]
    assert "cell vector 2 is not periodic" in batch.info[2]["failure"]
    assert batch.get("fire_steps").tolist() == [0, 5, 0, 0]
    assert torch.equal(batch.cell[0], torch.zeros(3, 3, dtype=torch.float64))


def test_the_open_axis_of_a_slab_may_be_held_still():
    atoms = slab()
    batch = batch_of(atoms)
    FIRE(potential(), cell_filter="unit_cell", cell_mask=[1, 1, 0, 0, 0, 1]).run(batch, 30)
    reference = THEIRS["fire"](ase_view(atoms, "unit_cell", cell_mask=[1, 1, 0, 0, 0, 1]), logfile=None)
    for _ in range(30):
        reference.step()
    assert batch.get(OUTCOME).tolist() == [Outcome.RUNNING]
    np.testing.assert_allclose(batch.cell[0], atoms.cell.array, atol=1e-9)
    np.testing.assert_allclose(batch.positions, atoms.positions, atol=1e-9)
    assert abs(float(batch.cell[0, 0, 0]) - 5.2) > 0.01


# -- settings


@pytest.mark.parametrize("kind", [FIRE, LBFGS, GradientDescent])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell_filter": "frechet", "cell_mask": [1, 1, 0]}, r"cell_mask has shape \(3,\), expected \(3, 3\), or \(6,\)"),
        ({"cell_filter": "frechet", "cell_mask": [[1, 1], [1]]}, "cell_mask has shape"),
        ({"cell_filter": "frechet", "cell_mask": [0.5] * 6}, "true and false only"),
        ({"cell_filter": "frechet", "cell_mask": [[1, 1, 0], [0, 1, 0], [0, 0, 1]]}, "must be symmetric"),
        ({"cell_filter": "frechett"}, "perhaps you meant 'frechet'"),
        ({"pressure": 1.0}, "pressure has no effect at fixed cell"),
        ({"constant_volume": True, "cell_mask": [1] * 6}, "cell_mask, constant_volume has no effect"),
        ({"cell_filter": "unit_cell", "pressure": Ramp((0, 10), (0.0, 1.0))}, "a minimum has no schedule"),
        ({"cell_filter": "unit_cell", "pressure": float("nan")}, "pressure must be finite"),
        ({"cell_filter": "unit_cell", "hydrostatic_strain": 1}, "hydrostatic_strain must be true or false"),
        ({"cell_filter": "unit_cell", "cell_factor": 0.0}, "cell_factor must be a positive number"),
    ],
)
def test_options_are_checked_before_any_work(kind, options, message):
    with pytest.raises(InputError, match=message):
        kind(potential(), **options)


def test_a_misspelt_option_is_no_option():
    with pytest.raises(TypeError, match="cell_filer"):
        FIRE(potential(), cell_filer="frechet")


def test_describe_gives_what_differs_from_the_defaults():
    assert FIRE(potential(), cell_filter="frechet").describe() == {"cell_filter": "frechet"}
    full = LBFGS(potential(), memory=5, cell_filter="unit_cell", pressure=[1.0, 2.0], cell_mask=[1, 1, 0, 0, 0, 1]).describe()
    mask = [[True, True, False], [True, True, False], [False, False, False]]
    assert full == {"memory": 5, "cell_filter": "unit_cell", "pressure": [1.0, 2.0], "cell_mask": mask}
    assert GradientDescent(potential(), pressure=0.0).describe() == {}


def test_a_fixed_cell_after_a_filter_looks_at_the_forces_of_the_atoms_again():
    batch = batch_of(strained(ase.build.bulk("Ar", "fcc", a=5.2, cubic=True), 0.0, 0.2, 1))
    FIRE(potential(), cell_filter="frechet").run(batch, 5)
    largest = float(batch.forces.norm(dim=1).max())
    assert abs(float(batch.fmax) - largest) > 1e-6
    FIRE(potential()).run(batch, 1)
    assert float(batch.fmax) == pytest.approx(float(batch.forces.norm(dim=1).max()), abs=1e-14)


@pytest.mark.parametrize("kind", [None, "frechet"])
def test_fmax_of_systems_outside_the_mask_stays(kind):
    batch, optimizer = batch_of(*crystals()), FIRE(potential(), cell_filter=kind)
    batch.set("fmax", torch.full((3,), 7.0, dtype=torch.float64), level="system")
    optimizer.run(batch, 0)
    assert (batch.fmax < 1.0).all()
    batch.fmax = torch.full_like(batch.fmax, 7.0)
    optimizer.after_forces(batch, torch.tensor([True, False, True]))
    assert (batch.fmax == 7.0).tolist() == [False, True, False]


def test_each_stage_is_judged_by_its_own_forces():
    batch, alone, model = batch_of(*crystals()), batch_of(*crystals()), potential()
    FIRE(model, cell_filter="frechet", cell_factor=1.0, convergence_hook=0.03).run(alone, 300)
    first = FIRE(model, cell_filter="frechet", cell_factor=1.0, convergence_hook=0.03)
    stages = first + FIRE(model, convergence_hook=0.01, n_steps=300)
    stages.run(batch)
    assert batch.get(OUTCOME).tolist() == [Outcome.CONVERGED] * 3
    assert torch.equal(batch.get("fire_steps"), alone.get("fire_steps"))
    assert len(set(batch.get("fire_steps").tolist())) == 3
    assert float(batch.forces.norm(dim=1).max()) <= 0.01
