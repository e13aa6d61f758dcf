"""The neighbour graph: every room's common currency.

A structure, or many at once, becomes a ragged list of edges: no padding, no limit on neighbours. The convention, in code:

    edge vector = positions[edge_neighbor] + edge_shift @ cell[system of the centre] - positions[edge_center]

Edges are sorted by centre, so the edges of centre `c` are the rows `ptr[c]:ptr[c + 1]`. The first `n_local` atoms are owned:
they are the centres and their energies count. Rows at and after `n_local` are ghosts: other ranks' atoms, or images, that only
carry positions, types and features. One process without ghosts is the case `n_local == n_atoms`; with that one field the same
model serves one process, a halo exchange and LAMMPS ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.errors import InputError


@dataclass(frozen=True, eq=False)
class NeighborGraph:
    """Immutable ragged neighbour graph of one or many systems."""

    positions: Tensor
    """(n_atoms, 3) float, Å."""
    atom_types: Tensor
    """(n_atoms,) int64, index into the model's type map."""
    system: Tensor
    """(n_atoms,) int64, which system an atom belongs to."""
    cell: Tensor
    """(n_systems, 3, 3) float, Å, rows are lattice vectors; zeros where a system has none."""
    edge_center: Tensor
    """(n_edges,) int64, ascending, each below n_local."""
    edge_neighbor: Tensor
    """(n_edges,) int64, each below n_atoms."""
    edge_shift: Tensor
    """(n_edges, 3) int32, whole lattice vectors added to the neighbour."""
    edge_mask: Tensor
    """(n_edges,) bool; a masked edge takes part in nothing."""
    ptr: Tensor
    """(n_local + 1,) int64; edges of centre c are ptr[c]:ptr[c + 1]."""
    local: Tensor | None = None
    """(n_local,) int64, 0, 1, ...: carries n_local as a shape of its own, for exported programs; derived from ptr when None."""
    rank: Tensor | None = None
    """(max_degree,) int64, 0, 1, ...: carries the largest degree as a shape, likewise."""
    ghost_owner: Tensor | None = None
    """(n_ghost,) int64, the local atom that a ghost is an image of, where one process owns all; None otherwise."""
    fparam: Tensor | None = None
    """(n_systems, numb_fparam) float, parameters of a whole system that some models take (DeePMD's name)."""
    aparam: Tensor | None = None
    """(n_atoms, numb_aparam) float, parameters of each atom, likewise."""

    @property
    def n_atoms(self) -> int:
        """Local and ghost atoms."""
        return self.positions.shape[0]

    @property
    def n_local(self) -> int:
        """Owned atoms: they come first, and only they have an energy."""
        return self.ptr.shape[0] - 1 if self.local is None else self.local.shape[0]

    @property
    def n_edges(self) -> int:
        """All edges, masked ones too."""
        return self.edge_center.shape[0]

    @property
    def n_systems(self) -> int:
        """Systems in the batch."""
        return self.cell.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.positions.device

    def replace(self, **changes: Tensor | None) -> NeighborGraph:
        """A copy with some fields exchanged."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def map(self, function: Callable[[Tensor], Tensor]) -> NeighborGraph:
        """The graph with `function` of each field that it has."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return NeighborGraph(**{name: function(value) for name, value in values.items() if value is not None})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> NeighborGraph:
        """The graph on another device, its floating-point fields in another dtype."""
        return self.map(lambda value: value.to(device=device, dtype=dtype if value.is_floating_point() else None))


def edge_vectors(graph: NeighborGraph) -> Tensor:
    """(n_edges, 3) from centre to neighbour, Å, in the dtype of the positions; differentiable in positions and cell."""
    shift = graph.edge_shift.to(graph.positions.dtype)
    cell = graph.cell.index_select(0, graph.system.index_select(0, graph.edge_center))
    delta = graph.positions.index_select(0, graph.edge_neighbor) - graph.positions.index_select(0, graph.edge_center)
    return delta + torch.einsum("ei,eij->ej", shift, cell)


def local_types(graph: NeighborGraph) -> Tensor:
    """(n_local,) types of the owned atoms."""
    return graph.atom_types.index_select(0, local_index(graph))


def local_index(graph: NeighborGraph) -> Tensor:
    """(n_local,) 0, 1, ..., n_local - 1: an index, since a slice would tie n_local to n_atoms in an exported program."""
    return torch.arange(graph.ptr.shape[0] - 1, device=graph.ptr.device) if graph.local is None else graph.local


def max_degree(graph: NeighborGraph) -> int:
    """Edges of the centre that has most; 0 for a graph without edges."""
    degrees = graph.ptr[1:] - graph.ptr[:-1]
    return int(degrees.max()) if len(degrees) else 0


def center_slots(graph: NeighborGraph) -> tuple[Tensor, Tensor]:
    """Edges side by side by centre: `(edge, real)`, both (n_local, max_degree); slots beyond a centre's degree hold edge 0."""
    local = local_index(graph)
    begin, end = graph.ptr.index_select(0, local), graph.ptr.index_select(0, local + 1)
    edge = begin[:, None] + rank_axis(graph)
    real = edge < end[:, None]
    return torch.where(real, edge, 0), real


def rank_axis(graph: NeighborGraph) -> Tensor:
    """(max_degree,) 0, 1, ..., max_degree - 1: the ranks that an edge can have among the edges of its centre."""
    return torch.arange(max_degree(graph), device=graph.device) if graph.rank is None else graph.rank


def pointer(edge_center: Tensor, n_local: int) -> Tensor:
    """(n_local + 1,) CSR pointer of centres that are sorted ascending."""
    counts = torch.bincount(edge_center, minlength=n_local)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def select_edges(graph: NeighborGraph, keep: Tensor) -> NeighborGraph:
    """The graph with only the edges where `keep` (n_edges,) bool is true; order is kept."""
    index = keep.nonzero().squeeze(1)
    center = graph.edge_center.index_select(0, index)
    return graph.replace(
        edge_center=center,
        edge_neighbor=graph.edge_neighbor.index_select(0, index),
        edge_shift=graph.edge_shift.index_select(0, index),
        edge_mask=graph.edge_mask.index_select(0, index),
        ptr=pointer(center, graph.n_local),
        rank=None,
    )


def concatenate(graphs: Sequence[NeighborGraph]) -> NeighborGraph:
    """One graph of many; systems keep their order. Graphs with ghosts do not concatenate (owned atoms must come first)."""
    if not graphs:
        raise InputError("cannot concatenate an empty list of graphs: give at least one")
    for index, graph in enumerate(graphs):
        if graph.n_local != graph.n_atoms:
            raise InputError(
                f"graph {index} has {graph.n_atoms - graph.n_local} ghost atoms: only graphs without ghosts concatenate"
            )
    atoms = torch.tensor([0] + [g.n_atoms for g in graphs]).cumsum(0).tolist()
    edges = torch.tensor([0] + [g.n_edges for g in graphs]).cumsum(0).tolist()
    systems = torch.tensor([0] + [g.n_systems for g in graphs]).cumsum(0).tolist()
    return NeighborGraph(
        positions=torch.cat([g.positions for g in graphs]),
        atom_types=torch.cat([g.atom_types for g in graphs]),
        system=torch.cat([g.system + offset for g, offset in zip(graphs, systems, strict=False)]),
        cell=torch.cat([g.cell for g in graphs]),
        edge_center=torch.cat([g.edge_center + offset for g, offset in zip(graphs, atoms, strict=False)]),
        edge_neighbor=torch.cat([g.edge_neighbor + offset for g, offset in zip(graphs, atoms, strict=False)]),
        edge_shift=torch.cat([g.edge_shift for g in graphs]),
        edge_mask=torch.cat([g.edge_mask for g in graphs]),
        ptr=torch.cat([graphs[0].ptr[:1]] + [g.ptr[1:] + offset for g, offset in zip(graphs, edges, strict=False)]),
    )


def validate(graph: NeighborGraph) -> NeighborGraph:
    """Check a graph that comes from outside once, at the border; the error names the first bad edge. Returns the graph."""
    n_atoms, n_local, n_edges = graph.n_atoms, graph.n_local, graph.n_edges
    expected = {
        "positions": (n_atoms, 3),
        "atom_types": (n_atoms,),
        "system": (n_atoms,),
        "cell": (graph.n_systems, 3, 3),
        "edge_center": (n_edges,),
        "edge_neighbor": (n_edges,),
        "edge_shift": (n_edges, 3),
        "edge_mask": (n_edges,),
    }
    for name, shape in expected.items():
        found = tuple(getattr(graph, name).shape)
        if found != shape:
            raise InputError(f"graph.{name} has shape {found}, expected {shape}")
    if n_local > n_atoms:
        raise InputError(f"graph.ptr is for {n_local} centres but there are only {n_atoms} atoms")
    _check_range("edge_center", graph.edge_center, n_local)
    _check_range("edge_neighbor", graph.edge_neighbor, n_atoms)
    _check_range("system", graph.system, graph.n_systems)
    negative = (graph.atom_types < 0).nonzero()
    if len(negative):
        raise InputError(f"graph.atom_types[{int(negative[0])}] is negative: expected an index into the type map")
    descending = (graph.edge_center[1:] < graph.edge_center[:-1]).nonzero()
    if len(descending):
        raise InputError(
            f"edges must be sorted by centre: edge {int(descending[0]) + 1} has a smaller centre than the edge before it"
        )
    if not torch.equal(graph.ptr, pointer(graph.edge_center, n_local)):
        raise InputError("graph.ptr does not match edge_center: make it with carryall.graph.pointer(edge_center, n_local)")
    return graph


def _check_range(name: str, values: Tensor, bound: int) -> None:
    bad = ((values < 0) | (values >= bound)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise InputError(f"graph.{name}[{first}] is {int(values[first])}, expected 0 to {bound - 1}")
