"""From structures to graphs: every neighbour within a cutoff.

The search is vesin's, one system after the other; on a GPU nvalchemi-toolkit-ops does all systems at once where installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from vesin import NeighborList as VesinNeighborList

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.data.elements import atomic_number
from carryall.data.extra_inputs import extra_inputs, input_extras, missing_inputs
from carryall.errors import InputError, nearest
from carryall.graph import nvalchemi
from carryall.graph.neighbor_graph import (
    COINCIDENT,
    NeighborGraph,
    pointer,
    rows_times,
    select_edges,
    squared_lengths,
)
from carryall.graph.ordering import edge_order

WIDER = 1 + 1e-8  # searches go this much beyond the cutoff, so that one comparison decides what is inside it
N_NUMBERS = 120  # atomic numbers and more
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]


def neighbor_edges(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> Edges:
    """All ordered pairs within `cutoff` of one system: `(center, neighbor, shift)`, sorted by centre, neighbour, shift.

    positions (n, 3) and cell (3, 3, rows are vectors) in Å, pbc (3,) bool. Atoms may lie outside the cell. Raises InputError
    for positions that are not finite, a cell without volume along a periodic axis, and coincident atoms.
    """
    check_finite(positions)
    box = complete_cell(cell, pbc)
    search = VesinNeighborList(cutoff=cutoff, full_list=True)
    pairs, shift, distance = search.compute(
        np.ascontiguousarray(positions, dtype=np.float64), box, pbc.tolist(), quantities="PSd", copy=False
    )
    if len(distance) and distance.min() < COINCIDENT:
        worst = int(distance.argmin())
        raise coincident(int(pairs[worst, 0]), int(pairs[worst, 1]), distance[worst])
    pairs = pairs.astype(np.int64)  # vesin's own arrays end with the search
    center, neighbor = torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1])
    order = edge_order(center, neighbor, torch.from_numpy(shift), len(positions)).numpy()
    return pairs[order, 0], pairs[order, 1], np.asarray(shift, dtype=np.int32)[order]


def check_finite(positions: np.ndarray) -> None:
    """InputError that names the first of `positions` (n, 3) that is not finite."""
    if not np.isfinite(positions).all():
        atom = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise InputError(f"position of atom {atom} is {positions[atom].tolist()}: expected finite numbers")


def coincident(center: int, neighbor: int, distance: float) -> InputError:
    """The error for two atoms of one system that have no direction between them."""
    return InputError(f"atoms {center} and {neighbor} coincide (distance {distance:.1e} Å): remove one or move it")


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
    numbers = atomic_numbers.detach().cpu().to(torch.int64)
    # numbers beyond the table are taken for 0, which is no element
    inside = torch.where((numbers >= 0) & (numbers < N_NUMBERS), numbers, 0)
    types = _type_table(tuple(type_map))[inside]
    if len(types) and int(types.min()) < 0:
        bad = (types < 0).nonzero()
        from carryall.data.elements import symbol_of

        number = int(numbers[int(bad[0])])
        name = symbol_of(number)
        raise InputError(
            f"atom {int(bad[0])} is {name} (Z = {number}), which the potential does not know: it knows {', '.join(type_map)}"
            + nearest(name, type_map)
        )
    return types.to(atomic_numbers.device)


@lru_cache(maxsize=64)
def _type_table(type_map: tuple[str, ...]) -> Tensor:
    """(N_NUMBERS,) index of each atomic number, -1 where it is not in the map."""
    table = torch.full((N_NUMBERS,), -1, dtype=torch.int64)
    for index, symbol in enumerate(type_map):
        table[atomic_number(symbol)] = index
    return table


def build_graph(
    positions: Tensor, atom_types: Tensor, system: Tensor, cell: Tensor, pbc: Tensor, cutoff: float
) -> NeighborGraph:
    """Graph of a batch: positions (n_atoms, 3), atom_types and system (n_atoms,), cell (n_systems, 3, 3), pbc (n_systems, 3).

    Systems are contiguous and in order. Every neighbour at most `cutoff` (Å) away is there, in the order of centre,
    neighbour, shift. Errors name the system.
    """
    on_gpu = positions.device.type == "cuda" and nvalchemi.is_installed()
    search = search_on_gpu if on_gpu else _search_each
    center, neighbor, shift = search(positions.detach(), system, cell.detach(), pbc, cutoff * WIDER)
    graph = NeighborGraph(
        positions=positions,
        atom_types=atom_types,
        system=system,
        cell=cell.to(positions.dtype),
        edge_center=center,
        edge_neighbor=neighbor,
        edge_shift=shift,
        edge_mask=torch.ones(len(center), dtype=torch.bool, device=positions.device),
        ptr=pointer(center, len(positions)),
        pbc=pbc.to(positions.device),
    )
    squared = squared_lengths(graph)
    _refuse_coincident(graph, squared)
    inside = squared <= cutoff**2
    return graph if bool(inside.all()) else select_edges(graph, inside)


def _search_each(positions: Tensor, system: Tensor, cell: Tensor, pbc: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.bincount(system, minlength=len(cell)).tolist()
    xyz, boxes, periodic = positions.cpu().double().numpy(), cell.cpu().double().numpy(), pbc.cpu().numpy()
    none = np.zeros(0, dtype=np.int64)
    parts: list[Edges] = [(none, none, np.zeros((0, 3), dtype=np.int32))]  # a batch may hold no system at all
    start = 0
    for index, count in enumerate(counts):
        try:
            found = neighbor_edges(xyz[start : start + count], boxes[index], periodic[index], cutoff)
        except InputError as error:
            raise InputError(f"system {index}: {error}") from None
        parts.append((found[0] + start, found[1] + start, found[2]))
        start += count
    # one system needs no copy
    joined = parts[1] if len(parts) == 2 else tuple(np.concatenate([part[k] for part in parts]) for k in range(3))
    center, neighbor, shift = (torch.from_numpy(one).to(positions.device) for one in joined)
    return center, neighbor, shift


def search_on_gpu(positions: Tensor, system: Tensor, cell: Tensor, pbc: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    bad = (~torch.isfinite(positions)).any(1).nonzero()
    index = int(system[bad[0]]) if len(bad) else 0
    boxes, periodic = cell.cpu().double().numpy(), pbc.cpu().numpy()
    complete = np.zeros((len(boxes), 3, 3))
    try:
        if len(bad):
            check_finite(positions[system == index].cpu().numpy())
        for index in range(len(boxes)):
            complete[index] = complete_cell(boxes[index], periodic[index])
    except InputError as error:
        raise InputError(f"system {index}: {error}") from None
    box = torch.from_numpy(complete).to(positions.device)
    center, neighbor, shift = nvalchemi.neighbor_edges(positions.double(), system, box, pbc, cutoff)
    order = edge_order(center, neighbor, shift, len(positions))
    return center[order], neighbor[order], shift[order]


def _refuse_coincident(graph: NeighborGraph, squared: Tensor) -> None:
    if graph.n_edges and float(squared.min()) < COINCIDENT**2:
        worst = int(squared.argmin())
        center, neighbor = int(graph.edge_center[worst]), int(graph.edge_neighbor[worst])
        index = int(graph.system[center])
        start = int((graph.system < index).sum())
        raise InputError(f"system {index}: {coincident(center - start, neighbor - start, float(squared[worst]) ** 0.5)}")


def graph_from_batch(batch: Batch, cutoff: float, type_map: Sequence[str]) -> NeighborGraph:
    """Graph of a batch with every neighbour inside `cutoff` (Å)."""
    types = type_indices(batch.atomic_numbers, type_map)
    graph = build_graph(batch.positions, types, batch.system, batch.cell, batch.pbc, cutoff)
    return graph.replace(**extra_inputs(batch))


def graph_from_structures(
    structures: Sequence[AtomicData], cutoff: float, type_map: Sequence[str], *, wrap: bool = False
) -> NeighborGraph:
    """Graph of a list of structures in one batch; with `wrap`, its positions lie inside the cells (see `wrap_positions`)."""
    if not structures:
        raise InputError("no structures: give at least one")
    pick = ("positions", "atomic_numbers", "cell", "pbc")
    bare = [AtomicData(**{name: getattr(one, name) for name in pick}, **input_extras(one)) for one in structures]
    batch = Batch.from_data_list(bare, missing_inputs(bare))
    if wrap:
        batch.positions = wrap_positions(batch.positions, batch.system, batch.cell, batch.pbc)
    return graph_from_batch(batch, cutoff, type_map)


def wrap_positions(positions: Tensor, system: Tensor, cell: Tensor, pbc: Tensor) -> Tensor:
    """Positions (n_atoms, 3) inside the cells of those systems that are periodic along all axes; others as they are.

    As DeePMD does first of all, so that edge vectors are its to the last bit.
    """
    wrappable = pbc.all(1) & (cell.det().abs() > 0)
    box = torch.where(wrappable[:, None, None], cell, torch.eye(3, dtype=cell.dtype, device=cell.device))
    fractional = rows_times(positions, torch.linalg.inv(box), system)
    inside = rows_times(torch.remainder(fractional, 1.0), box, system)
    return torch.where(wrappable.index_select(0, system)[:, None], inside, positions)
