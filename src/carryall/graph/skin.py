"""Neighbour lists that live for many steps: one for each system, found again by its id, searched again where it must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.extra_inputs import extra_inputs
from carryall.errors import InputError
from carryall.graph.neighbor_graph import EXTRA_INPUTS, NeighborGraph
from carryall.graph.neighbor_search import type_indices
from carryall.graph.skin_torch import TorchLists
from carryall.graph.systems import Systems as Systems


class UnsearchableError(InputError):
    """Systems of a call have no neighbour graph: positions that are not finite, coincident atoms, a cell without volume."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        self.reasons = dict(sorted(reasons.items()))
        """Index in the call -> reason, for every such system."""
        index, reason = next(iter(self.reasons.items()))
        super().__init__(f"system {index}: {reason}")


class SkinNeighborList:
    """Lists that are searched with `cutoff + skin` and reused until they could miss a neighbour.

    `graph(systems)` always returns exactly the edges within `cutoff`, as a fresh search would. Each system has a list of its
    own, found again by its id, so lists survive when other systems enter, leave or change places. It is searched again when
    an atom of that system may have moved further, relative to the cell, than the skin allows, when its cell changed by more
    than that, or when its number of atoms or periodicity is another; an id that comes back as something else is right too.
    """

    def __init__(self, cutoff: float, type_map: Sequence[str], skin: float = 0.5) -> None:
        if skin < 0:
            raise InputError(f"skin must not be negative, got {skin}")
        self.cutoff, self.type_map, self.skin = cutoff, tuple(type_map), skin
        self._torch = TorchLists(cutoff, skin)
        self._types: tuple[Tensor, Tensor] | None = None

    @property
    def n_searches(self) -> int:
        """Searches of one system each that were made so far."""
        return self._torch.n_searches

    def types(self, systems: Systems) -> Tensor:
        """(n_atoms,) int64 index into the type map; InputError names an element that is not in it."""
        numbers = systems.atomic_numbers
        if self._types is None or self._types[0].device != numbers.device or not torch.equal(self._types[0], numbers):
            self._types = (numbers.detach().clone(), type_indices(numbers, self.type_map))
        return self._types[1]

    def graph(self, systems: Systems | Batch) -> NeighborGraph:
        """Every edge within the cutoff and none beyond it; UnsearchableError names the systems that have no graph."""
        systems = systems if isinstance(systems, Systems) else Systems.of(systems)
        types = self.types(systems)
        edges, reasons = self._torch.edges(systems)
        if reasons:
            raise UnsearchableError(reasons)
        extra: dict[str, Any] = {**dict.fromkeys(EXTRA_INPUTS), **extra_inputs(systems)}
        return NeighborGraph(
            positions=systems.positions.detach().clone(),
            atom_types=types,
            system=systems.system,
            cell=systems.cell.detach().clone(),
            edge_center=edges.center,
            edge_neighbor=edges.neighbor,
            edge_shift=edges.shift,
            edge_mask=torch.ones(len(edges.center), dtype=torch.bool, device=types.device),
            ptr=edges.ptr,
            **extra,
        )
