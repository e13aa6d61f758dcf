"""Pairs of a rank's own atoms with all points that it has, ghosts too, kept for many steps; no periodicity is left here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.graph.neighbor_graph import pointer
from carryall.native import library

BINS_FOR_A_POINT = 8
"""A table has at most so many bins for each point, wider ones where points are few in much space."""


@dataclass(frozen=True, eq=False)
class Edges:
    """The pairs within the cutoff, by centre, ascending in centre and neighbour."""

    center: Tensor
    """(n_edges,) int64."""
    neighbor: Tensor
    """(n_edges,) int64."""
    ptr: Tensor
    """(n_local + 1,) int64."""
    closest: float
    """Least squared distance, Å²; infinite without edges."""
    closest_center: int
    """A centre that has it."""


@dataclass(frozen=True, eq=False)
class PairList:
    """Neighbours of the first `n_local` points within a reach wider than the cutoff."""

    ptr: Tensor
    """(n_local + 1,) int64."""
    neighbor: Tensor
    """(n_pairs,) int32 where machine code made it, int64 elsewhere."""

    @property
    def n_local(self) -> int:
        """Centres."""
        return len(self.ptr) - 1

    def edges(self, positions: Tensor, cutoff: float) -> Edges:
        """Those within the cutoff at positions (n, 3) float64 that are not those of the search."""
        if self.neighbor.dtype == torch.int32:
            return self._native_edges(positions, cutoff)
        center = torch.repeat_interleave(self.ptr.diff(), output_size=len(self.neighbor))
        squared = squared_distances(positions, center, self.neighbor)
        keep = (squared <= cutoff * cutoff).nonzero().squeeze(1)
        center, neighbor = center[keep], self.neighbor[keep]
        least = int(squared.argmin()) if len(squared) else 0
        closest = float(squared[least]) if len(squared) else torch.inf
        at = int(torch.searchsorted(self.ptr, least, right=True)) - 1 if len(squared) else 0
        return Edges(center, neighbor, pointer(center, self.n_local), closest, at)

    def _native_edges(self, positions: Tensor, cutoff: float) -> Edges:
        found = library()
        assert found is not None
        positions = positions.contiguous()
        center, neighbor = (torch.empty(len(self.neighbor), dtype=torch.int64) for _ in range(2))
        ptr, closest = torch.empty_like(self.ptr), torch.zeros(2, dtype=torch.float64)
        count = found.carryall_halo_edges(
            positions.data_ptr(),
            self.n_local,
            self.ptr.data_ptr(),
            self.neighbor.data_ptr(),
            cutoff * cutoff,
            *(one.data_ptr() for one in (center, neighbor, ptr, closest)),
        )
        return Edges(center[:count], neighbor[:count], ptr, float(closest[0]), int(closest[1]))


def search(positions: Tensor, n_local: int, reach: float) -> PairList:
    """All pairs within `reach` of the first n_local of finite positions (n, 3) float64 with any other point."""
    found = library() if positions.device.type == "cpu" else None
    if found is None:
        center, neighbor = _search(positions, n_local, reach)
        return PairList(pointer(center, n_local), neighbor)
    positions = positions.contiguous()
    ptr = torch.zeros(n_local + 1, dtype=torch.int64)
    room = 96 * n_local
    while True:
        neighbor = torch.empty(room, dtype=torch.int32)
        count = found.carryall_halo_search(
            positions.data_ptr(), len(positions), n_local, reach, room, neighbor.data_ptr(), ptr.data_ptr()
        )
        if count < 0:
            raise MemoryError("a neighbour list needs more memory than there is: use more ranks or a smaller skin")
        if count <= room:
            return PairList(ptr, neighbor[:count])
        room = int(count)


def squared_distances(positions: Tensor, center: Tensor, neighbor: Tensor) -> Tensor:
    """(n_pairs,) Å²."""
    x, y, z = (positions.index_select(0, neighbor) - positions.index_select(0, center)).square().unbind(1)
    return (x + y) + z


def _search(positions: Tensor, n_local: int, reach: float) -> tuple[Tensor, Tensor]:
    """The same in torch, on any device: points by bins as wide as the reach, nine rows of three bins for each centre."""
    if not n_local:
        return torch.zeros(0, dtype=torch.int64, device=positions.device), torch.zeros(
            0, dtype=torch.int64, device=positions.device
        )
    low, high = positions.amin(0), positions.amax(0)
    width = torch.full((3,), reach, dtype=torch.float64, device=positions.device)
    while float((((high - low) / width).floor() + 3).prod()) > BINS_FOR_A_POINT * len(positions) + 4096:
        width = width * 2
    # one empty bin around, so that no row leaves the table
    bins = ((positions - low) / width).long() + 1
    size = (((high - low) / width).long() + 3).tolist()
    key = (bins[:, 2] * size[1] + bins[:, 1]) * size[0] + bins[:, 0]
    order = key.argsort(stable=True)
    start = pointer(key[order], size[0] * size[1] * size[2])
    centers, neighbors = [], []
    for dz, dy in itertools.product((-1, 0, 1), repeat=2):
        row = key[:n_local] + (dz * size[1] + dy) * size[0]
        begin, end = start[row - 1], start[row + 2]
        count = end - begin
        center = torch.repeat_interleave(count)
        place = torch.arange(len(center), device=positions.device) - (count.cumsum(0) - count)[center] + begin[center]
        neighbor = order[place]
        keep = (squared_distances(positions, center, neighbor) <= reach * reach) & (center != neighbor)
        centers.append(center[keep])
        neighbors.append(neighbor[keep])
    center, neighbor = torch.cat(centers), torch.cat(neighbors)
    sorting = (center * len(positions) + neighbor).argsort()
    return center[sorting], neighbor[sorting]
