"""From structures to graphs: neighbour search by vesin, one system after the other, and lists that live for many steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from vesin import NeighborList as VesinNeighborList

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.data.elements import atomic_number
from carryall.errors import InputError, nearest
from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors, pointer, select_edges

COINCIDENT = 1e-6  # Å: closer atoms have no direction between them
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]


def neighbor_edges(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> Edges:
    """All ordered pairs within `cutoff` of one system: `(center, neighbor, shift)`, sorted by centre, neighbour, shift.

    positions (n, 3) and cell (3, 3, rows are vectors) in Å, pbc (3,) bool. Atoms may lie outside the cell. Raises InputError
    for positions that are not finite, a cell without volume along a periodic axis, and coincident atoms.
    """
    if not np.isfinite(positions).all():
        atom = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise InputError(f"position of atom {atom} is {positions[atom].tolist()}: expected finite numbers")
    box = complete_cell(cell, pbc)
    search = VesinNeighborList(cutoff=cutoff, full_list=True)
    center, neighbor, shift, distance = search.compute(
        np.ascontiguousarray(positions, dtype=np.float64), box, pbc.tolist(), quantities="ijSd"
    )
    if len(distance) and distance.min() < COINCIDENT:
        worst = int(distance.argmin())
        pair = f"atoms {int(center[worst])} and {int(neighbor[worst])}"
        raise InputError(f"{pair} coincide (distance {distance[worst]:.1e} Å): remove one or move it")
    order = np.lexsort((shift[:, 2], shift[:, 1], shift[:, 0], neighbor, center))
    return center[order].astype(np.int64), neighbor[order].astype(np.int64), shift[order].astype(np.int32)


def complete_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """The cell with missing (zero) vectors of open axes filled by unit vectors normal to the others; shift there stays 0."""
    box = np.array(cell, dtype=np.float64)
    if not np.isfinite(box).all():
        raise InputError(f"cell is {box.tolist()}: expected finite numbers")
    missing = [axis for axis in range(3) if not box[axis].any()]
    for axis in missing:
        if pbc[axis]:
            raise InputError(
                f"cell vector {axis} is zero although the structure is periodic along it: give a cell or set pbc to false"
            )
    for axis in missing:
        _, _, rows = np.linalg.svd(box)
        rank = np.linalg.matrix_rank(box)
        box[axis] = rows[rank] if rank < 3 else box[axis]
    volume = abs(np.linalg.det(box))
    if volume < 1e-8 * max(np.prod(np.linalg.norm(box, axis=1)), 1e-300):
        raise InputError(f"cell has no volume (vectors {box.tolist()}): its vectors must not lie in one plane")
    return box


def type_indices(atomic_numbers: Tensor, type_map: Sequence[str]) -> Tensor:
    """(n,) index into `type_map` of each atomic number; InputError names an element that the potential does not know."""
    table = torch.full((120,), -1, dtype=torch.int64)
    for index, symbol in enumerate(type_map):
        number = atomic_number(symbol)
        table[number] = index
    numbers = atomic_numbers.detach().cpu().to(torch.int64)
    outside = (numbers < 0) | (numbers >= 120)
    types = table[numbers.clamp(0, 119)]
    bad = ((types < 0) | outside).nonzero()
    if len(bad):
        from carryall.data.elements import symbol_of

        number = int(numbers[int(bad[0])])
        name = symbol_of(number)
        raise InputError(
            f"atom {int(bad[0])} is {name} (Z = {number}), which the potential does not know: it knows {', '.join(type_map)}"
            + nearest(name, type_map)
        )
    return types.to(atomic_numbers.device)


def build_graph(
    positions: Tensor, atom_types: Tensor, system: Tensor, cell: Tensor, pbc: Tensor, cutoff: float
) -> NeighborGraph:
    """Graph of a batch: positions (n_atoms, 3), atom_types and system (n_atoms,), cell (n_systems, 3, 3), pbc (n_systems, 3).

    Systems are contiguous and in order. Errors name the system.
    """
    counts = torch.bincount(system, minlength=len(cell)).tolist()
    xyz, boxes, periodic = positions.detach().cpu().double().numpy(), cell.detach().cpu().double().numpy(), pbc.cpu().numpy()
    none = np.zeros(0, dtype=np.int64)
    parts: list[Edges] = [(none, none, np.zeros((0, 3), dtype=np.int32))]  # a batch may hold no system at all
    start = 0
    for index, count in enumerate(counts):
        try:
            center, neighbor, shift = neighbor_edges(xyz[start : start + count], boxes[index], periodic[index], cutoff)
        except InputError as error:
            raise InputError(f"system {index}: {error}") from None
        parts.append((center + start, neighbor + start, shift))
        start += count
    device = positions.device
    edge_center, edge_neighbor, edge_shift = (
        torch.from_numpy(np.concatenate([part[k] for part in parts])).to(device) for k in range(3)
    )
    return NeighborGraph(
        positions=positions,
        atom_types=atom_types,
        system=system,
        cell=cell,
        edge_center=edge_center,
        edge_neighbor=edge_neighbor,
        edge_shift=edge_shift,
        edge_mask=torch.ones(len(edge_center), dtype=torch.bool, device=device),
        ptr=pointer(edge_center, len(positions)),
    )


def graph_from_batch(batch: Batch, cutoff: float, type_map: Sequence[str]) -> NeighborGraph:
    """Graph of a batch with every neighbour inside `cutoff` (Å)."""
    return build_graph(
        batch.positions, type_indices(batch.atomic_numbers, type_map), batch.system, batch.cell, batch.pbc, cutoff
    )


def graph_from_structures(structures: Sequence[AtomicData], cutoff: float, type_map: Sequence[str]) -> NeighborGraph:
    """Graph of a list of structures in one batch."""
    if not structures:
        raise InputError("no structures: give at least one")
    pick = ("positions", "atomic_numbers", "cell", "pbc")
    bare = [AtomicData(**{name: getattr(one, name) for name in pick}) for one in structures]
    return graph_from_batch(Batch.from_data_list(bare), cutoff, type_map)


class SkinNeighborList:
    """A list that is searched with `cutoff + skin` and reused until it could miss a neighbour.

    `graph(batch)` always returns exactly the edges within `cutoff`, as a fresh search would. A list is searched again when
    an atom may have moved further, relative to the cell, than the skin allows, when a cell changed by more than that, or
    when the atoms, their order or the periodicity are not the same as before.
    """

    def __init__(self, cutoff: float, type_map: Sequence[str], skin: float = 0.5) -> None:
        if skin < 0:
            raise InputError(f"skin must not be negative, got {skin}")
        self.cutoff, self.type_map, self.skin = cutoff, tuple(type_map), skin
        self.n_searches = 0
        self._wide: NeighborGraph | None = None
        self._reference: tuple[Tensor, ...] = ()

    def graph(self, batch: Batch) -> NeighborGraph:
        """The graph of `batch` with every edge within the cutoff and none beyond it."""
        if self._wide is None or not self._still_valid(batch):
            self._search(batch)
        assert self._wide is not None
        wide = self._wide.replace(positions=batch.positions.detach().clone(), cell=batch.cell.detach().clone())
        squared = edge_vectors(wide).square().sum(1)
        return select_edges(wide, squared <= self.cutoff**2)

    def _search(self, batch: Batch) -> None:
        self._wide = graph_from_batch(batch, self.cutoff + self.skin, self.type_map)
        fields = (batch.positions, batch.cell, batch.atomic_numbers, batch.system, batch.pbc)
        self._reference = tuple(value.detach().clone() for value in fields)
        self.n_searches += 1

    def _still_valid(self, batch: Batch) -> bool:
        positions, cell, numbers, system, pbc = self._reference
        if cell.shape != batch.cell.shape or numbers.shape != batch.atomic_numbers.shape:
            return False
        same = torch.equal(numbers, batch.atomic_numbers) and torch.equal(system, batch.system) and torch.equal(pbc, batch.pbc)
        if not same or not torch.isfinite(batch.positions).all():
            return False
        # An edge vector changes by its ends' displacement plus its length times the strain of the cell (rows: h' = h (1 + e)).
        strain = torch.zeros(len(cell), dtype=cell.dtype, device=cell.device)
        moved = batch.positions - positions
        if not torch.equal(cell, batch.cell):
            if (cell == 0).all(2).any():
                return False
            deformation = torch.linalg.solve(cell, batch.cell)
            moved = batch.positions - torch.einsum("ni,nij->nj", positions, deformation.index_select(0, system))
            strain = torch.linalg.matrix_norm(deformation - torch.eye(3, dtype=cell.dtype, device=cell.device), ord=2)
        reach = torch.zeros(len(cell), dtype=moved.dtype, device=cell.device)
        reach = reach.scatter_reduce(0, system, moved.norm(dim=1), "amax", include_self=True)
        return bool((2 * reach + strain * (self.cutoff + self.skin) <= self.skin).all())
