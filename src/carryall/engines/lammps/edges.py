"""Edges of a rank from LAMMPS' own full neighbour list, whose skin, rebuilds and sorting are LAMMPS' business."""

from __future__ import annotations

import ctypes
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from carryall.engines.lammps.capi import LammpsFunctions, view
from carryall.errors import InputError
from carryall.graph.neighbor_graph import COINCIDENT
from carryall.native import library

NEIGHBOR_BITS = 0x1FFFFFFF  # the others tell 1-2, 1-3 and 1-4 neighbours of molecules
PAIR_STYLE = b"zero"
CHECKED_PAIRS = 1 << 22  # that a check of the list looks at, at most
Edges = tuple[Tensor, Tensor, Tensor]
"""center and neighbor (n_edges,), sorted by centre, and ptr (n_local + 1,), all int64."""


class _Failure(IntEnum):
    NO_MEMORY = -1
    NOT_WHOLE = -2
    OUT_OF_RANGE = -3
    COINCIDE = -4


class EdgeReader:
    """Reads all pairs within `cutoff` (Å) into buffers of its own: what it returns holds until it reads again."""

    def __init__(self, functions: LammpsFunctions, cutoff: float) -> None:
        self.functions, self.limit = functions, cutoff**2
        self._native = library()
        self._center, self._neighbor, self._ptr = (torch.empty(0, dtype=torch.int64) for _ in range(3))
        self._places: tuple[int, ...] = ()  # where these begin

    def read(self, positions: Tensor, ids: np.ndarray, n_local: int) -> Edges:
        """Edges of the local atoms; positions (n_atoms, 3) Å of local and ghost atoms, float64, and their ids.

        InputError when the list is absent or not whole, and for atoms that coincide.
        """
        index = self.functions.pair_list(PAIR_STYLE)
        if index < 0:
            raise InputError(
                "LAMMPS has no neighbour list of pair_style zero any more: the potential owns the pair style; leave pair_style "
                "out of what follows, or detach first"
            )
        n_rows = self.functions.list_size(index)
        if n_rows != n_local:
            raise InputError(
                f"LAMMPS lists neighbours of {n_rows} of {n_local} atoms of this rank, but a potential needs all: leave "
                "neigh_modify include out"
            )
        if self._native is None:
            return edges_by_row(self.functions, index, positions, ids, n_local, self.limit)
        if self._ptr.shape[0] != n_local + 1:
            self._make_room(n_local, len(self._center))
        while (found := self._fill(index, positions, n_local)) > len(self._center):
            # a quarter more, since the next list may be a little longer
            self._make_room(n_local, found + found // 4)
        if found < 0:
            failure = self._refusal(_Failure(found), ids)
            self._make_room(n_local, len(self._center))
            raise failure
        return self._center[:found], self._neighbor[:found], self._ptr

    def _make_room(self, n_local: int, room: int) -> None:
        """Buffers for so many edges, as if there had been none before."""
        if room != len(self._center):
            self._center, self._neighbor = (torch.empty(room, dtype=torch.int64) for _ in range(2))
        self._ptr = torch.zeros(max(n_local + 1, 2), dtype=torch.int64)[: n_local + 1]
        self._places = tuple(one.data_ptr() for one in (self._center, self._neighbor, self._ptr))

    def _fill(self, index: int, positions: Tensor, n_local: int) -> int:
        assert self._native is not None
        functions = self.functions
        found: int = self._native.carryall_lammps_edges(
            functions.element_neighbors_address,
            functions.handle,
            index,
            n_local,
            n_local,
            len(positions),
            positions.data_ptr(),
            self.limit,
            len(self._center),
            *self._places,
        )
        return found

    def _refusal(self, failure: _Failure, ids: np.ndarray) -> Exception:
        if failure is _Failure.COINCIDE:
            return _coincident(ids, int(self._ptr[0]), int(self._ptr[1]))
        if failure is _Failure.NO_MEMORY:
            return MemoryError("no memory for the neighbours of this rank")
        return InputError(f"LAMMPS' neighbour list cannot be read ({failure.name}): its version may be an unknown one")


def _coincident(ids: np.ndarray, center: int, neighbor: int) -> InputError:
    return InputError(f"atoms with ids {ids[center]} and {ids[neighbor]} coincide: remove one or move it")


def edges_by_row(
    functions: LammpsFunctions, index: int, positions: Tensor, ids: np.ndarray, n_local: int, limit: float
) -> Edges:
    """The same without native code, one row of the list after the other."""
    x = positions.numpy()
    rows: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * n_local
    atom, count, first = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    places = [ctypes.byref(one) for one in (atom, count, first)]
    for row in range(n_local):
        functions.element_neighbors(functions.handle, index, row, *places)
        neighbors = view(first.value, count.value, np.dtype(np.int32)).astype(np.int64) & NEIGHBOR_BITS
        squared = np.square(x[neighbors] - x[atom.value]).sum(1)
        if len(squared) and squared.min() < COINCIDENT**2:
            raise _coincident(ids, atom.value, int(neighbors[squared.argmin()]))
        rows[atom.value] = neighbors[squared <= limit]
    degree = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    neighbor = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *rows]))
    ptr = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    return torch.repeat_interleave(degree), neighbor, ptr


def check_complete(edges: Edges, positions: Tensor, ids: np.ndarray, limit: float) -> None:
    """InputError that names a pair within the cutoff which the list leaves out; looks at evenly spread atoms of many."""
    _, neighbor, ptr = edges
    n_local, n_atoms = ptr.shape[0] - 1, positions.shape[0]
    if not n_local:
        return
    spread = max(1, -(-n_local * n_atoms // CHECKED_PAIRS))
    x = positions.numpy()
    for center in range(0, n_local, spread):
        near = np.square(x - x[center]).sum(1) <= limit
        near[center] = False
        listed = neighbor[ptr[center] : ptr[center + 1]].numpy()
        near[listed] = False
        if near.any():
            lost = int(near.argmax())
            raise InputError(
                f"LAMMPS' neighbour list leaves out the pair of atoms with ids {ids[center]} and {ids[lost]}, "
                f"{np.linalg.norm(x[lost] - x[center]):.4g} Å apart, but a potential needs every neighbour: leave neigh_modify "
                "exclude out (to keep atoms fixed, leave them out of the group of fix nve and set their velocities to 0)"
            )
