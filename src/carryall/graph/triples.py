"""A graph from the `i, j, S` triples that ASE, matscipy, vesin and others return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, pointer, validate
from carryall.graph.ordering import edge_keys


def graph_from_triples(
    positions: Tensor,
    atom_types: Tensor,
    cell: Tensor | None,
    i: Any,
    j: Any,
    S: Any,
    *,
    system: Tensor | None = None,
    n_local: int | None = None,
    directed: bool = False,
    fparam: Tensor | None = None,
    aparam: Tensor | None = None,
) -> NeighborGraph:
    """Graph of edges given in any order: centre `i`, neighbour `j` (n_edges,), shift `S` (n_edges, 3), whole lattice vectors.

    positions (n_atoms, 3) float, Å; atom_types (n_atoms,); cell (n_systems, 3, 3), (3, 3) for one, or None; `system` (n_atoms,)
    says which one an atom belongs to. i and j count atoms over all systems; they and S are tensors or arrays of integers.
    Atoms at and after `n_local` are ghosts. Edge vectors are differentiable in positions and cell.

    Lists are full: each edge needs its reverse (j, i, -S), unless j is a ghost, or `directed` says that the list is meant so
    (the nearest few neighbours, for instance). InputError names the first bad triple by its place in `i`.
    """
    positions, atom_types = torch.as_tensor(positions), torch.as_tensor(atom_types)
    device, n_atoms = positions.device, len(positions)
    center, neighbor, shift = (_integers(name, value, device) for name, value in (("i", i), ("j", j), ("S", S)))
    n_local = n_atoms if n_local is None else n_local
    _check_triples(center, neighbor, shift, n_local, n_atoms)
    keys = edge_keys(center, neighbor, shift, n_atoms)
    if not directed:
        _check_full(center, neighbor, shift, keys, n_local, n_atoms)
    order = keys.sort(stable=True).indices
    edge_center = center[order]
    cells = positions.new_zeros(1, 3, 3) if cell is None else torch.as_tensor(cell)
    graph = NeighborGraph(
        positions=positions,
        atom_types=atom_types.to(torch.int64),
        system=torch.zeros_like(atom_types, dtype=torch.int64) if system is None else system.to(torch.int64),
        cell=cells[None] if cells.dim() == 2 else cells,
        edge_center=edge_center,
        edge_neighbor=neighbor[order],
        edge_shift=shift[order].to(torch.int32),
        edge_mask=torch.ones(len(order), dtype=torch.bool, device=device),
        ptr=pointer(edge_center, n_local),
        fparam=fparam,
        aparam=aparam,
    )
    return validate(graph, lambda edge: _name(int(order[edge]), center, neighbor, shift))


def _integers(name: str, value: Any, device: torch.device) -> Tensor:
    found = torch.as_tensor(value, device=device)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise InputError(f"{name} has dtype {found.dtype}: expected integers")
    return found.to(torch.int64)


def _check_triples(center: Tensor, neighbor: Tensor, shift: Tensor, n_local: int, n_atoms: int) -> None:
    n_edges = len(center) if center.dim() else -1
    shapes = tuple(center.shape), tuple(neighbor.shape), tuple(shift.shape)
    if shapes != ((n_edges,), (n_edges,), (n_edges, 3)):
        raise InputError(f"i, j and S have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}: expected (n,), (n,) and (n, 3)")
    if not 0 <= n_local <= n_atoms:
        raise InputError(f"n_local is {n_local}, expected 0 to {n_atoms}, the number of atoms")
    for name, values, bound in (("i", center, n_local), ("j", neighbor, n_atoms)):
        bad = ((values < 0) | (values >= bound)).nonzero()
        if len(bad):
            what = " (only local atoms are centres)" if bound < n_atoms else ""
            raise InputError(f"{_name(int(bad[0]), center, neighbor, shift)}: {name} must be 0 to {bound - 1}{what}")
    far = (shift.abs() >= 2**31).any(1).nonzero()
    if len(far):
        raise InputError(f"{_name(int(far[0]), center, neighbor, shift)}: S does not fit 32 bits")


def _check_full(center: Tensor, neighbor: Tensor, shift: Tensor, keys: Tensor, n_local: int, n_atoms: int) -> None:
    inner = (neighbor < n_local).nonzero().squeeze(1)
    forward = keys[inner]
    back = edge_keys(neighbor, center, -shift, n_atoms)[inner]
    if torch.equal(forward.sort().values, back.sort().values):
        return
    known = forward.sort().values
    alone = (_count(known, back) != _count(known, forward)).nonzero()
    first = int(inner[int(alone[0])])
    raise InputError(
        f"{_name(first, center, neighbor, shift)} is not there as often as its reverse (j, i, -S): a half list? Give the full "
        "list, i, j, S = cat([i, j]), cat([j, i]), cat([S, -S]), or directed=True where the list is meant so"
    )


def _count(ascending: Tensor, keys: Tensor) -> Tensor:
    return torch.searchsorted(ascending, keys, right=True) - torch.searchsorted(ascending, keys)


def _name(row: int, center: Tensor, neighbor: Tensor, shift: Tensor) -> str:
    return f"triple {row} (i = {int(center[row])}, j = {int(neighbor[row])}, S = {shift[row].tolist()})"
