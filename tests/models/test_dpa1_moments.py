"""Moments of higher degree against what every set of solid harmonics obeys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial.legendre import legval
from torch import Tensor

from carryall.models.dpa1.moments import degree_gain, degree_weights, moment_basis, solid_harmonics

COORDINATE = st.floats(-3, 3, allow_nan=False)
VECTOR = st.tuples(COORDINATE, COORDINATE, COORDINATE)


def random_vectors(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(a=VECTOR, b=VECTOR)
def test_addition_theorem(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    """sum_m S_lm(a) S_lm(b) = |a|^l |b|^l P_l(cos): with it, all that a rotation must leave alone is left alone."""
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    product = float(x.norm() * y.norm())
    cosine = float(x @ y) / product if product > 1e-12 else 0.0
    for degree, (one, other) in enumerate(zip(solid_harmonics(x, 4), solid_harmonics(y, 4), strict=True)):
        expected = product**degree * legval(cosine, [0] * degree + [1]) if product > 1e-12 else float(degree == 0)
        assert abs(float(one @ other) - expected) < 1e-11 * max(1.0, product**degree)


def test_low_degrees_are_the_textbook_ones() -> None:
    x, y, z = (vectors := random_vectors(20)).unbind(1)
    r2 = vectors.square().sum(1)
    _, first, second, third, fourth = solid_harmonics(vectors, 4)
    assert torch.equal(first, torch.stack([y, z, x], dim=1))
    quadrupole = torch.stack(
        [3**0.5 * x * y, 3**0.5 * y * z, (3 * z * z - r2) / 2, 3**0.5 * x * z, 3**0.5 / 2 * (x * x - y * y)], dim=1
    )
    assert torch.allclose(second, quadrupole, rtol=0, atol=1e-14)
    assert torch.allclose(third[:, 3], z * (5 * z * z - 3 * r2) / 2, rtol=0, atol=1e-13)
    assert torch.allclose(third[:, 6], (5 / 8) ** 0.5 * x * (x * x - 3 * y * y), rtol=0, atol=1e-13)
    assert torch.allclose(fourth[:, 4], (35 * z**4 - 30 * z * z * r2 + 3 * r2 * r2) / 8, rtol=0, atol=1e-13)


def test_each_degree_is_complete() -> None:
    """2 l + 1 functions that are independent, orthogonal and of one size on the sphere."""
    n = 40
    nodes, weights = np.polynomial.legendre.leggauss(n)
    phi = 2 * np.pi * np.arange(n) / n
    z, angle = np.meshgrid(nodes, phi, indexing="ij")
    s = np.sqrt(1 - z**2)
    sphere = torch.tensor(np.stack([s * np.cos(angle), s * np.sin(angle), z], axis=-1))
    measure = torch.tensor(weights)[:, None] / (2 * n)
    for degree, values in enumerate(solid_harmonics(sphere, 4)):
        gram = torch.einsum("ij,ijm,ijn->mn", measure.expand(n, n), values, values)
        assert torch.allclose(gram, torch.eye(2 * degree + 1, dtype=torch.float64) / (2 * degree + 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("lmax", [2, 3, 4])
def test_basis_continues_the_environment_rows(lmax: int) -> None:
    """With rows of std alike in all columns and no mean, degree 1 obeys the rule of the degrees beyond."""
    vector, protection = random_vectors(30, lmax), 0.2
    distance, sw = vector.norm(dim=1), torch.linspace(0, 1, 30, dtype=torch.float64)
    std = torch.linspace(0.1, 0.3, 30, dtype=torch.float64)
    inverse = 1 / (distance + protection)
    direction = vector * inverse[:, None]
    rows = torch.cat([torch.ones(30, 1, dtype=torch.float64), direction], dim=1) * (sw * inverse / std)[:, None]
    basis = moment_basis(rows, vector, sw, distance, std, lmax, protection)
    assert basis.shape == (30, (lmax + 1) ** 2)
    assert torch.equal(basis[:, :4], rows)
    start = 4
    for degree in range(2, lmax + 1):
        expected = solid_harmonics(direction, lmax)[degree] * (sw * inverse / std)[:, None]
        assert torch.allclose(basis[:, start : start + 2 * degree + 1], expected, rtol=1e-14, atol=1e-14)
        start += 2 * degree + 1
    assert (basis[0] == 0).all()  # the switch is 0 there


def test_weights_are_squares_of_the_gains() -> None:
    weights = degree_weights(torch.tensor([0.5, -2.0], dtype=torch.float64))
    assert weights.tolist() == [1.0] * 4 + [0.25] * 5 + [4.0] * 7
    assert degree_gain(1) is None
    gain = degree_gain(4, torch.Generator().manual_seed(0))
    assert gain is not None
    assert gain.shape == (3,)
    assert gain.requires_grad
