"""Energy minimisation."""

from carryall.dynamics.optimizers.fire import FIRE as FIRE
