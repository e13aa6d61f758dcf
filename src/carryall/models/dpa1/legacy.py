"""DeePMD's padded semantics, without the padding.

DeePMD's padded routes give every centre sum(sel) slots: the nearest neighbours, then empty slots. The empty ones are not inert:

- smooth attention keeps them in the softmax, as keys of logit -20 and weight zero;
- they have an environment row of -davg / dstd, and are taken for neighbours of the type of the system's first atom, so that
  with davg != 0 they add to the descriptor. That sum changes when atoms are permuted: it is not a property of the structure.

All empty slots of one centre are alike, so one row with a multiplicity gives exactly what padding gives.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.graph.neighbor_graph import NeighborGraph, local_index
from carryall.models.dpa1.environment import CenterBlocks


@dataclass(frozen=True, eq=False)
class EmptySlots:
    """What the padded list of each centre holds beyond its neighbours."""

    count: Tensor
    """(n_local,) int64, how many."""
    neighbor_type: Tensor
    """(n_local,) int64, the type they are taken for."""


def nearest(blocks: CenterBlocks, sel: int) -> CenterBlocks:
    """The blocks with only the `sel` nearest neighbours of each centre unmasked; ties keep the order of the edges."""
    squared = torch.where(blocks.mask, blocks.vector.detach().square().sum(-1), torch.inf)
    rank = squared.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return dataclasses.replace(blocks, mask=blocks.mask & (rank < sel))


def empty_slots(blocks: CenterBlocks, graph: NeighborGraph, sel: int) -> EmptySlots:
    """The slots that are left of `sel`, for blocks whose mask says which are taken."""
    atom = torch.cumsum(torch.ones_like(graph.system), 0) - 1
    none = torch.full((graph.cell.shape[0],), graph.positions.shape[0], dtype=torch.int64, device=graph.device)
    first = none.scatter_reduce(0, graph.system, atom, "amin")
    # one more type, for a system without atoms
    of_system = torch.cat([graph.atom_types, graph.atom_types.new_zeros(1)]).index_select(0, first)
    kind = of_system.index_select(0, graph.system.index_select(0, local_index(graph)))
    return EmptySlots(sel - blocks.mask.sum(1), kind)
