"""Counter-based normal numbers: the same (seed, system, atom, step) gives the same bits in any batch, process and order.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11, doi:10.1145/2063384.2063405) turns a counter and a key into four 32-bit words;
Box and Muller's transform turns those into normals. The logarithm, sine and cosine are polynomials in correctly rounded
operations only: vectorised library functions may differ in the last bit between the body and the tail of an array, which
would make a system's trajectory depend on its place in the batch.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.native import library
from carryall.native import noise as native

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Remez coefficients of fdlibm's kernels (Sun Microsystems 1993), accurate to one unit in the last place on their ranges.
LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
SIN = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
COS = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)
LN2 = 0.693147180559945309417

Array = Any
"""A numpy array or a tensor of int64 or float64: the arithmetic below is the same for both."""


class Stream(IntEnum):
    """What the numbers are for; streams never share a number."""

    THERMOSTAT = 0
    INITIAL_VELOCITIES = 1
    VELOCITY_RESCALING = 2
    CELL_RESCALING = 3


def philox(counter: Array, key: tuple[int, int]) -> Array:
    """(4, n) words in [0, 2**32) of int64 counters (4, n), each word in [0, 2**32), under a key of two such words."""
    even, odd = counter[0::2], counter[1::2]
    column = np.array if isinstance(counter, np.ndarray) else lambda rows: torch.tensor(rows, device=counter.device)
    multiplier = column([[MULTIPLIERS[0]], [MULTIPLIERS[1]]])
    first, second = key
    for _ in range(ROUNDS):
        # The signed product may wrap; its halves are right once masked, since the shift is followed by a mask.
        product = even * multiplier
        high = (product >> 32) & MASK
        even = _swapped(high) ^ odd ^ column([[first], [second]])
        odd = _swapped(product & MASK)
        first, second = (first + WEYL[0]) & MASK, (second + WEYL[1]) & MASK
    return _interleaved(even, odd)


def _swapped(rows: Array) -> Array:
    return rows[::-1] if isinstance(rows, np.ndarray) else rows.flip(0)


def _interleaved(even: Array, odd: Array) -> Array:
    stack = np.stack if isinstance(even, np.ndarray) else torch.stack
    return stack([even[0], odd[0], even[1], odd[1]])


def normals(words: Array) -> Array:
    """(4, n) independent standard normals, float64, of (4, n) words."""
    is_numpy = isinstance(words, np.ndarray)
    sqrt, where, stack = (np.sqrt, np.where, np.concatenate) if is_numpy else (torch.sqrt, torch.where, torch.cat)
    radius = sqrt(-2.0 * log((_double(words[0::2]) + 0.5) * 2.0**-32))
    quadrant = words[1::2] >> 30
    angle = (_double(words[1::2] & 0x3FFFFFFF) + 0.5) * 2.0**-30 - 0.5
    sine, cosine = _sin_cos(angle * (0.5 * np.pi))
    sign = radius * (1.0 - 2.0 * _double(quadrant >> 1))
    is_odd = (quadrant & 1) == 1
    return stack([sign * where(is_odd, -sine, cosine), sign * where(is_odd, cosine, sine)])


def _double(x: Array) -> Array:
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.to(torch.float64)


def log(x: Array) -> Array:
    """Natural logarithm of positive normal numbers: x = 2**k m, log(m) by its atanh series in (m - 1) / (m + 1)."""
    where, frexp = (np.where, np.frexp) if isinstance(x, np.ndarray) else (torch.where, torch.frexp)
    mantissa, exponent = frexp(x)
    low = mantissa < 0.5**0.5
    f = where(low, mantissa * 2.0, mantissa) - 1.0
    k = _double(exponent - where(low, 1, 0))
    s = f / (f + 2.0)
    z = s * s
    series = _polynomial(z, LOG) * z
    half = 0.5 * f * f
    return k * LN2 + (f - (half - s * (half + series)))


def _sin_cos(x: Array) -> tuple[Array, Array]:
    """Sine and cosine on [-pi/4, pi/4]."""
    z = x * x
    return x + x * (z * _polynomial(z, SIN)), 1.0 - (0.5 * z - z * z * _polynomial(z, COS))


def _polynomial(z: Array, coefficients: tuple[float, ...]) -> Array:
    value = z * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value = (value + coefficient) * z
    return value + coefficients[0]


def check_seed(seed: int) -> int:
    """The seed, an integer from 0 to 2**64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 2**64:
        raise InputError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
    return int(seed)


def normal_vectors(seed: int, stream: Stream, system_id: Tensor, atom: Tensor, step: Tensor) -> Tensor:
    """(n_atoms, 3) standard normals, float64; system_id, atom (index within its system) and step are (n_atoms,) int64 each.

    The counter is (atom, step, high bits of step with the stream, system_id), the key is the seed.
    """
    found = library() if atom.device.type == "cpu" else None
    if found is not None:
        return native.normal_vectors(found, int(seed), int(stream), system_id, atom, step)
    high = ((step >> 32) & 0xFFFFFF) | (int(stream) << 24)
    counter = torch.stack([atom & MASK, step & MASK, high, system_id & MASK])
    key = (seed & MASK, seed >> 32)
    if counter.device.type == "cpu":
        # Small arrays: a numpy call costs a fraction of a torch call, and the integers are the same.
        return torch.from_numpy(normals(philox(counter.numpy(), key))[:3].T.copy())
    return normals(philox(counter, key))[:3].T.contiguous()
