"""Kept neighbour lists and what is evaluated straight from them, by machine code; see lists.h."""

from __future__ import annotations

import ctypes
import threading
import weakref
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from carryall.native.build import library


class Failure(IntEnum):
    """Why a system has no neighbour graph."""

    NOT_FINITE = 1
    BAD_CELL = 2
    COINCIDE = 3
    TOO_FAR = 4


@dataclass(frozen=True)
class Problem:
    """A system without a neighbour graph; its atoms count from 0."""

    failure: Failure
    first: int
    second: int
    distance: float


@dataclass(frozen=True, eq=False)
class Arrays:
    """The systems of a call as C++ reads them: contiguous, on the CPU, float64, int64 and bool."""

    ptr: Tensor
    ids: Tensor | None
    positions: Tensor
    cell: Tensor
    pbc: Tensor

    @classmethod
    def of(cls, ptr: Tensor, ids: Tensor | None, positions: Tensor, cell: Tensor, pbc: Tensor) -> Arrays:
        """Converted where need be; ValueError where sizes do not fit, since C++ would read beyond the end."""
        n_systems, n_atoms = cell.shape[0], positions.shape[0]
        fits = ptr.shape[0] == n_systems + 1 and pbc.shape == (n_systems, 3) and (ids is None or ids.shape == (n_systems,))
        if not fits or positions.shape != (n_atoms, 3) or cell.shape != (n_systems, 3, 3) or int(ptr[-1]) != n_atoms:
            shapes = {"ptr": ptr, "positions": positions, "cell": cell, "pbc": pbc, **({} if ids is None else {"ids": ids})}
            raise ValueError(f"sizes do not fit: { ({name: tuple(value.shape) for name, value in shapes.items()}) }")
        return cls(
            ptr.to(torch.int64).contiguous(),
            None if ids is None else ids.to(torch.int64).contiguous(),
            positions.to(torch.float64).contiguous(),
            cell.to(torch.float64).contiguous(),
            pbc.to(torch.bool).contiguous(),
        )

    def addresses(self) -> tuple[int, int, int | None, int, int, int]:
        """n_systems, ptr, ids, positions, cell, pbc."""
        ids = None if self.ids is None else self.ids.data_ptr()
        geometry = (self.positions.data_ptr(), self.cell.data_ptr(), self.pbc.data_ptr())
        return (self.cell.shape[0], self.ptr.data_ptr(), ids, *geometry)


class NativeLists:
    """Lists of all neighbours within cutoff + skin, one for each system, kept in memory of their own.

    A copy, or one that was pickled, starts without lists. Needs `library()`.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        found = library()
        assert found is not None
        self.cutoff, self.skin = cutoff, skin
        self._library = found
        self._lists: int = found.carryall_lists_new(cutoff, skin, cutoff**2)
        self._lock = threading.Lock()
        self._wide = ctypes.c_int64()
        weakref.finalize(self, found.carryall_lists_free, self._lists)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeLists, (self.cutoff, self.skin)

    @property
    def n_searches(self) -> int:
        """Searches of one system each that were made so far."""
        return int(self._library.carryall_lists_searches(self._lists))

    @property
    def n_kept(self) -> int:
        """Lists in memory."""
        return int(self._library.carryall_lists_kept(self._lists))

    def edges(self, systems: Arrays) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[int, Problem]]:
        """center, neighbor (n_edges,) int64, shift (n_edges, 3) int32 and ptr (n_atoms + 1,) of the edges within the cutoff.

        Sorted by centre, neighbour, shift; also what is wrong with which system of the call.
        """
        n, ptr, ids, positions, cell, pbc = systems.addresses()
        with self._lock:
            failed = self._library.carryall_lists_update(
                self._lists, n, ptr, ids, positions, cell, pbc, torch.get_num_threads(), ctypes.addressof(self._wide)
            )
            check_memory(failed)
            wide = self._wide.value
            center, neighbor = (torch.empty(wide, dtype=torch.int64) for _ in range(2))
            shift = torch.empty(wide, 3, dtype=torch.int32)
            edge_ptr = torch.empty(systems.positions.shape[0] + 1, dtype=torch.int64)
            out = (center.data_ptr(), neighbor.data_ptr(), shift.data_ptr(), edge_ptr.data_ptr())
            failed += check_memory(self._library.carryall_lists_edges(self._lists, n, ptr, positions, cell, *out))
            problems = self._problems(n) if failed else {}
        count = int(edge_ptr[-1])
        return (center[:count], neighbor[:count], shift[:count], edge_ptr), problems

    def lennard_jones(
        self, systems: Arrays, types: Tensor, table: Tensor, truncation: int, start: float
    ) -> tuple[dict[str, Tensor], dict[int, Problem]]:
        """What a Potential returns, and what is wrong with which system of the call.

        types (n_atoms,) int64; table (n_types, 3, n_types) float64: for the type of a centre 4 epsilon, sigma^2 and the energy
        at the cutoff with each type of neighbour; truncation: 0 cuts, 1 shifts, 2 switches off from the distance `start` on.
        """
        n_systems, n_atoms = systems.cell.shape[0], systems.positions.shape[0]
        if types.shape != (n_atoms,) or table.dim() != 3 or table.shape[1] != 3:
            raise ValueError(f"sizes do not fit: types {tuple(types.shape)}, table {tuple(table.shape)}, {n_atoms} atoms")
        types, table = types.to(torch.int64).contiguous(), table.to(torch.float64).contiguous()
        energy, virial = torch.empty(n_systems, dtype=torch.float64), torch.empty(n_systems, 3, 3, dtype=torch.float64)
        atomic, forces = torch.empty(n_atoms, dtype=torch.float64), torch.empty(n_atoms, 3, dtype=torch.float64)
        form = (types.data_ptr(), table.shape[0], table.data_ptr(), truncation, start)
        out = (energy.data_ptr(), atomic.data_ptr(), forces.data_ptr(), virial.data_ptr())
        with self._lock:
            failed = check_memory(
                self._library.carryall_lennard_jones(self._lists, *systems.addresses(), torch.get_num_threads(), *form, *out)
            )
            problems = self._problems(n_systems) if failed else {}
        return {"energy": energy, "atomic_energy": atomic, "forces": forces, "virial": virial}, problems

    def _problems(self, n_systems: int) -> dict[int, Problem]:
        codes, distances = torch.empty(n_systems, 3, dtype=torch.int64), torch.empty(n_systems, dtype=torch.float64)
        self._library.carryall_lists_failures(self._lists, codes.data_ptr(), distances.data_ptr())
        rows = zip(codes.tolist(), distances.tolist(), strict=True)
        return {index: Problem(Failure(row[0]), row[1], row[2], far) for index, (row, far) in enumerate(rows) if row[0]}


def check_memory(result: int) -> int:
    """The result; MemoryError where it says that there was not enough."""
    if result < 0:
        raise MemoryError("neighbour lists need more memory than there is: use fewer atoms at once or a smaller skin")
    return result
