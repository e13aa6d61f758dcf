"""Constraints: what forces, virials and velocities have to obey."""

from carryall.dynamics.constraints.base import Constraint as Constraint
from carryall.dynamics.constraints.base import Unconstrained as Unconstrained
from carryall.dynamics.constraints.center_of_mass import FixCenterOfMass as FixCenterOfMass
from carryall.dynamics.constraints.fixed_atoms import FixAtoms as FixAtoms
from carryall.dynamics.constraints.symmetry import FixSymmetry as FixSymmetry
