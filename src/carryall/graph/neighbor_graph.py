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
from typing import Any

import torch
from torch import Tensor

from carryall.errors import InputError

COINCIDENT = 1e-6  # Å: closer atoms have no direction between them
EDGES_AT_ONCE = 1 << 20  # of a pass over all edges that keeps only one number of each
EXTRA_INPUTS = ("fparam", "aparam", "spin", "charge_spin")


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
    spin: Tensor | None = None
    """(n_atoms, 3) float, magnetic moments in the unit that the model was trained in, commonly Bohr magnetons."""
    charge_spin: Tensor | None = None
    """(n_systems, dim_chg_spin) float, commonly the total charge (e) and the spin multiplicity of a system (DeePMD's name)."""
    pbc: Tensor | None = None
    """(n_systems, 3) bool, axes along which a system repeats; None: not known, and a cell's vectors are taken for such."""
    k_index: Tensor | None = None
    """(n_k, 3) int64, reciprocal vectors that a long-range potential sums over, see `carryall.graph.reciprocal`."""
    place: Tensor | None = None
    """(n_local,) int64, place of an atom among the local atoms of its system, for the same."""
    places: Tensor | None = None
    """(largest number of local atoms in a system,) int64, 0, 1, ...: carries that number as a shape."""
    strain: Tensor | None = None
    """(n_local, 3, 3), zeros that derivatives are taken by, see `carryall.graph.edge_terms.with_virial`."""
    exchange: Any = None
    """A `carryall.exchange.Exchange` where ghosts belong to other ranks, no tensor; None where one process owns all."""

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

    def replace(self, **changes: Any) -> NeighborGraph:
        """A copy with some fields exchanged."""
        return dataclasses.replace(self, **changes)

    def map(self, function: Callable[[Tensor], Tensor]) -> NeighborGraph:
        """The graph with `function` of each field that it has."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return NeighborGraph(**tensors, exchange=self.exchange)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> NeighborGraph:
        """The graph on another device, its floating-point fields in another dtype."""
        return self.map(lambda value: value.to(device=device, dtype=dtype if value.is_floating_point() else None))


def edge_vectors(graph: NeighborGraph) -> Tensor:
    """(n_edges, 3) from centre to neighbour, Å, in the dtype of the positions; differentiable in positions and cell."""
    shift = rows_times(graph.edge_shift, graph.cell, graph.system.index_select(0, graph.edge_center))
    image = graph.positions.index_select(0, graph.edge_neighbor) + shift
    return image - graph.positions.index_select(0, graph.edge_center)


def rows_times(rows: Tensor, cell: Tensor, system: Tensor) -> Tensor:
    """(n, 3) products of `rows` (n, 3) with the cells (n_systems, 3, 3) of their `system` (n,), in the cells' dtype.

    Term by term: BLAS fuses multiplication and addition on some processors only, and last bits would depend on it.
    """
    terms = [rows[:, k, None].to(cell.dtype) * cell[:, k].index_select(0, system) for k in range(3)]
    return (terms[0] + terms[1]) + terms[2]


def squared_lengths(graph: NeighborGraph) -> Tensor:
    """(n_edges,) float64, Å^2, without gradient: what every cutoff is compared with; in little memory beyond the result."""
    wide = graph.replace(positions=graph.positions.detach().double(), cell=graph.cell.detach().double())
    out = wide.positions.new_empty(graph.n_edges)
    for begin in range(0, graph.n_edges, EDGES_AT_ONCE):
        rows = slice(begin, begin + EDGES_AT_ONCE)
        part = {name: getattr(graph, name)[rows] for name in ("edge_center", "edge_neighbor", "edge_shift")}
        out[rows] = edge_vectors(wide.replace(**part)).square().sum(1)
    return out


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
    """The graph with only the edges where `keep` (n_edges,) bool is true; order and all that belongs to atoms are kept."""
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
    """One graph of many; systems keep their order. Graphs with ghosts do not concatenate (owned atoms must come first).

    Each of `EXTRA_INPUTS` belongs to all graphs or to none.
    """
    if not graphs:
        raise InputError("cannot concatenate an empty list of graphs: give at least one")
    for index, graph in enumerate(graphs):
        if graph.n_local != graph.n_atoms:
            raise InputError(
                f"graph {index} has {graph.n_atoms - graph.n_local} ghost atoms: only graphs without ghosts concatenate"
            )
        if graph.exchange is not None:
            raise InputError(f"graph {index} has an exchange, whose plan is for that graph alone: make one for the whole")
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
        **{name: _joined(graphs, name) for name in EXTRA_INPUTS},
        pbc=torch.cat(axes) if len(axes := [g.pbc for g in graphs if g.pbc is not None]) == len(graphs) else None,
    )


def _joined(graphs: Sequence[NeighborGraph], name: str) -> Tensor | None:
    values = [getattr(graph, name) for graph in graphs]
    widths = [None if value is None else value.shape[1] for value in values]
    if any(width != widths[0] for width in widths):
        odd = next(index for index, width in enumerate(widths) if width != widths[0])
        found = ["no " + name if w is None else f"{name} of width {w}" for w in (widths[odd], widths[0])]
        raise InputError(f"graph {odd} has {found[0]} but graph 0 has {found[1]}: give the same to all graphs, or none to any")
    return None if values[0] is None else torch.cat(values)


def check_layout(graph: NeighborGraph) -> None:
    """InputError unless edges are sorted by centre, each below n_local, and `ptr` (and `local`, `rank`) belong to them."""
    n_local = graph.ptr.shape[0] - 1
    _check_range(graph, "edge_center", graph.edge_center, n_local)
    descending = (graph.edge_center[1:] < graph.edge_center[:-1]).nonzero()
    if len(descending):
        edge = int(descending[0]) + 1
        raise InputError(
            f"edges must be sorted by centre: edge {edge} has a smaller centre than the edge before it "
            f"({int(graph.edge_center[edge])} after {int(graph.edge_center[edge - 1])})"
        )
    expected = pointer(graph.edge_center, n_local)
    wrong = (graph.ptr != expected).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"graph.ptr does not match edge_center: ptr[{row}] is {int(graph.ptr[row])}, expected {int(expected[row])}; "
            "make it with carryall.graph.pointer(edge_center, n_local)"
        )
    for name, axis, least in (("local", graph.local, n_local), ("rank", graph.rank, max_degree(graph))):
        if axis is None:
            continue
        if not torch.equal(axis, torch.arange(len(axis), device=axis.device)):
            raise InputError(f"graph.{name} must be 0, 1, 2, ...: it carries a size as its shape")
        if len(axis) < least or (name == "local" and len(axis) > least):
            raise InputError(f"graph.{name} has {len(axis)} entries, but ptr makes it {least}")


def _check_range(graph: NeighborGraph, name: str, values: Tensor, bound: int) -> None:
    bad = ((values < 0) | (values >= bound)).nonzero()
    if len(bad):
        first = int(bad[0])
        edge = f" (it belongs to {edge_name(graph, first)})" if name.startswith("edge_") else ""
        raise InputError(f"graph.{name}[{first}] is {int(values[first])}, expected 0 to {bound - 1}{edge}")


def edge_name(graph: NeighborGraph, edge: int) -> str:
    """How an error names an edge."""
    center, neighbor, shift = int(graph.edge_center[edge]), int(graph.edge_neighbor[edge]), graph.edge_shift[edge].tolist()
    return f"edge {edge}: centre {center}, neighbour {neighbor}, shift {shift}"


_FIELDS: dict[str, tuple[torch.dtype | None, tuple[str | int, ...]]] = {
    "positions": (None, ("n_atoms", 3)),
    "cell": (None, ("n_systems", 3, 3)),
    "atom_types": (torch.int64, ("n_atoms",)),
    "system": (torch.int64, ("n_atoms",)),
    "edge_center": (torch.int64, ("n_edges",)),
    "edge_neighbor": (torch.int64, ("n_edges",)),
    "edge_shift": (torch.int32, ("n_edges", 3)),
    "edge_mask": (torch.bool, ("n_edges",)),
    "ptr": (torch.int64, ("n_local + 1",)),
    "local": (torch.int64, ("n_local",)),
    "rank": (torch.int64, ("max_degree",)),
    "ghost_owner": (torch.int64, ("n_ghost",)),
    "fparam": (None, ("n_systems", "numb_fparam")),
    "aparam": (None, ("n_atoms", "numb_aparam")),
    "spin": (None, ("n_atoms", 3)),
    "charge_spin": (None, ("n_systems", "dim_chg_spin")),
    "pbc": (torch.bool, ("n_systems", 3)),
    "k_index": (torch.int64, ("n_k", 3)),
    "place": (torch.int64, ("n_local",)),
    "places": (torch.int64, ("n_places",)),
    "strain": (None, ("n_local", 3, 3)),
}
"""Type (None: any floating-point one) and shape of each field; the first to have a size defines it."""


def validate(graph: NeighborGraph, name_edge: Callable[[int], str] | None = None) -> NeighborGraph:
    """Check a graph that comes from outside once, at the border. Returns the graph.

    InputError names the first thing that is wrong: an edge by its index, centre, neighbour and shift, or by `name_edge`
    where the caller has other names for edges. Masked edges must point at atoms that exist and may be anything else; the
    same edge may be there twice.
    """
    _check_fields(graph)
    if graph.ptr.shape[0] - 1 > graph.n_atoms:
        raise InputError(f"graph.ptr is for {graph.ptr.shape[0] - 1} centres but there are only {graph.n_atoms} atoms")
    check_layout(graph)
    _check_atoms(graph)
    _check_range(graph, "edge_neighbor", graph.edge_neighbor, graph.n_atoms)
    _check_edges(graph, name_edge or (lambda edge: edge_name(graph, edge)))
    return graph


def _check_fields(graph: NeighborGraph) -> None:
    sizes: dict[str | int, int] = {3: 3}
    for name, (dtype, shape) in _FIELDS.items():
        value = getattr(graph, name)
        if value is None:
            continue
        found = tuple(value.shape)
        known = {size: sizes[size] for size in shape if isinstance(size, str) and size in sizes}
        for size, length in zip(shape, found, strict=False):
            sizes.setdefault(size, length)
        if len(found) != len(shape) or any(sizes[size] != length for size, length in zip(shape, found, strict=True)):
            where = f" with {', '.join(f'{key} = {size}' for key, size in known.items())}" if known else ""
            raise InputError(f"graph.{name} has shape {found}, expected ({', '.join(map(str, shape))}){where}")
        if value.dtype != dtype if dtype is not None else not value.is_floating_point():
            raise InputError(f"graph.{name} has dtype {value.dtype}, expected {dtype or 'a floating-point one'}")
        if value.device != graph.device:
            raise InputError(f"graph.{name} is on {value.device} but graph.positions on {graph.device}: use graph.to")
    if not len(graph.ptr):
        raise InputError("graph.ptr is empty: it has one entry more than there are centres, 0 first")
    if graph.cell.dtype != graph.positions.dtype:
        raise InputError(f"graph.cell has dtype {graph.cell.dtype} but graph.positions {graph.positions.dtype}: give both one")


def _check_atoms(graph: NeighborGraph) -> None:
    _check_range(graph, "system", graph.system, graph.n_systems)
    negative = (graph.atom_types < 0).nonzero()
    if len(negative):
        raise InputError(f"graph.atom_types[{int(negative[0])}] is negative: expected an index into the type map")
    for name in ("positions", "cell", *EXTRA_INPUTS):
        value = getattr(graph, name)
        if value is not None and not bool(torch.isfinite(value).all()):
            row = int((~torch.isfinite(value)).nonzero()[0, 0])
            raise InputError(f"graph.{name}[{row}] is {value[row].tolist()}: expected finite numbers")
    owner, n_local = graph.ghost_owner, graph.n_local
    if owner is None:
        return
    if len(owner) != graph.n_atoms - n_local:
        raise InputError(f"graph.ghost_owner has {len(owner)} entries but there are {graph.n_atoms - n_local} ghosts")
    _check_range(graph, "ghost_owner", owner, n_local)
    for name, values in (("atom_types", graph.atom_types), ("system", graph.system)):
        other = (values[n_local:] != values.index_select(0, owner)).nonzero()
        if len(other):
            ghost = int(other[0])
            raise InputError(
                f"ghost {ghost} (atom {n_local + ghost}) has not the {name} of its owner, atom {int(owner[ghost])}"
            )


def _check_edges(graph: NeighborGraph, name_edge: Callable[[int], str]) -> None:
    center, neighbor = graph.edge_center, graph.edge_neighbor

    def refuse(bad: Tensor, message: str) -> None:
        found = (bad & graph.edge_mask).nonzero()
        if len(found):
            raise InputError(f"{name_edge(int(found[0]))}: {message}")

    system = graph.system.index_select(0, center)
    refuse(system != graph.system.index_select(0, neighbor), "its two atoms belong to different systems: drop or mask the edge")
    missing = (graph.cell == 0).all(2).index_select(0, system)
    refuse((missing & (graph.edge_shift != 0)).any(1), "its shift goes along a cell vector that is zero: give the cell")
    to_itself = (center == neighbor) & (graph.edge_shift == 0).all(1)
    refuse(to_itself, "an atom is not its own neighbour: drop or mask the edge")
    refuse(squared_lengths(graph) < COINCIDENT**2, "its two atoms coincide: move one or mask the edge")
