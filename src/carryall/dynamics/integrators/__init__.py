"""Equations of motion."""

from carryall.dynamics.integrators.langevin import NVTLangevin as NVTLangevin
from carryall.dynamics.integrators.nve import NVE as NVE
