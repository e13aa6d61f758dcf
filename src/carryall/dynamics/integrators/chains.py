"""Nosé-Hoover chains: many independent chains side by side, on the host.

A chain has `n_links` variables with position eta and rate xi = d eta / dt. The first heats `degrees` degrees of freedom, the
others one each; with masses Q_1 = degrees k_B T tau² and Q_j = k_B T tau² the equations hold times and ratios only:

    d xi_1 / dt = (2 E_kin / (degrees k_B T) - 1) / tau² - xi_1 xi_2
    d xi_2 / dt = degrees xi_1² - 1 / tau² - xi_2 xi_3,     d xi_j / dt = xi_(j-1)² - 1 / tau² - xi_j xi_(j+1)

and the last link has no friction. So a change of the temperature keeps the rates and the period, as in LAMMPS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Value = Any
"""A float, or an array (n,) of them: the arithmetic is the same, and plain numbers are cheaper where there are few."""

_THREE = 1.0 / (2.0 - 2.0 ** (1.0 / 3.0))
_FIVE = 1.0 / (4.0 - 4.0 ** (1.0 / 3.0))
WEIGHTS = {1: (1.0,), 3: (_THREE, 1.0 - 2.0 * _THREE, _THREE), 5: (_FIVE, _FIVE, 1.0 - 4.0 * _FIVE, _FIVE, _FIVE)}
"""Parts that a time is split into, by their number: H. Yoshida, Phys. Lett. A 150, 262 (1990); M. Suzuki, ibid. 146, 319."""
FEW = 8
"""Up to so many chains are moved one by one in plain numbers."""
LARGEST_EXPONENT = 700.0


def exponential(x: Value) -> Value:
    """exp(x), each by Python's: a vectorised one may differ in the last bit with the place in the array."""
    if isinstance(x, float):
        return math.exp(min(max(x, -LARGEST_EXPONENT), LARGEST_EXPONENT))
    limited = np.clip(x, -LARGEST_EXPONENT, LARGEST_EXPONENT)
    return np.fromiter(map(math.exp, limited.ravel().tolist()), np.float64, x.size).reshape(x.shape)


def propagate(
    position: Array,
    rate: Array,
    doubled_kinetic: Array,
    degrees: Array,
    kT: Array,
    tau: Array,
    time: Array,
    weights: Sequence[float] = WEIGHTS[3],
) -> tuple[Array, Array, Array]:
    """Chains after `time`: their position and rate (n_links, n), and the factor (n,) of the velocities that they heat.

    doubled_kinetic (n,): 2 E_kin, eV. degrees, kT (eV), tau and time (Å sqrt(amu / eV)): (n,), above zero. Time-reversible:
    Martyna, Tuckerman, Tobias and Klein, Mol. Phys. 87, 1117 (1996). Numbers that grow beyond bounds come out as they are.
    """
    length = len(position)
    with np.errstate(all="ignore"):
        ratio, stiffness = doubled_kinetic / (degrees * kT), 1.0 / (tau * tau)
        if len(ratio) > FEW:
            eta, xi, factor = _advanced(list(position), list(rate), ratio, degrees, stiffness, time, weights)
            return np.stack(eta), np.stack(xi), factor
    moved = np.empty((2 * length + 1, len(ratio)))
    table = np.stack([ratio, degrees, stiffness, time, *position, *rate]).T.tolist()
    for column, (one_ratio, count, one_stiffness, span, *links) in enumerate(table):
        eta, xi, one_factor = _advanced(links[:length], links[length:], one_ratio, count, one_stiffness, span, weights)
        moved[:, column] = [*eta, *xi, one_factor]
    return moved[:length], moved[length:-1], moved[-1]


def energy(position: Array, rate: Array, degrees: Array, kT: Array, tau: Array) -> Array:
    """(n,) eV of chains (n_links, n): kinetic energy of the links, and the work that the bath has done."""
    moving, work = degrees * rate[0] * rate[0], degrees * position[0]
    for j in range(1, len(rate)):
        moving, work = moving + rate[j] * rate[j], work + position[j]
    return np.asarray(kT * (0.5 * tau * tau * moving + work))


def _advanced(
    eta: list[Value], xi: list[Value], ratio: Value, degrees: Value, stiffness: Value, time: Value, weights: Sequence[float]
) -> tuple[list[Value], list[Value], Value]:
    """eta and xi after `time`, and the factor; ratio: 2 E_kin / (degrees k_B T)."""
    factor: Value = 1.0
    for weight in weights:
        h = weight * time
        _sweep(xi, ratio, degrees, stiffness, h, range(len(xi) - 1, -1, -1))
        eta = [place + h * speed for place, speed in zip(eta, xi, strict=True)]
        damping = exponential(-h * xi[0])
        factor, ratio = factor * damping, ratio * (damping * damping)
        _sweep(xi, ratio, degrees, stiffness, h, range(len(xi)))
    return eta, xi, factor


def _sweep(xi: list[Value], ratio: Value, degrees: Value, stiffness: Value, h: Value, links: range) -> None:
    """Half a step of each link in turn: half of the friction, the force, the other half."""
    for j in links:
        force = (xi[j - 1] * xi[j - 1]) * (degrees if j == 1 else 1.0) - stiffness if j else (ratio - 1.0) * stiffness
        if j == len(xi) - 1:
            xi[j] = xi[j] + (0.5 * h) * force
        else:
            friction = exponential((-0.25 * h) * xi[j + 1])
            xi[j] = (xi[j] * friction + (0.5 * h) * force) * friction
