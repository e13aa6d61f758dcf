"""Moments of the neighbourhood beyond the vector: `lmax` 2 to 4.

The environment row (s, s d), with the switched inverse distance s and d = r / (|r| + protection), holds the moments of degree
0 and 1. Degree l adds s S_lm(d), m = -l, ..., l, with Racah's real solid harmonics S_lm. Each degree beyond 1 enters the
descriptor's inner products with the square of a learned gain.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INITIAL_GAIN = 0.1


def degree_gain(lmax: int, generator: torch.Generator | None = None) -> nn.Parameter | None:
    """(lmax - 1,) random gains of the degrees 2 to `lmax`; None when there are none."""
    if lmax == 1:
        return None
    return nn.Parameter(INITIAL_GAIN * torch.randn(lmax - 1, dtype=torch.float64, generator=generator))


def degree_weights(gain: Tensor) -> Tensor:
    """((lmax + 1)^2,) weight of each moment: 1 up to degree 1, the square of the gain beyond."""
    weights = [gain.new_ones(4)]
    for index in range(gain.shape[0]):
        weights.append(gain[index].square().expand(2 * index + 5))
    return torch.cat(weights)


def moment_basis(
    rows: Tensor, vector: Tensor, sw: Tensor, distance: Tensor, std: Tensor, lmax: int, protection: float
) -> Tensor:
    """(..., (lmax + 1)^2) moments of each edge, by degree.

    rows (..., 4): normalised environment rows; vector (..., 3) and distance (...) in Å; sw (...): switch, 0 where masked;
    std: standard deviation of the rows' first column, for the centre's type, broadcast to sw. No mean is subtracted beyond
    degree 1.
    """
    inverse = 1 / (distance + protection)
    scale = (sw * inverse / std)[..., None]
    harmonics = solid_harmonics(vector * inverse[..., None], lmax)
    return torch.cat([rows, *(scale * degree for degree in harmonics[2:])], dim=-1)


def solid_harmonics(vector: Tensor, lmax: int) -> list[Tensor]:
    """Racah's real solid harmonics of `vector` (..., 3): one tensor (..., 2 l + 1) for each degree, m = -l, ..., l.

    By the recursions of T. Helgaker, P. Jørgensen, J. Olsen, Molecular Electronic-Structure Theory (2000), section 6.4.
    """
    x, y, z = vector.unbind(-1)
    squared = x * x + y * y + z * z
    degrees: list[list[Tensor]] = [[torch.ones_like(x)], [y, z, x]]
    for l in range(1, lmax):  # noqa: E741, the field's letter
        here, before = degrees[l], degrees[l - 1]
        factor = ((2 * l + 1) / (2 * l + 2)) ** 0.5
        inner = []
        for m in range(-l, l + 1):
            value = (2 * l + 1) * z * here[m + l]
            if abs(m) < l:
                value = value - ((l + m) * (l - m)) ** 0.5 * squared * before[m + l - 1]
            inner.append(value / ((l + m + 1) * (l - m + 1)) ** 0.5)
        lowest, highest = here[0], here[-1]
        degrees.append([factor * (y * highest + x * lowest), *inner, factor * (x * highest - y * lowest)])
    return [torch.stack(degree, dim=-1) for degree in degrees[: lmax + 1]]
