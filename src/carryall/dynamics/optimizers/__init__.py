"""Energy minimisation."""

from carryall.dynamics.optimizers.fire import FIRE as FIRE
from carryall.dynamics.optimizers.gradient_descent import GradientDescent as GradientDescent
from carryall.dynamics.optimizers.lbfgs import LBFGS as LBFGS
