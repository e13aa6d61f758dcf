"""Radial distribution functions of cases with a known answer."""

import numpy as np
import pytest

from carryall.data import AtomicData
from carryall.errors import InputError
from carryall.properties import radial_distribution


def cubic(positions, numbers, length):
    return AtomicData(positions, numbers, np.eye(3) * length)


def test_ideal_gas_is_one():
    rng = np.random.default_rng(1)
    frames = [cubic(rng.random((300, 3)) * 10.0, [18] * 200 + [10] * 100, 10.0) for _ in range(6)]
    found = radial_distribution(frames, [("Ar", "Ar"), ("Ar", "Ne"), ("Ne", "Ar")], r_max=7.0, n_bins=14)
    assert found.n_frames == 6
    for g in found.g.values():
        # beyond half of the box too: all images are counted
        np.testing.assert_allclose(g[4:], 1.0, atol=0.05)
    np.testing.assert_allclose(found.g["Ar", "Ne"], found.g["Ne", "Ar"])


def test_fcc_shells():
    a, n = 4.0, 2
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    corners = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    sites = ((corners + basis) * a).reshape(-1, 3)
    found = radial_distribution([cubic(sites, [29] * len(sites), a * n)], [("Cu", "Cu")], r_max=5.2, n_bins=52)
    volumes = 4 / 3 * np.pi * np.diff(np.linspace(0, 5.2, 53) ** 3)
    neighbors = found.g["Cu", "Cu"] * volumes * (len(sites) - 1) / (a * n) ** 3
    shells = {a / np.sqrt(2): 12, a: 6, a * np.sqrt(1.5): 24}
    for distance, count in shells.items():
        near = np.abs(found.r - distance) < 0.12
        assert neighbors[near].sum() == pytest.approx(count)
    assert neighbors.sum() == pytest.approx(42)


def test_refusals():
    frame = cubic(np.zeros((1, 3)), [18], 5.0)
    with pytest.raises(InputError, match="no frame has a pair"):
        radial_distribution([frame], [("Ar", "Ne")])
    with pytest.raises(InputError, match="not periodic"):
        radial_distribution([AtomicData(np.zeros((1, 3)), [18])], [("Ar", "Ar")])
    with pytest.raises(InputError, match="at least one"):
        radial_distribution([], [("Ar", "Ar")])
    with pytest.raises(InputError, match="chemical element"):
        radial_distribution([frame], [("Ar", "Qq")])
