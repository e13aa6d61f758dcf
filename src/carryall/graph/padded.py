"""DeePMD's padded form of the same neighbours, both ways: extended coordinates, types, neighbour list and mapping.

A frame of the padded form has `nall` atoms: first `nloc` owned ones, then ghosts, images that `mapping` leads home. Row c of
`nlist` holds indices into the frame's atoms, -1 where a slot is empty. Atoms of type -1 are virtual: they only fill a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, max_degree, pointer, select_edges, squared_lengths, validate
from carryall.graph.neighbor_search import complete_cell
from carryall.graph.ordering import edge_keys, edge_order, group_ranks
from carryall.graph.selection import check_sel, check_types_have_sel, limit_neighbors, nearest_ranks

Entries = tuple[Tensor, Tensor, Tensor, Tensor]


class PaddedNeighbors(NamedTuple):
    """The quartet that DeePMD's lower interface takes."""

    extended_coord: Tensor
    """(nf, nall, 3) float, Å."""
    extended_atype: Tensor
    """(nf, nall) int64, -1 for virtual atoms."""
    nlist: Tensor
    """(nf, nloc, nnei) int64, index into the frame's atoms, -1 for an empty slot."""
    mapping: Tensor
    """(nf, nall) int64, the owned atom that each atom is or is an image of."""


def graph_from_padded(
    extended_coord: Tensor,
    extended_atype: Tensor,
    nlist: Tensor,
    mapping: Tensor | None = None,
    *,
    cell: Tensor | None = None,
    cutoff: float | None = None,
    fparam: Tensor | None = None,
    aparam: Tensor | None = None,
    extended_spin: Tensor | None = None,
    charge_spin: Tensor | None = None,
) -> NeighborGraph:
    """Graph of the padded form, shapes as in `PaddedNeighbors`; one system for each frame.

    With `cell` (nf, 3, 3), Å, ghosts are folded on their owners: the graph has owned atoms only, and the shift of an edge is
    what takes the owner to the ghost; InputError where that is no whole lattice vector. Without it, ghosts stay: owned atoms of
    all frames come first, then ghosts of all frames, with `ghost_owner` from `mapping` (left out where ranks own them).
    Edge vectors are differentiable in the coordinates that the graph keeps.

    Virtual atoms are left out, and never have edges: atoms of the graph are those with type >= 0, in order. With `cutoff` (Å)
    entries beyond it, those of a list with a skin, are left out too. fparam and charge_spin (nf, n), aparam (nf, nloc, n) and
    extended_spin (nf, nall, 3) go along.
    InputError names a bad entry by its place in `nlist`.
    """
    _check_shapes(extended_coord, extended_atype, nlist, mapping, cell)
    (frames, nall), nloc = extended_atype.shape, nlist.shape[1]
    if mapping is not None:
        _check_mapping(extended_atype, mapping, nloc)
    entry = _real_entries(extended_atype, nlist)
    frame, row, _, atom = entry
    real = extended_atype >= 0
    owned = real & (torch.arange(nall, device=nlist.device) < nloc)
    ghosts = real & ~owned if cell is None else torch.zeros_like(owned)
    # owned atoms of all frames, then ghosts of all frames
    atoms = torch.cat([part.reshape(-1).nonzero().squeeze(1) for part in (owned, ghosts)])
    place = torch.zeros(frames * nall, dtype=torch.int64, device=nlist.device)
    place[atoms] = torch.arange(len(atoms), device=nlist.device)
    place = place.view(frames, nall)
    home = place if mapping is None else place.gather(1, mapping.clamp(0, max(nall - 1, 0)))
    center = place[frame, row]
    if cell is None or mapping is None:
        neighbor, shift = place[frame, atom], torch.zeros(len(frame), 3, dtype=torch.int32, device=nlist.device)
    else:
        neighbor, shift = home[frame, atom], _shifts(extended_coord, mapping, cell, entry)
    order = edge_order(center, neighbor, shift, len(atoms))
    graph = NeighborGraph(
        positions=extended_coord.reshape(-1, 3).index_select(0, atoms),
        atom_types=extended_atype.reshape(-1).index_select(0, atoms).to(torch.int64),
        system=torch.div(atoms, max(nall, 1), rounding_mode="floor"),
        cell=extended_coord.new_zeros(frames, 3, 3) if cell is None else cell,
        edge_center=center[order],
        edge_neighbor=neighbor[order],
        edge_shift=shift[order],
        edge_mask=torch.ones_like(order, dtype=torch.bool),
        ptr=pointer(center, int(owned.sum())),
        ghost_owner=home[ghosts] if mapping is not None and cell is None else None,
        fparam=fparam,
        aparam=None if aparam is None else _spread(aparam, owned[:, :nloc], len(atoms)),
        spin=None if extended_spin is None else _of_atoms("extended_spin", extended_spin, frames, nall, atoms),
        charge_spin=charge_spin,
    )
    validate(graph, lambda edge: _name(entry, int(order[edge])))
    return graph if cutoff is None else select_edges(graph, squared_lengths(graph) <= cutoff**2)


def _real_entries(extended_atype: Tensor, nlist: Tensor) -> Entries:
    """Frame, owned atom, slot and neighbour of each entry of `nlist` between two atoms that are not virtual."""
    real = extended_atype >= 0
    frame, row, slot = (nlist >= 0).nonzero().unbind(1)
    atom = nlist[frame, row, slot].to(torch.int64)
    use = real[frame, row] & real[frame, atom]
    return frame[use], row[use], slot[use], atom[use]


def _check_shapes(
    extended_coord: Tensor, extended_atype: Tensor, nlist: Tensor, mapping: Tensor | None, cell: Tensor | None
) -> None:
    if extended_atype.dim() != 2 or nlist.dim() != 3:
        found = f"{tuple(extended_atype.shape)} and {tuple(nlist.shape)}"
        raise InputError(f"extended_atype and nlist have shapes {found}: expected (nf, nall) and (nf, nloc, nnei)")
    frames, nall = extended_atype.shape
    nloc = nlist.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "extended_coord": (extended_coord, (frames, nall, 3)),
        "nlist": (nlist, (frames, nloc, nlist.shape[2])),
        "mapping": (mapping, (frames, nall)),
        "cell": (cell, (frames, 3, 3)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
    if cell is not None and mapping is None:
        raise InputError("folding ghosts on their owners needs mapping: give it, or leave out cell")
    if nloc > nall:
        raise InputError(f"nlist is for {nloc} owned atoms but extended_coord holds only {nall}")
    bad = ((extended_atype >= 0) & ~torch.isfinite(extended_coord).all(2)).nonzero()
    if len(bad):
        f, atom = bad[0].tolist()
        raise InputError(f"extended_coord[{f}, {atom}] is {extended_coord[f, atom].tolist()}: expected finite numbers")
    bad = (nlist >= nall).nonzero()
    if len(bad):
        f, c, k = bad[0].tolist()
        raise InputError(f"nlist[{f}, {c}, {k}] is {int(nlist[f, c, k])}, expected -1 to {nall - 1}")


def _check_mapping(extended_atype: Tensor, mapping: Tensor, nloc: int) -> None:
    real = extended_atype >= 0
    outside = real & ((mapping < 0) | (mapping >= nloc))
    moved = torch.zeros_like(real)
    moved[:, :nloc] = real[:, :nloc] & (mapping[:, :nloc] != torch.arange(nloc, device=mapping.device))
    other = real & (extended_atype != extended_atype.gather(1, mapping.clamp(0, max(nloc - 1, 0)))) if nloc else outside
    for bad, message in (
        (outside, f"expected 0 to {nloc - 1}, an owned atom"),
        (moved, "but an owned atom is its own owner"),
        (other, "an atom of another type"),
    ):
        found = bad.nonzero()
        if len(found):
            f, atom = found[0].tolist()
            raise InputError(f"mapping[{f}, {atom}] is {int(mapping[f, atom])}: {message}")


def _shifts(coord: Tensor, mapping: Tensor, cell: Tensor, entry: Entries) -> Tensor:
    """(n_edges, 3) int32, whole lattice vectors from the owner of each neighbour to the neighbour."""
    boxes = cell.detach().cpu().double().numpy()
    complete = np.zeros((len(boxes), 3, 3))
    for index, box in enumerate(boxes):
        try:
            complete[index] = complete_cell(box, box.any(axis=1))
        except InputError as error:
            raise InputError(f"frame {index}: {error}") from None
    frame, _, _, atom = entry
    xyz = coord.detach().double()
    delta = xyz[frame, atom] - xyz[frame, mapping[frame, atom]]
    inverse = torch.linalg.inv(torch.from_numpy(complete)).to(coord.device)
    shift = torch.einsum("ei,eij->ej", delta, inverse.index_select(0, frame)).round()
    rest = delta - torch.einsum("ei,eij->ej", shift, cell.detach().double().index_select(0, frame))
    allowed = 1e-6 if coord.dtype == torch.float64 else 1e-3
    bad = ((rest.abs() > allowed) | (shift.abs() >= 2**31)).any(1).nonzero()
    if len(bad):
        edge = int(bad[0])
        f, ghost = int(frame[edge]), int(atom[edge])
        raise InputError(
            f"{_name(entry, edge)} is atom {ghost}, {rest[edge].norm():.1e} Å away from any image of its owner "
            f"{int(mapping[f, ghost])}: cell, coordinates and mapping do not belong together"
        )
    return shift.to(torch.int32)


def _spread(values: Tensor, owned: Tensor, n_atoms: int) -> Tensor:
    """(n_atoms, n) values of owned atoms, zeros for ghosts."""
    if values.shape[:2] != owned.shape or values.dim() != 3:
        raise InputError(f"aparam has shape {tuple(values.shape)}, expected ({owned.shape[0]}, {owned.shape[1]}, numb_aparam)")
    mine = values.reshape(-1, values.shape[2]).index_select(0, owned.reshape(-1).nonzero().squeeze(1))
    return torch.cat([mine, mine.new_zeros(n_atoms - len(mine), mine.shape[1])])


def _of_atoms(name: str, values: Tensor, frames: int, nall: int, atoms: Tensor) -> Tensor:
    """(n_atoms, 3) rows of `values` (nf, nall, 3)."""
    if tuple(values.shape) != (frames, nall, 3):
        raise InputError(f"{name} has shape {tuple(values.shape)}, expected {(frames, nall, 3)}")
    return values.reshape(-1, 3).index_select(0, atoms)


def _name(entry: Entries, edge: int) -> str:
    frame, row, slot, _ = entry
    return f"nlist[{int(frame[edge])}, {int(row[edge])}, {int(slot[edge])}]"


def padded_from_graph(graph: NeighborGraph, sel: int | Sequence[int] | None = None, *, mixed: bool = True) -> PaddedNeighbors:
    """The padded form of a graph, one frame for each system; the inverse of `graph_from_padded`.

    Neighbours are nearest first. Without `sel` all are there, and nnei is the largest degree. With it nnei is sum(sel), and
    the nearest are kept as `limit_neighbors` does, with slots of their own for each type, type after type, unless `mixed`.
    Frames with fewer atoms are filled with virtual ones. The graph's own ghosts need `ghost_owner`; every shifted neighbour
    becomes a ghost. extended_coord is differentiable in positions and cell.
    """
    if graph.n_atoms > graph.n_local and graph.ghost_owner is None:
        raise InputError("the graph has ghosts of unknown owners, so there is no mapping: give ghost_owner")
    capacity = None if sel is None else check_sel(sel)
    graph = select_edges(graph, graph.edge_mask) if capacity is None else limit_neighbors(graph, capacity, mixed=mixed)
    images, neighbor = _image_rows(graph)
    n_local, frames = graph.n_local, graph.n_systems
    source = torch.cat([torch.arange(graph.n_atoms, device=graph.device), images[:, 0]])
    home = torch.arange(n_local, device=graph.device)
    home = home if graph.ghost_owner is None else torch.cat([home, graph.ghost_owner])
    system = graph.system.index_select(0, source)
    nloc = int(torch.bincount(system[:n_local], minlength=1).max())
    slot = torch.cat([group_ranks(system[:n_local], frames), nloc + group_ranks(system[n_local:], frames)])
    nall = max(int(slot.max()) + 1, nloc) if len(slot) else nloc
    place = system * nall + slot
    offset = torch.einsum("ai,aij->aj", images[:, 1:].to(graph.positions.dtype), graph.cell[system[graph.n_atoms :]])
    rows = torch.cat([graph.positions, graph.positions.index_select(0, images[:, 0]) + offset])
    coord = rows.new_zeros(frames * nall, 3).index_copy(0, place, rows).view(frames, nall, 3)
    atype = place.new_full((frames * nall,), -1)
    atype[place] = graph.atom_types.index_select(0, source)
    mapping = torch.arange(nall, device=graph.device).repeat(frames, 1)
    mapping[:, nloc:] = 0  # of virtual ghosts
    mapping = mapping.reshape(-1)
    mapping[place] = slot.index_select(0, home.index_select(0, source))
    nlist = _rows_of_neighbors(graph, slot.index_select(0, neighbor), slot, nloc, capacity, mixed)
    return PaddedNeighbors(coord, atype.view(frames, nall), nlist, mapping.view(frames, nall))


def _image_rows(graph: NeighborGraph) -> tuple[Tensor, Tensor]:
    """(n_images, 4) atom and shift of each image that is a neighbour, and (n_edges,) each edge's row among atoms and images."""
    neighbor = graph.edge_neighbor.clone()
    across = graph.edge_shift.any(1).nonzero().squeeze(1)
    atom, shift = neighbor[across], graph.edge_shift[across]
    keys = edge_keys(torch.zeros_like(atom), atom, shift, graph.n_atoms)
    unique, which = torch.unique(keys, return_inverse=True)
    first = torch.empty_like(unique)
    first[which] = torch.arange(len(across), device=graph.device)  # any edge to the image will do
    neighbor[across] = graph.n_atoms + which
    return torch.cat([atom[first][:, None], shift[first].to(torch.int64)], dim=1), neighbor


def _rows_of_neighbors(
    graph: NeighborGraph, entry: Tensor, slot: Tensor, nloc: int, capacity: list[int] | None, mixed: bool
) -> Tensor:
    by_type = capacity is not None and not mixed
    column = nearest_ranks(graph, by_type=by_type)
    if capacity is not None and by_type:
        check_types_have_sel(graph, capacity)
        start = torch.tensor([0, *capacity[:-1]], device=graph.device).cumsum(0)
        column = column + start.index_select(0, graph.atom_types.index_select(0, graph.edge_neighbor))
    width = max_degree(graph) if capacity is None else sum(capacity)
    nlist = entry.new_full((graph.n_systems * nloc * width,), -1)
    row = graph.system.index_select(0, graph.edge_center) * nloc + slot.index_select(0, graph.edge_center)
    nlist[row * width + column] = entry
    return nlist.view(graph.n_systems, nloc, width)
