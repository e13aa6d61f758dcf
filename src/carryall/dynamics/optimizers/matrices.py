"""Functions of 3 x 3 matrices, (n, 3, 3) float64, whose last bits do not depend on what else is in the batch.

`torch.linalg.matrix_exp` does not serve: it chooses its method, and so its rounding, by the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ROOT_STEPS = 10
"""Of the iteration for a square root: enough from 1e-3 to 1e3, and no step does harm once it has converged."""
NEAR_ONE = 0.34
"""Up to this norm of A - 1 the eight-point rule gives log A to rounding: Cheng, Higham, Kenney, Laub (2001), table 2.1."""
PADE_NORM = 0.95
"""Up to this norm the [7/7] approximant gives exp A to rounding: Higham, SIAM J. Matrix Anal. Appl. 26, 1179 (2005)."""
PADE = (17297280.0, 8648640.0, 1995840.0, 277200.0, 25200.0, 1512.0, 56.0, 1.0)
MAX_HALVINGS = 30
NODES, WEIGHTS = (0.5 * np.array(one) for one in np.polynomial.legendre.leggauss(8))
NODES = NODES + 0.5
"""Of Gauss and Legendre's rule with eight points on (0, 1)."""


def identity(like: Tensor) -> Tensor:
    """(3, 3)."""
    return torch.eye(3, dtype=like.dtype, device=like.device)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b."""
    if a.device.type == "cpu":
        # for matrices this small torch runs plain loops, the same for each, and no BLAS
        return torch.bmm(a, b)
    x, y, z = (a[:, :, :, None] * b[:, None]).unbind(2)
    return (x + y) + z


def cofactors(a: Tensor) -> Tensor:
    """(..., 3, 3) signed minors: a^T cofactors(a) = det(a)."""
    return torch.linalg.cross(a.roll(-1, -2), a.roll(-2, -2), dim=-1)


def determinant(a: Tensor, minors: Tensor | None = None) -> Tensor:
    """(...) of matrices (..., 3, 3)."""
    x, y, z = (a[..., 0, :] * (cofactors(a) if minors is None else minors)[..., 0, :]).unbind(-1)
    return (x + y) + z


def inverse(a: Tensor) -> Tensor:
    """(..., 3, 3) a^-1; infinite or NaN where there is none."""
    minors = cofactors(a)
    return minors.transpose(-1, -2) / determinant(a, minors)[..., None, None]


def trace(a: Tensor) -> Tensor:
    """(n,)."""
    x, y, z = a.diagonal(dim1=-2, dim2=-1).unbind(-1)
    return (x + y) + z


def norm(a: Tensor) -> Tensor:
    """(n,), largest sum of the sizes of a row: no smaller than any eigenvalue."""
    x, y, z = a.abs().unbind(-1)
    return ((x + y) + z).amax(-1)


def exponential(a: Tensor) -> Tensor:
    """exp a, by halving, a Padé approximant and squaring."""
    a, part = _halved(a)
    squared, fourth, sixth = _even_powers(a)
    odd = product(a, PADE[7] * sixth + PADE[5] * fourth + PADE[3] * squared + PADE[1] * identity(a))
    even = PADE[6] * sixth + PADE[4] * fourth + PADE[2] * squared + PADE[0] * identity(a)
    value = product(inverse(even - odd), even + odd)
    while bool((left := part < 1.0).any()):
        value = torch.where(left[:, None, None], product(value, value), value)
        part = 2.0 * part
    return value


def exponential_derivative(a: Tensor, direction: Tensor) -> Tensor:
    """d/dt exp(a + t direction) at t = 0, the Fréchet derivative: `exponential`, differentiated step by step.

    Al-Mohy and Higham, SIAM J. Matrix Anal. Appl. 30, 1639 (2009).
    """
    a, part = _halved(a)
    direction = direction * part[:, None, None]
    squared, fourth, sixth = _even_powers(a)
    d_squared = product(a, direction) + product(direction, a)
    d_fourth = product(squared, d_squared) + product(d_squared, squared)
    d_sixth = product(fourth, d_squared) + product(d_fourth, squared)
    factor = PADE[7] * sixth + PADE[5] * fourth + PADE[3] * squared + PADE[1] * identity(a)
    odd = product(a, factor)
    even = PADE[6] * sixth + PADE[4] * fourth + PADE[2] * squared + PADE[0] * identity(a)
    d_odd = product(a, PADE[7] * d_sixth + PADE[5] * d_fourth + PADE[3] * d_squared) + product(direction, factor)
    d_even = PADE[6] * d_sixth + PADE[4] * d_fourth + PADE[2] * d_squared
    divisor = inverse(even - odd)
    value = product(divisor, even + odd)
    slope = product(divisor, (d_odd + d_even) + product(d_odd - d_even, value))
    while bool((left := part < 1.0).any()):
        chosen = left[:, None, None]
        slope = torch.where(chosen, product(value, slope) + product(slope, value), slope)
        value = torch.where(chosen, product(value, value), value)
        part = 2.0 * part
    return slope


def _halved(a: Tensor) -> tuple[Tensor, Tensor]:
    """a times 1/2, 1/4 ... until it is within the reach of the approximant, and that power (n,)."""
    size = norm(a)
    part = torch.ones_like(size)
    for _ in range(MAX_HALVINGS):
        far = size > PADE_NORM
        if not bool(far.any()):
            break
        size, part = torch.where(far, 0.5 * size, size), torch.where(far, 0.5 * part, part)
    return a * part[:, None, None], part


def _even_powers(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    squared = product(a, a)
    fourth = product(squared, squared)
    return squared, fourth, product(fourth, squared)


def logarithm(a: Tensor) -> Tensor:
    """Principal log a; NaN where det a is not positive.

    Square roots until a is near 1, then the integral of (a - 1) (1 + s (a - 1))^-1 over s from 0 to 1 by Gauss and Legendre's
    rule, which is a Padé approximant: Dieci, Morini, Papini, SIAM J. Matrix Anal. Appl. 17, 570 (1996).
    """
    one = identity(a)
    a = torch.where((determinant(a) > 0)[:, None, None], a, torch.nan)
    scale = torch.ones_like(a[:, 0, 0])
    for _ in range(MAX_HALVINGS):
        far = norm(a - one) > NEAR_ONE
        if not bool(far.any()):
            break
        a = torch.where(far[:, None, None], square_root(a), a)
        scale = torch.where(far, 2.0 * scale, scale)
    nodes, weights = (torch.as_tensor(x, dtype=a.dtype, device=a.device)[:, None, None] for x in (NODES, WEIGHTS))
    shift = a - one
    total = weights * inverse(one + nodes * shift[:, None])
    for half in (4, 2, 1):
        total = total[:, :half] + total[:, half:]
    return product(shift * scale[:, None, None], total[:, 0])


def square_root(a: Tensor) -> Tensor:
    """Principal square root: Denman and Beavers, Appl. Math. Comput. 2, 63 (1976)."""
    root, inverse_root = a, identity(a).expand_as(a)
    for _ in range(ROOT_STEPS):
        root, inverse_root = 0.5 * (root + inverse(inverse_root)), 0.5 * (inverse_root + inverse(root))
    return root
