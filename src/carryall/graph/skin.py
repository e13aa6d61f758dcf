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
from carryall.graph.neighbor_search import check_finite, coincident, complete_cell, type_indices
from carryall.graph.skin_torch import Edges, TorchLists
from carryall.graph.systems import Systems as Systems
from carryall.native import library
from carryall.native.lists import Arrays, Failure, NativeLists, Problem


class UnsearchableError(InputError):
    """Systems of a call have no neighbour graph: positions that are not finite, coincident atoms, a cell without volume."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        self.reasons = dict(sorted(reasons.items()))
        """Index in the call -> reason, for every such system."""
        index, reason = next(iter(self.reasons.items()))
        super().__init__(f"system {index}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return UnsearchableError, (self.reasons,)


class SkinNeighborList:
    """Lists that are searched with `cutoff + skin` and reused until they could miss a neighbour.

    `graph(systems)` always returns exactly the edges within `cutoff`, as a fresh search would. Each system has a list of its
    own, found again by its id, so lists survive when other systems enter, leave or change places. It is searched again when
    an atom of that system may have moved further, relative to the cell, than the skin allows, when its cell changed by more
    than that, or when its number of atoms or periodicity is another; an id that comes back as something else is right too.
    Lists of systems that no longer come are dropped, those away the longest first, while they hold more atoms than the call.
    """

    def __init__(self, cutoff: float, type_map: Sequence[str], skin: float = 0.5) -> None:
        if skin < 0:
            raise InputError(f"skin must not be negative, got {skin}")
        self.cutoff, self.type_map, self.skin = cutoff, tuple(type_map), skin
        self._torch = TorchLists(cutoff, skin)
        self._native: NativeLists | None = None
        self._types: tuple[Tensor, Tensor] | None = None

    @property
    def n_searches(self) -> int:
        """Searches of one system each that were made so far."""
        return self._torch.n_searches + (0 if self._native is None else self._native.n_searches)

    def types(self, systems: Systems) -> Tensor:
        """(n_atoms,) int64 index into the type map; InputError names an element that is not in it."""
        numbers = systems.atomic_numbers
        if self._types is None or self._types[0].device != numbers.device or not torch.equal(self._types[0], numbers):
            self._types = (numbers.detach().clone(), type_indices(numbers, self.type_map))
        return self._types[1]

    def native(self, systems: Systems) -> NativeLists | None:
        """The lists in machine code; None where there is no library, or for systems that are not on the CPU."""
        if systems.positions.device.type != "cpu" or library() is None:
            return None
        if self._native is None:
            self._native = NativeLists(self.cutoff, self.skin)
        return self._native

    def graph(self, systems: Systems | Batch) -> NeighborGraph:
        """Every edge within the cutoff and none beyond it; UnsearchableError names the systems that have no graph."""
        systems = systems if isinstance(systems, Systems) else Systems.of(systems)
        types = self.types(systems)
        native = self.native(systems)
        if native is None:
            edges, reasons = self._torch.edges(systems)
            if reasons:
                raise UnsearchableError(reasons)
        else:
            found, problems = native.edges(arrays_of(systems))
            refuse(problems, systems)
            edges = Edges(*found)
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
            pbc=systems.pbc.to(types.device),
            **extra,
        )


def arrays_of(systems: Systems) -> Arrays:
    """The systems as native code takes them."""
    return Arrays.of(systems.ptr, systems.ids, systems.positions.detach(), systems.cell.detach(), systems.pbc)


def refuse(problems: Mapping[int, Problem], systems: Systems) -> None:
    """UnsearchableError where native code found something wrong with a system."""
    if problems:
        raise UnsearchableError({index: reason_of(index, problem, systems) for index, problem in problems.items()})


def reason_of(index: int, problem: Problem, systems: Systems) -> str:
    """In the words of a search in Python."""
    if problem.failure == Failure.COINCIDE:
        return str(coincident(problem.first, problem.second, problem.distance))
    if problem.failure == Failure.TOO_FAR:
        return f"atom {problem.first} is more than 1e9 cells away from the origin: wrap the positions into the cell"
    try:
        check_finite(systems.positions[systems.ptr[index] : systems.ptr[index + 1]].detach().double().numpy())
        complete_cell(systems.cell[index].detach().double().numpy(), systems.pbc[index].numpy())
    except InputError as error:
        return str(error)
    return f"cell has no volume (vectors {systems.cell[index].tolist()}): its vectors must not lie in one plane"
