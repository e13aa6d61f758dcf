"""Evaluation by blocks of centres: for a potential without message passing the energy is a sum over centres.

Memory stays that of one block whatever the size of the system, and what a block allocates stays in cache. Results are
those of one call up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from carryall.graph.neighbor_graph import NeighborGraph


def evaluate_in_blocks(
    call: Callable[[NeighborGraph], dict[str, Tensor]], graph: NeighborGraph, block_size: int | None
) -> dict[str, Tensor]:
    """The sum of `call` over blocks of at most `block_size` centres; one call where that is None, on a GPU, or not exceeded."""
    if block_size is None or graph.n_local <= block_size or graph.device.type != "cpu":
        return call(graph)
    out: dict[str, Tensor] = {}
    atomic: list[Tensor] = []
    bounds = torch.linspace(0, graph.n_local, -(-graph.n_local // block_size) + 1).round().to(torch.int64).tolist()
    for begin, end in pairwise(bounds):
        part, atoms = center_block(graph, begin, end)
        found = call(part)
        atomic.append(found.pop("atomic_energy"))
        for name, value in found.items():
            per_atom = name in ("forces", "atomic_virial")
            if name not in out:
                out[name] = value.new_zeros((graph.n_atoms, *value.shape[1:])) if per_atom else torch.zeros_like(value)
            out[name] = out[name].index_add_(0, atoms, value) if per_atom else out[name] + value
    return {"energy": out.pop("energy"), "atomic_energy": torch.cat(atomic), **out}


def center_block(graph: NeighborGraph, begin: int, end: int) -> tuple[NeighborGraph, Tensor]:
    """The centres begin:end with their edges; neighbours outside are ghosts. Also which atom of `graph` each atom is."""
    first, last = graph.ptr[begin].item(), graph.ptr[end].item()
    neighbor = graph.edge_neighbor[first:last]
    outside = neighbor[(neighbor < begin) | (neighbor >= end)].unique()
    atoms = torch.cat([torch.arange(begin, end, device=graph.device), outside])
    place = torch.empty(graph.n_atoms, dtype=torch.int64, device=graph.device)
    place[atoms] = torch.arange(len(atoms), device=graph.device)
    part = NeighborGraph(
        positions=graph.positions[atoms],
        atom_types=graph.atom_types[atoms],
        system=graph.system[atoms],
        cell=graph.cell,
        edge_center=graph.edge_center[first:last] - begin,
        edge_neighbor=place[neighbor],
        edge_shift=graph.edge_shift[first:last],
        edge_mask=graph.edge_mask[first:last],
        ptr=graph.ptr[begin : end + 1] - first,
    )
    return part, atoms
