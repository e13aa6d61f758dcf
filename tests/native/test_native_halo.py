"""Pairs among own atoms and ghosts, by machine code and by torch, against comparing all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carryall.engines.domain import pairs
from carryall.native import library

CASES = st.tuples(st.integers(0, 60), st.integers(0, 60), st.floats(0.3, 4.0), st.floats(0.5, 30.0), st.integers(0, 2**32 - 1))


def brute(positions: np.ndarray, n_local: int, reach: float) -> list[tuple[int, int]]:
    away = positions[None] - positions[:n_local, None]
    squared = (away[..., 0] ** 2 + away[..., 1] ** 2) + away[..., 2] ** 2
    found = np.argwhere(squared <= reach * reach).tolist()
    return [(c, n) for c, n in found if c != n]


def listed(found: pairs.PairList, positions: torch.Tensor, cutoff: float) -> list[tuple[int, int]]:
    edges = found.edges(positions, cutoff)
    assert edges.ptr.tolist() == [0, *torch.bincount(edges.center, minlength=found.n_local).cumsum(0).tolist()]
    return list(zip(edges.center.tolist(), edges.neighbor.tolist(), strict=True))


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@given(CASES)
@settings(max_examples=60, deadline=None)
def test_pairs_are_those_of_comparing_all(native: bool, case: tuple[int, int, float, float, int]) -> None:
    n_local, n_ghost, reach, size, seed = case
    rng = np.random.default_rng(seed)
    positions = rng.uniform(0, size, (n_local + n_ghost, 3)) * rng.choice([1.0, 1.0, 1e-3, 1e4], 3)
    points = torch.from_numpy(positions)
    with pytest.MonkeyPatch.context() as patch:
        if native and library() is None:
            pytest.skip("no compiler")
        if not native:
            patch.setattr(pairs, "library", lambda: None)
        found = pairs.search(points, n_local, reach)
        assert listed(found, points, reach) == brute(positions, n_local, reach)
        moved = positions + rng.uniform(-0.1, 0.1, positions.shape) * reach
        edges = listed(found, torch.from_numpy(moved), 0.6 * reach)
    assert edges == brute(moved, n_local, 0.6 * reach)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_more_neighbors_than_room_and_the_closest_pair(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native and library() is None:
        pytest.skip("no compiler")
    if not native:
        monkeypatch.setattr(pairs, "library", lambda: None)
    rng = np.random.default_rng(0)
    positions = torch.from_numpy(rng.uniform(0, 1.0, (300, 3)))
    positions[7] = positions[250] + torch.tensor([1e-8, 0.0, 0.0])
    found = pairs.search(positions, 200, 2.0)
    edges = found.edges(positions, 2.0)
    assert len(edges.center) == 200 * 299
    assert (edges.closest**0.5, edges.closest_center) == (pytest.approx(1e-8), 7)
