"""What sums over reciprocal space need of a graph: which vectors, and the atoms of each system side by side.

Both have sizes that depend on data. They are made before a model is called, so that a program gets them as shapes of inputs.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, local_index
from carryall.graph.ordering import group_ranks

FLAT = 1e-8  # volume of a cell by the product of its lengths, below which its vectors lie in one plane


def with_reciprocal(graph: NeighborGraph, k_cutoff: float) -> NeighborGraph:
    """The graph with `k_index` up to `k_cutoff` (1/Å), `place` and `places`; InputError unless every system is 3-D periodic."""
    check_periodic(graph)
    place = places_of(graph)
    width = int(place.max()) + 1 if len(place) else 0
    places = torch.arange(width, device=graph.device)
    return graph.replace(k_index=reciprocal_index(graph.cell, k_cutoff), place=place, places=places)


def check_periodic(graph: NeighborGraph) -> None:
    """InputError that names the first system without a cell of three vectors, or with an axis along which it is open."""
    cell = graph.cell.detach()
    flat = (cell.det().abs() <= FLAT * torch.linalg.vector_norm(cell, dim=2).prod(1)).nonzero()
    if len(flat):
        raise InputError(
            f"system {int(flat[0])} has no cell of three vectors: long-range electrostatics (Ewald sums) are for systems "
            "periodic along all three axes; give it a cell, with vacuum around a molecule, and pbc = true along all axes"
        )
    open_axis = [] if graph.pbc is None else (~graph.pbc).nonzero().tolist()
    if open_axis:
        system, axis = open_axis[0]
        raise InputError(
            f"system {system} is not periodic along axis {axis}: long-range electrostatics (Ewald sums) are for systems "
            "periodic along all three axes; set pbc = true along it, with vacuum in the cell"
        )


def reciprocal_index(cell: Tensor, k_cutoff: float) -> Tensor:
    """(n_k, 3) int64 triples h of reciprocal vectors k = 2 pi inverse(cell) @ h with 0 < |k| <= k_cutoff, 1/Å.

    Those of any of the cells (n_systems, 3, 3), each once; of h and -h only the one whose first number that is not 0 is
    positive. Sorted, so that ranks with the same cells have the same.
    """
    boxes = torch.unique(cell.detach().double().cpu(), dim=0)
    reach = (k_cutoff / (2 * pi) * torch.linalg.vector_norm(boxes, dim=2)).floor().long()  # 2 pi h_a is k times cell vector a
    widest = reach.amax(0) if len(reach) else torch.zeros(3, dtype=torch.int64)
    rows, row = 2 * int(widest[1]) + 1, 2 * int(widest[2]) + 1
    found = [torch.zeros(0, dtype=torch.int64)]
    for box, far in zip(boxes, reach.tolist(), strict=True):
        axes = [torch.arange(0, far[0] + 1), *(torch.arange(-n, n + 1) for n in far[1:])]
        h = torch.cartesian_prod(*axes)
        code = (h[:, 0] * rows + h[:, 1]) * row + h[:, 2]  # positive where the first number that is not 0 is
        inside = (2 * pi * h.double() @ torch.linalg.inv(box).T).square().sum(1) <= k_cutoff**2
        found.append(code[inside & (code > 0)])
    code = torch.unique(torch.cat(found))
    # back from a code: numbers within -n..n have a remainder of their own
    third = (code + row // 2) % row - row // 2
    code = (code - third) // row
    second = (code + rows // 2) % rows - rows // 2
    return torch.stack([(code - second) // rows, second, third], 1).to(cell.device)


def places_of(graph: NeighborGraph) -> Tensor:
    """(n_local,) place of each local atom among the local atoms of its system: 0, 1, ..."""
    local = local_index(graph)
    return local.clone() if graph.n_systems == 1 else group_ranks(graph.system.index_select(0, local), graph.n_systems)
