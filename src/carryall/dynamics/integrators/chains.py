"""Nosé-Hoover chains: many independent chains side by side, on the host.

A chain has `n_links` variables with position eta and rate xi = d eta / dt. The first heats `degrees` degrees of freedom, the
others one each; with masses Q_1 = degrees k_B T tau² and Q_j = k_B T tau² the equations hold times and ratios only:

    d xi_1 / dt = (2 E_kin / (degrees k_B T) - 1) / tau² - xi_1 xi_2
    d xi_2 / dt = degrees xi_1² - 1 / tau² - xi_2 xi_3,     d xi_j / dt = xi_(j-1)² - 1 / tau² - xi_j xi_(j+1)

and the last link has no friction. So a change of the temperature keeps the rates and the period, as in LAMMPS.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_CUBE = 2.0 ** (1.0 / 3.0)
WEIGHTS = (1.0 / (2.0 - _CUBE), -_CUBE / (2.0 - _CUBE), 1.0 / (2.0 - _CUBE))
"""Suzuki and Yoshida's composition of fourth order: H. Yoshida, Phys. Lett. A 150, 262 (1990)."""
LARGEST_EXPONENT = 700.0


def exponential(x: Array) -> Array:
    """exp(x), each by Python's: a vectorised one may differ in the last bit with the place in the array."""
    limited = np.clip(x, -LARGEST_EXPONENT, LARGEST_EXPONENT)
    return np.fromiter(map(math.exp, limited.ravel().tolist()), np.float64, x.size).reshape(x.shape)


def propagate(
    position: Array, rate: Array, doubled_kinetic: Array, degrees: Array, kT: Array, tau: Array, time: Array
) -> tuple[Array, Array, Array]:
    """Chains after `time`: their position and rate (n_links, n), and the factor (n,) of the velocities that they heat.

    doubled_kinetic (n,): 2 E_kin, eV. degrees, kT (eV), tau and time (Å sqrt(amu / eV)): (n,).
    Time-reversible: Martyna, Tuckerman, Tobias and Klein, Mol. Phys. 87, 1117 (1996).
    """
    xi, eta = list(rate), position
    factor = np.ones_like(doubled_kinetic)
    stiffness = 1.0 / (tau * tau)
    ratio = doubled_kinetic / (degrees * kT)
    for weight in WEIGHTS:
        h = weight * time
        _sweep(xi, ratio, degrees, stiffness, h, range(len(xi) - 1, -1, -1))
        eta = eta + h * np.stack(xi)
        damping = exponential(-h * xi[0])
        factor, ratio = factor * damping, ratio * (damping * damping)
        _sweep(xi, ratio, degrees, stiffness, h, range(len(xi)))
    return eta, np.stack(xi), factor


def _sweep(xi: list[Array], ratio: Array, degrees: Array, stiffness: Array, h: Array, links: range) -> None:
    """Half a step of each link in turn: half of the friction, the force, the other half."""
    for j in links:
        if j == 0:
            force = (ratio - 1.0) * stiffness
        else:
            force = (degrees if j == 1 else 1.0) * (xi[j - 1] * xi[j - 1]) - stiffness
        if j == len(xi) - 1:
            xi[j] = xi[j] + (0.5 * h) * force
        else:
            friction = exponential((-0.25 * h) * xi[j + 1])
            xi[j] = (xi[j] * friction + (0.5 * h) * force) * friction


def energy(position: Array, rate: Array, degrees: Array, kT: Array, tau: Array) -> Array:
    """(n,) eV of chains (n_links, n): kinetic energy of the links, and the work that the bath has done."""
    moving, work = degrees * rate[0] * rate[0], degrees * position[0]
    for j in range(1, len(rate)):
        moving, work = moving + rate[j] * rate[j], work + position[j]
    return kT * (0.5 * tau * tau * moving + work)
