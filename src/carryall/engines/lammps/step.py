"""One force evaluation: LAMMPS' atoms of this rank in, forces, energy and virial out."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from carryall.engines.lammps.capi import LammpsFunctions, rows_view, view
from carryall.engines.lammps.checks import check_special
from carryall.engines.lammps.edges import EdgeReader, check_complete
from carryall.engines.lammps.units import LammpsUnits
from carryall.engines.rank_part import evaluate_part, part_graph
from carryall.errors import InputError
from carryall.exchange import Exchange, Transport, plan_from_ids
from carryall.graph.potential import Potential

VOIGT = ([0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2])
"""Rows and columns of xx yy zz xy xz yz."""
WISH = 1 << 32  # counts ranks that want to stop, above those whose atoms changed


class Evaluator:
    """Evaluates the potential for one LAMMPS object; keeps the exchange plan while no rank's atoms change."""

    def __init__(
        self,
        functions: LammpsFunctions,
        potential: Potential,
        type_table: Tensor,
        units: LammpsUnits,
        transport: Transport,
        fix: bytes,
    ) -> None:
        self.functions, self.potential, self.units, self.transport, self.fix = functions, potential, units, transport, fix
        self.type_table = type_table
        self.reader = EdgeReader(functions, potential.spec.cutoff)
        self.n_calls = 0
        """Evaluations made."""
        self.n_plans = 0
        """Exchange plans made."""
        self.check_lists = True
        """Whether the next evaluation looks whether LAMMPS' list has every neighbour."""
        self.stop_wanted = False
        """Whether this rank wants the run to end after the step."""
        self.stopped = False
        """Whether the ranks have agreed to end it."""
        self._ids = np.empty(0, functions.tag_type)
        self._n_local = -1
        self._exchange: Exchange | None = None
        self._types, self._atom_types = np.empty(0, np.int32), torch.empty(0, dtype=torch.int64)
        self._box: tuple[float, ...] = ()
        self._cell = torch.zeros(3, 3, dtype=torch.float64)
        self._periodic = torch.ones(3, dtype=torch.bool)

    def evaluate(self, step: int, n_local: int, ids: int, x: int, forces: int) -> None:
        """Write the forces of the own atoms, and energies and virials where the step asks for them; collective."""
        functions = self.functions
        check_special(functions)
        n_atoms = n_local + functions.n_ghost
        positions = torch.from_numpy(rows_view(x, n_atoms)) * self.units.length
        all_ids = view(ids, n_atoms, functions.tag_type)
        if not math.isfinite(positions.sum()):
            raise _not_finite("position", positions.numpy(), all_ids, "Å")
        exchange = self._exchange_for(all_ids, n_local)
        edges = self.reader.read(positions, all_ids, n_local)
        if self.check_lists:
            check_complete(edges, positions, all_ids, self.reader.limit)
            self.check_lists = False
        by_atom = functions.asked("vflag_atom", step)
        cell, pbc = self._box_now()
        graph = part_graph(positions, self._types_of(n_atoms), cell, *edges, exchange, pbc)
        out = evaluate_part(self.potential, graph, atomic_virial="half" if by_atom else False)
        found = out["forces"].detach().numpy()
        if not math.isfinite(found.sum()):
            raise _not_finite("force", found, all_ids, "eV/Å")
        np.divide(found, self.units.force, out=rows_view(forces, n_local))
        self._give_totals(out)
        self._give_atomic(out, functions.asked("eflag_atom", step), by_atom)
        self.n_calls += 1

    def _exchange_for(self, ids: np.ndarray, n_local: int) -> Exchange:
        """The exchange of these atoms, a new one when those of any rank are others than before."""
        changed = n_local != self._n_local or not np.array_equal(ids, self._ids)
        if self.transport.size > 1:
            said = int(self.transport.all_reduce(torch.tensor(changed + WISH * self.stop_wanted)))
            changed, wishes = bool(said % WISH), said // WISH
        else:
            wishes = int(self.stop_wanted)
        if wishes and not self.stopped:
            self.stopped = True
            self.functions.stop()
        if changed or self._exchange is None:
            self._ids, self._n_local = ids.copy(), n_local
            wide = torch.from_numpy(self._ids.astype(np.int64, copy=False))
            plan = plan_from_ids(wide[:n_local], wide[n_local:], self.transport)
            self._exchange = Exchange(plan, self.transport)
            self.n_plans += 1
        return self._exchange

    def _types_of(self, n_atoms: int) -> Tensor:
        """(n_atoms,) the potential's types, which LAMMPS may change from step to step."""
        types = self.functions.types(n_atoms)
        if not np.array_equal(types, self._types):
            self._types = types.copy()
            self._atom_types = self.type_table[torch.from_numpy(self._types).long()]
        return self._atom_types

    def _box_now(self) -> tuple[Tensor, Tensor]:
        """(3, 3) Å, zeros along axes that are not periodic, and which are (3,) bool."""
        values, periodic = self.functions.box()
        if values != self._box:
            lower, upper, (xy, yz, xz) = values[:3], values[3:6], values[6:]
            a, b, c = (high - low for low, high in zip(lower, upper, strict=True))
            cell = torch.tensor([[a, 0.0, 0.0], [xy, b, 0.0], [xz, yz, c]], dtype=torch.float64)
            self._periodic = torch.tensor(periodic)
            self._cell = cell * self._periodic[:, None] * self.units.length
            self._box = values
        return self._cell, self._periodic

    def _give_totals(self, out: dict[str, Tensor]) -> None:
        """Energy and virial of the whole: always, since fixes and variables may ask for them without saying so before."""
        virial = 0.5 * (out["virial"][0] + out["virial"][0].T)
        totals = torch.cat([out["energy"], virial[VOIGT]]).detach()
        if self.transport.size > 1:
            totals = self.transport.all_reduce(totals)
        values = totals.numpy() / self.units.energy
        if not np.isfinite(values).all():
            raise InputError(f"energy and virial (xx yy zz xy xz yz) of the system are {totals.tolist()} eV: expected numbers")
        self.functions.set_energy(self.fix, values[0])
        self.functions.set_virial(self.fix, np.ascontiguousarray(values[1:]))

    def _give_atomic(self, out: dict[str, Tensor], energies: bool, virials: bool) -> None:
        if energies:
            self.functions.set_energies(self.fix, out["atomic_energy"].detach().numpy() / self.units.energy)
        if virials:
            half = out["atomic_virial"].detach()
            rows = (0.5 * (half + half.transpose(1, 2)))[:, VOIGT[0], VOIGT[1]]
            self.functions.set_virials(self.fix, np.ascontiguousarray(rows.numpy() / self.units.energy))


def _not_finite(what: str, rows: np.ndarray, ids: np.ndarray, unit: str) -> InputError:
    """The error that names the first atom whose row is no number."""
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    where = (
        f"the {what} of the atom with id {ids[bad[0]]} is {rows[bad[0]].tolist()} {unit}" if len(bad) else f"{what}s overflow"
    )
    return InputError(
        f"{where}: the structure has left what the potential knows (atoms too close, time step too long), or the model is "
        "broken"
    )


def fill_with_nan(n_local: int, forces: int) -> None:
    """Forces that nobody can take for forces."""
    if n_local and (first := ctypes.c_void_p.from_address(forces).value):
        view(first, 3 * n_local, np.dtype(np.float64))[:] = math.nan
