"""Edges out of another program's neighbour list: the compiled form against numpy, with a list that a test makes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch

from carryall.engines.lammps import edges as module
from carryall.engines.lammps.edges import EdgeReader, Edges, check_complete
from carryall.errors import InputError
from carryall.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

ROW = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 3)
CUTOFF = 2.5


class FakeLammps:
    """A full list of all pairs within cutoff + 1, rows in any order; what the driver asks LAMMPS for."""

    handle = 1

    def __init__(self, positions: np.ndarray, n_local: int, order: list[int] | None = None) -> None:
        self.order = list(range(n_local)) if order is None else order
        distance = np.linalg.norm(positions[:, None] - positions[None], axis=2)
        near = [np.flatnonzero((distance[i] <= CUTOFF + 1) & (np.arange(len(positions)) != i)) for i in range(n_local)]
        # the two highest bits say which neighbours are bonded
        self.rows = [(row[::-1] | (row[::-1] % 4 << 29)).astype(np.uint32).view(np.int32) for row in near]
        self._call = ROW(self._element)
        self.element_neighbors: Callable[..., None] = self._call
        self.element_neighbors_address = ctypes.cast(self._call, ctypes.c_void_p).value

    def _element(self, handle: int, index: int, row: int, atom: int, count: int, first: int) -> None:
        center = self.order[row]
        ctypes.c_int.from_address(atom).value = center
        ctypes.c_int.from_address(count).value = len(self.rows[center])
        ctypes.c_void_p.from_address(first).value = self.rows[center].ctypes.data

    def pair_list(self, style: bytes) -> int:
        return 0

    def list_size(self, index: int) -> int:
        return len(self.order)


def cloud(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, n ** (1 / 3) * 1.2, (n, 3))


def read(positions: np.ndarray, n_local: int, order: list[int] | None = None, fake: FakeLammps | None = None) -> Edges:
    fake = FakeLammps(positions, n_local, order) if fake is None else fake
    reader = EdgeReader(fake, CUTOFF)  # type: ignore[arg-type]
    return reader.read(torch.from_numpy(positions), np.arange(len(positions)) + 100, n_local)


def expected(positions: np.ndarray, n_local: int) -> list[tuple[int, int]]:
    """Centres ascending, neighbours as the list has them: descending."""
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    return [(i, j) for i in range(n_local) for j in range(len(positions))[::-1] if i != j and distance[i, j] <= CUTOFF]


@pytest.mark.parametrize(("n", "n_local"), [(60, 60), (200, 37), (40, 1), (5, 0), (0, 0)])
@pytest.mark.parametrize("native", [True, False])
def test_pairs_within_the_cutoff_and_no_others(n: int, n_local: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(module, "library", lambda: None)
    positions = cloud(n)
    order = np.random.default_rng(1).permutation(n_local).tolist()
    center, neighbor, ptr = read(positions, n_local, order)
    pairs = expected(positions, n_local)
    assert list(zip(center.tolist(), neighbor.tolist(), strict=True)) == pairs
    assert ptr.tolist() == np.searchsorted([pair[0] for pair in pairs], np.arange(n_local + 1)).tolist()
    assert (center.dtype, neighbor.dtype, ptr.dtype) == (torch.int64,) * 3


def test_a_pair_at_the_cutoff_is_inside() -> None:
    positions = np.array([[0.0, 0, 0], [CUTOFF, 0, 0], [np.nextafter(CUTOFF, 3), 0, 0.0]])
    center, neighbor, _ = read(positions, 1)
    assert (center.tolist(), neighbor.tolist()) == ([0], [1])


def test_buffers_grow_and_shrink_with_the_list() -> None:
    reader = EdgeReader(FakeLammps(cloud(10), 10), CUTOFF)  # type: ignore[arg-type]
    for n in (10, 150, 20, 0, 60):
        positions = cloud(n, seed=n)
        reader.functions = FakeLammps(positions, n)  # type: ignore[assignment]
        center, neighbor, ptr = reader.read(torch.from_numpy(positions), np.arange(n), n)
        assert list(zip(center.tolist(), neighbor.tolist(), strict=True)) == expected(positions, n)
        assert ptr.shape == (n + 1,)


def test_what_a_step_before_left_does_not_matter() -> None:
    reader = EdgeReader(FakeLammps(cloud(90), 70), CUTOFF)  # type: ignore[arg-type]
    for seed in range(6):
        positions = cloud(90, seed) * (1.0 + 0.1 * (seed % 3))
        reader.functions = FakeLammps(positions, 70)  # type: ignore[assignment]
        center, neighbor, _ = reader.read(torch.from_numpy(positions), np.arange(90), 70)
        assert list(zip(center.tolist(), neighbor.tolist(), strict=True)) == expected(positions, 70)
        clash = positions.copy()
        clash[30] = clash[8]
        if seed == 3:
            reader.functions = FakeLammps(clash, 70)  # type: ignore[assignment]
            with pytest.raises(InputError, match="ids 8 and 30 coincide"):
                reader.read(torch.from_numpy(clash), np.arange(90), 70)


@pytest.mark.parametrize("native", [True, False])
def test_coincident_atoms_are_named(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(module, "library", lambda: None)
    positions = cloud(30)
    positions[17] = positions[4]
    with pytest.raises(InputError, match="atoms with ids 104 and 117 coincide"):
        read(positions, 30)


def test_a_list_that_cannot_be_is_an_error() -> None:
    positions = cloud(12)
    with pytest.raises(InputError, match="NOT_WHOLE"):
        read(positions, 12, order=[*range(11), 3])
    fake = FakeLammps(positions, 12)
    fake.rows[5] = np.array([12], dtype=np.int32)
    with pytest.raises(InputError, match="OUT_OF_RANGE"):
        read(positions, 12, fake=fake)
    with pytest.raises(InputError, match="neighbours of 12 of 11 atoms"):
        read(positions, 11, fake=FakeLammps(positions, 12))


def test_a_pair_that_is_left_out_is_named() -> None:
    positions = cloud(80)
    ids, x = np.arange(80) + 100, torch.from_numpy(positions)
    check_complete(read(positions, 80), x, ids, CUTOFF**2)
    center, neighbor, ptr = (part.clone() for part in read(positions, 80))
    row = int((ptr[31:] > ptr[30]).nonzero()[0])
    assert row == 0
    lost = int(neighbor[ptr[30]])
    neighbor[ptr[30]] = neighbor[ptr[30] + 1]
    with pytest.raises(InputError, match=f"leaves out the pair of atoms with ids 130 and {100 + lost}, "):
        check_complete((center, neighbor, ptr), x, ids, CUTOFF**2)
