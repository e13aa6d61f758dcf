"""Strained crystals, and ASE's optimizers and cell filters on the same potential as ours."""

import ase.build
import numpy as np
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.filters import FrechetCellFilter, UnitCellFilter
from ase.optimize import FIRE as AseFIRE
from ase.optimize import LBFGS as AseLBFGS
from dynamics_samples import LennardJones, batch_of

from carryall.data.units import GPa
from carryall.dynamics.optimizers import FIRE, LBFGS, GradientDescent

CUTOFF = 6.0
OURS = {"fire": FIRE, "lbfgs": LBFGS, "descent": GradientDescent}
FILTERS = {"unit_cell": UnitCellFilter, "frechet": FrechetCellFilter}


def potential():
    """Lennard-Jones argon; `ase_calculator` is the same in ASE's own code."""
    return LennardJones(cutoff=CUTOFF)


def ase_calculator():
    return AseLennardJones(sigma=3.4, epsilon=0.0104, rc=CUTOFF)


def strained(atoms, size, rattle, seed):
    """Turned and sheared at random by `size`, rattled by `rattle` Å."""
    rng = np.random.default_rng(seed)
    atoms.set_cell(atoms.cell @ (np.eye(3) + rng.uniform(-size, size, (3, 3))), scale_atoms=True)
    atoms.rattle(rattle, rng=rng)
    return atoms


def crystals():
    """A cubic cell, a triclinic one, and hexagonal layers, of different sizes, strained by up to 6 %."""
    cubic = strained(ase.build.bulk("Ar", "fcc", a=5.5, cubic=True), 0.02, 0.1, 1)
    triclinic = strained(ase.build.bulk("Ar", "fcc", a=5.2) * (2, 2, 1), 0.06, 0.15, 2)
    hexagonal = strained(ase.build.bulk("Ar", "hcp", a=3.9, c=6.2) * (2, 1, 1), 0.04, 0.05, 3)
    return [cubic, triclinic, hexagonal]


def ase_view(atoms, cell_filter=None, pressure=0.0, cell_mask=None, cell_factor=None, **settings):
    """What ASE's optimizers move."""
    atoms.calc = ase_calculator()
    if cell_filter is None:
        return atoms
    if cell_factor is not None:
        settings["cell_factor" if cell_filter == "unit_cell" else "exp_cell_factor"] = cell_factor
    return FILTERS[cell_filter](atoms, mask=cell_mask, scalar_pressure=pressure * GPa, **settings)


class Descent:
    """Gradient descent in a few lines of numpy, on whatever ASE's optimizers move."""

    def __init__(self, view, step_size=0.01, maxstep=0.2, logfile=None):
        self.view, self.step_size, self.maxstep = view, step_size, maxstep

    def step(self):
        move = self.step_size * self.view.get_forces()
        longest = np.linalg.norm(move, axis=1).max()
        self.view.set_positions(self.view.get_positions() + move * min(1.0, self.maxstep / longest))


THEIRS = {"fire": AseFIRE, "lbfgs": AseLBFGS, "descent": Descent}


def batch_and_references(kind, images, cell, fmax=None, **settings):
    """Our batch and optimizer, and for each image ASE's optimizer; `cell`: options of the filter."""
    batch, ours = batch_of(*images), OURS[kind](potential(), convergence_hook=fmax, **settings, **cell)
    return batch, ours, [THEIRS[kind](ase_view(atoms, **cell), logfile=None, **settings) for atoms in images]
