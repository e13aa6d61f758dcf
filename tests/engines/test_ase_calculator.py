"""The ASE calculator against ASE's own Lennard-Jones, and how often it calls the model."""

import subprocess
import sys

import ase.build
import numpy as np
import pytest
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

import carryall.engines
from carryall.engines.ase import Calculator
from carryall.errors import InputError
from carryall.models import EagerPotential, LennardJones


def potential():
    return EagerPotential(LennardJones(("Ar",), (0.0104,), (3.4,), 8.5, "shift"))


def argon(repeat=2, rattle=0.1):
    atoms = ase.build.bulk("Ar", "fcc", a=5.3, cubic=True) * (repeat, repeat, 1)
    atoms.rattle(rattle, seed=1)
    return atoms


def both(atoms):
    other = atoms.copy()
    atoms.calc = Calculator(potential())
    other.calc = AseLennardJones(sigma=3.4, epsilon=0.0104, rc=8.5, smooth=False)
    return atoms, other


@pytest.mark.parametrize("pbc", [True, (True, True, False), False])
def test_all_properties_are_those_of_ase(pbc):
    atoms = argon()
    atoms.set_cell(atoms.cell.array @ np.array([[1, 0.1, 0], [0, 1.02, 0], [0, -0.05, 1]]), scale_atoms=True)
    atoms.pbc = pbc
    ours, ase_s = both(atoms)
    assert ours.get_potential_energy() == pytest.approx(ase_s.get_potential_energy(), abs=1e-10)
    assert ours.get_potential_energy(force_consistent=True) == ours.get_potential_energy()
    np.testing.assert_allclose(ours.get_forces(), ase_s.get_forces(), atol=1e-10)
    np.testing.assert_allclose(ours.get_potential_energies(), ase_s.get_potential_energies(), atol=1e-10)
    np.testing.assert_allclose(ours.get_stress(), ase_s.get_stress(), atol=1e-12)


def test_a_molecule_has_no_stress():
    atoms = argon(1)
    atoms.set_cell(None)
    atoms.pbc = False
    ours, ase_s = both(atoms)
    assert ours.get_potential_energy() == pytest.approx(ase_s.get_potential_energy(), abs=1e-10)
    for _ in range(2):
        with pytest.raises(PropertyNotImplementedError):
            ours.get_stress()
    assert ours.calc.n_calls == 1


def test_nothing_is_computed_twice():
    atoms = argon()
    calculator = Calculator(potential())
    atoms.calc = calculator
    atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(), atoms.get_potential_energies()
    atoms.set_initial_charges(np.ones(len(atoms)))
    atoms.set_velocities(np.ones((len(atoms), 3)))
    atoms.get_forces()
    assert calculator.n_calls == 1
    atoms.positions[0, 0] += 0.05
    atoms.get_forces()
    assert calculator.n_calls == 2
    assert calculator.neighbors.n_searches == 1
    atoms.positions[0, 0] += 0.5
    atoms.get_forces()
    assert calculator.neighbors.n_searches == 2


def test_results_belong_to_the_caller():
    atoms = argon(1)
    atoms.calc = Calculator(potential())
    atoms.get_forces()[:] = 0
    assert np.abs(atoms.get_forces()).max() > 0


def test_a_cell_relaxation_runs():
    atoms = argon(1, 0.02)
    atoms.calc = Calculator(potential())
    assert BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3, steps=100)
    assert atoms.get_potential_energy() / len(atoms) < -0.07
    assert np.abs(atoms.get_stress()).max() < 1e-4


def test_one_calculator_serves_other_structures():
    calculator = Calculator(potential())
    for atoms in (argon(1), argon(2), argon(1, 0.2)):
        atoms.calc = calculator
        fresh = atoms.copy()
        fresh.calc = Calculator(potential())
        assert atoms.get_potential_energy() == fresh.get_potential_energy()


def test_errors_say_what_is_wrong():
    for atoms, message in (
        (ase.Atoms("ArXe", [[0, 0, 0], [0, 0, 4]]), "atom 1 is Xe"),
        (ase.Atoms("Ar2", [[0, 0, 0], [0, 0, 0]]), "coincide"),
        (ase.Atoms("Ar", [[np.nan, 0, 0]]), "finite"),
        (ase.Atoms(), "no atoms"),
    ):
        atoms.calc = Calculator(potential())
        with pytest.raises(InputError, match=message):
            atoms.get_potential_energy()


def test_the_engine_is_an_attribute_and_knows_no_model():
    assert carryall.engines.ase.Calculator is Calculator
    with pytest.raises(AttributeError, match="no attribute 'lamps'"):
        carryall.engines.lamps  # noqa: B018
    code = "import carryall.engines.ase, sys; assert not [name for name in sys.modules if name.startswith('carryall.models')]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_ase_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['ase'] = None; sys.modules['ase.calculators.calculator'] = None\n"
        "from carryall.errors import MissingDependencyError\n"
        "try:\n    import carryall.engines.ase\n"
        "except MissingDependencyError as error:\n    assert 'pip install' in str(error)\n"
        "else:\n    raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
