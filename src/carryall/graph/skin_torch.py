"""Lists with a skin, in torch: on a GPU, and on a CPU without a compiler. The native ones are the same, faster."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.graph import nvalchemi
from carryall.graph.neighbor_graph import COINCIDENT, NeighborGraph, pointer, rows_times, squared_lengths
from carryall.graph.neighbor_search import WIDER, coincident, neighbor_edges, search_on_gpu
from carryall.graph.systems import Systems

Key = tuple[int, int]
"""A system's id, and how many systems of the call before it have the same."""


@dataclass(frozen=True, eq=False)
class Edges:
    """Edges of many systems, sorted by centre, neighbour, shift."""

    center: Tensor
    neighbor: Tensor
    shift: Tensor
    ptr: Tensor


@dataclass(frozen=True, eq=False)
class Kept:
    """The list of one system, whose atoms count from 0, and the geometry that it was searched for."""

    positions: Tensor
    cell: Tensor
    pbc: Tensor
    center: Tensor
    neighbor: Tensor
    shift: Tensor


@dataclass(frozen=True, eq=False)
class Joined:
    """Kept lists side by side, as the call that they were joined for has its systems."""

    ids: Tensor | None
    ptr: Tensor
    positions: Tensor
    cell: Tensor
    pbc: Tensor
    edges: Edges | None = None

    def is_for(self, call: Systems) -> bool:
        """Whether the call has the same systems, of the same sizes, in the same order."""
        if self.ptr.device != call.ptr.device or not torch.equal(self.ptr, call.ptr):
            return False
        if self.ids is None or call.ids is None:
            return self.ids is call.ids
        return torch.equal(self.ids, call.ids)


class TorchLists:
    """One list for each system, kept by its id; `edges` brings them up to date and gives what lies within the cutoff."""

    def __init__(self, cutoff: float, skin: float) -> None:
        self.cutoff, self.skin = cutoff, skin
        self.n_searches = 0
        self._kept: dict[Key, Kept] = {}
        self._joined: Joined | None = None

    def edges(self, call: Systems) -> tuple[Edges, dict[int, str]]:
        """All edges within the cutoff, and for each system without a list the reason, by its index in the call."""
        joined, reasons = self._joined, {}
        if joined is not None and joined.is_for(call):
            valid = still_valid(joined, call, self.cutoff, self.skin)
        else:
            joined, known = self._references(call, keys_of(call))
            valid = known & still_valid(joined, call, self.cutoff, self.skin)
        if joined.edges is None or not bool(valid.all()):
            keys = keys_of(call)
            reasons = self._search(call, keys, (~valid).nonzero().squeeze(1).tolist())
            joined = self._join(call, keys, reasons)
            self._joined = None if reasons else joined
            self._forget(keys)
        assert joined.edges is not None
        edges, squared = inside(call, joined.edges, self.cutoff)
        if len(squared) and float(squared.min()) < COINCIDENT**2:
            reasons.update(coincidences(call, edges, squared))
        return edges, reasons

    def _references(self, call: Systems, keys: list[Key]) -> tuple[Joined, Tensor]:
        """The geometries that lists were searched for, and where the call has systems that no list can be for."""
        counts = call.ptr.diff().tolist()
        found = [self._kept.get(key) for key in keys]
        parts = [one if one is not None and fits(one, call, n) else None for one, n in zip(found, counts, strict=True)]
        known = torch.tensor([one is not None for one in parts], dtype=torch.bool, device=call.ptr.device)
        positions, cell = (value.detach().to(torch.float64, copy=True) for value in (call.positions, call.cell))
        pbc = call.pbc.clone()
        for index, (part, start) in enumerate(zip(parts, call.ptr.tolist(), strict=False)):
            if part is not None:
                positions[start : start + len(part.positions)] = part.positions
                cell[index], pbc[index] = part.cell, part.pbc
        return Joined(clone(call.ids), call.ptr.clone(), positions, cell, pbc), known

    def _search(self, call: Systems, keys: list[Key], stale: list[int]) -> dict[int, str]:
        reasons = {}
        ptr = call.ptr.tolist()
        for index, found in zip(stale, search(call, stale, (self.cutoff + self.skin) * WIDER), strict=True):
            self.n_searches += 1
            self._kept.pop(keys[index], None)
            if isinstance(found, InputError):
                reasons[index] = str(found)
                continue
            atoms = slice(ptr[index], ptr[index + 1])
            geometry = (call.positions[atoms], call.cell[index])
            positions, cell = (one.detach().to(torch.float64, copy=True) for one in geometry)
            self._kept[keys[index]] = Kept(positions, cell, call.pbc[index].clone(), *found)
        return reasons

    def _join(self, call: Systems, keys: list[Key], without: dict[int, str]) -> Joined:
        starts = call.ptr.tolist()
        parts = [(self._kept[key], starts[i]) for i, key in enumerate(keys) if i not in without]
        long = call.ptr.new_zeros(0)
        center = torch.cat([long, *(part.center + start for part, start in parts)])
        neighbor = torch.cat([long, *(part.neighbor + start for part, start in parts)])
        shift = torch.cat([call.ptr.new_zeros(0, 3, dtype=torch.int32), *(part.shift for part, _ in parts)])
        edges = Edges(center, neighbor, shift, pointer(center, len(call.positions)))
        if without:
            return Joined(None, call.ptr, call.positions, call.cell, call.pbc, edges)
        positions = torch.cat([call.positions[:0].detach().double(), *(part.positions for part, _ in parts)])
        cell = torch.stack([part.cell for part, _ in parts]) if parts else call.cell.double()
        pbc = torch.stack([part.pbc for part, _ in parts]) if parts else call.pbc.clone()
        return Joined(clone(call.ids), call.ptr.clone(), positions, cell, pbc, edges)

    def _forget(self, keys: list[Key]) -> None:
        """Drop the lists of the systems that were not asked for the longest, as soon as they are more than those of a call."""
        for key in keys:
            if key in self._kept:
                self._kept[key] = self._kept.pop(key)  # to the end: a dict keeps its order
        for key in list(self._kept)[: max(0, len(self._kept) - 2 * len(keys))]:
            del self._kept[key]


def keys_of(call: Systems) -> list[Key]:
    """One key a system, none twice, whatever the ids are."""
    ids = range(len(call.cell)) if call.ids is None else call.ids.tolist()
    seen: dict[int, int] = {}
    keys = []
    for one in ids:
        seen[one] = seen.get(one, -1) + 1
        keys.append((one, seen[one]))
    return keys


def clone(value: Tensor | None) -> Tensor | None:
    """A copy, where there is one."""
    return None if value is None else value.clone()


def fits(kept: Kept, call: Systems, n_atoms: int) -> bool:
    """Whether a list can be for a system of `n_atoms` of this call."""
    return len(kept.positions) == n_atoms and kept.positions.device == call.positions.device


def still_valid(joined: Joined, call: Systems, cutoff: float, skin: float) -> Tensor:
    """(n_systems,) bool: no edge within the cutoff can be missing from a list of all edges within cutoff + skin.

    An edge vector changes by its ends' displacement plus its length times the strain of the cell (rows: h' = h (1 + e)).
    """
    old, new = joined.cell, call.cell.detach().double()
    before, now = joined.positions, call.positions.detach().double()
    identity = torch.eye(3, dtype=old.dtype, device=old.device)
    same_cell = (old == new).flatten(1).all(1)
    complete = (old != 0).any(2).all(1)
    if bool(same_cell.all()):
        moved, strain = now - before, torch.zeros(len(old), dtype=old.dtype, device=old.device)
    else:
        deformation = torch.linalg.solve_ex(torch.where(complete[:, None, None], old, identity), new).result
        deformation = torch.where(same_cell[:, None, None], identity, deformation)
        moved = now - rows_times(before, deformation, call.system)
        difference = torch.nan_to_num(deformation - identity, nan=torch.inf, posinf=1e300, neginf=-1e300).clamp(-1e100, 1e100)
        strain = torch.linalg.matrix_norm(difference, ord=2)
    squared = torch.nan_to_num(moved.square().sum(1), nan=torch.inf)
    farthest = torch.zeros(len(old), dtype=old.dtype, device=old.device)
    farthest = farthest.scatter_reduce(0, call.system, squared, "amax", include_self=True)
    same_axes = (joined.pbc == call.pbc).all(1)
    return same_axes & (same_cell | complete) & (2 * farthest.sqrt() + strain * (cutoff + skin) <= skin)


def search(call: Systems, indices: list[int], cutoff: float) -> list[tuple[Tensor, Tensor, Tensor] | InputError]:
    """(center, neighbor, shift) of each of these systems (ascending), its atoms counted from 0, or why it has none."""
    if not indices:
        return []
    if call.positions.device.type == "cuda" and nvalchemi.is_installed():
        try:
            return search_together(call, indices, cutoff)
        except InputError:
            pass  # one by one, to know which
    ptr, device = call.ptr.tolist(), call.positions.device
    positions, cell, pbc = (value.detach().cpu() for value in (call.positions, call.cell, call.pbc))
    found: list[tuple[Tensor, Tensor, Tensor] | InputError] = []
    for index in indices:
        xyz = positions[ptr[index] : ptr[index + 1]].double().numpy()
        try:
            edges = neighbor_edges(xyz, cell[index].double().numpy(), pbc[index].numpy(), cutoff)
            found.append(
                (
                    torch.from_numpy(edges[0]).to(device),
                    torch.from_numpy(edges[1]).to(device),
                    torch.from_numpy(edges[2]).to(device),
                )
            )
        except InputError as error:
            found.append(error)
    return found


def search_together(call: Systems, indices: list[int], cutoff: float) -> list[tuple[Tensor, Tensor, Tensor] | InputError]:
    """The same in one search on the GPU; InputError where one of the systems has none."""
    chosen = torch.tensor(indices, device=call.ptr.device)
    place = torch.full((len(call.cell),), -1, dtype=torch.int64, device=call.ptr.device)
    place[chosen] = torch.arange(len(chosen), device=call.ptr.device)
    system = place.index_select(0, call.system)
    atoms = (system >= 0).nonzero().squeeze(1)
    system = system.index_select(0, atoms)
    positions = call.positions.detach().index_select(0, atoms)
    center, neighbor, shift = search_on_gpu(positions, system, call.cell.detach()[chosen], call.pbc[chosen], cutoff)
    starts = torch.cat([chosen.new_zeros(1), call.ptr.diff()[chosen].cumsum(0)])
    of_edge = system.index_select(0, center)
    bounds = torch.searchsorted(of_edge, torch.arange(len(chosen) + 1, device=of_edge.device)).tolist()
    first = starts.index_select(0, of_edge)
    center, neighbor = center - first, neighbor - first
    return [(center[a:b], neighbor[a:b], shift[a:b]) for a, b in pairwise(bounds)]


def inside(call: Systems, edges: Edges, cutoff: float) -> tuple[Edges, Tensor]:
    """The edges within the cutoff and their squared lengths (n_edges,)."""
    n_atoms = len(call.positions)
    graph = NeighborGraph(
        positions=call.positions.detach(),
        atom_types=call.system,
        system=call.system,
        cell=call.cell.detach(),
        edge_center=edges.center,
        edge_neighbor=edges.neighbor,
        edge_shift=edges.shift,
        edge_mask=edges.center,
        ptr=edges.ptr,
    )
    squared = squared_lengths(graph)
    index = (squared <= cutoff**2).nonzero().squeeze(1)
    center = edges.center.index_select(0, index)
    found = Edges(center, edges.neighbor.index_select(0, index), edges.shift.index_select(0, index), pointer(center, n_atoms))
    return found, squared.index_select(0, index)


def coincidences(call: Systems, edges: Edges, squared: Tensor) -> dict[int, str]:
    """The closest pair of each system that has coincident atoms, in words."""
    reasons = {}
    of_edge = call.system.index_select(0, edges.center)
    for index in of_edge[squared < COINCIDENT**2].unique().tolist():
        mine = (of_edge == index).nonzero().squeeze(1)
        worst = mine[squared[mine].argmin()]
        start = int(call.ptr[index])
        center, neighbor = int(edges.center[worst]) - start, int(edges.neighbor[worst]) - start
        reasons[index] = str(coincident(center, neighbor, float(squared[worst]) ** 0.5))
    return reasons
