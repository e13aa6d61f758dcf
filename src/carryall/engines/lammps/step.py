"""One force evaluation: LAMMPS' atoms of this rank in, forces, energy and virial out."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from carryall.engines.lammps.atoms import NOT_FINITE, OTHER_IDS, OTHER_TYPES, AtomReader, not_finite
from carryall.engines.lammps.capi import LammpsFunctions
from carryall.engines.lammps.checks import check_special
from carryall.engines.lammps.edges import EdgeReader, check_complete
from carryall.engines.lammps.forces import ForceWriter, write_own
from carryall.engines.lammps.units import LammpsUnits
from carryall.engines.rank_part import Part, evaluate_part, part_of_rank
from carryall.errors import InputError
from carryall.exchange import Exchange, Transport, plan_from_ids
from carryall.graph.potential import Potential

VOIGT = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
"""Rows and columns of xx yy zz xy xz yz."""
ROWS, COLUMNS = [row for row, _ in VOIGT], [column for _, column in VOIGT]
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
        self.atoms = AtomReader(functions, units.length)
        self._changed = 0
        self._exchange: Exchange | None = None
        self._atom_types = torch.empty(0, dtype=torch.int64)
        self._box = b""
        self._cell = torch.zeros(3, 3, dtype=torch.float64)
        self._periodic = torch.ones(3, dtype=torch.bool)
        self._kept: tuple[Part, ForceWriter] | None = None
        self._virial = (ctypes.c_double * 6)()

    def evaluate(self, step: int, n_local: int, ids: int, x: int, forces: int) -> None:
        """Write the forces of the own atoms, and energies and virials where the step asks for them; collective."""
        functions, atoms = self.functions, self.atoms
        check_special(functions)
        found = atoms.read(n_local, ids, x)
        # kept until what depends on it is made, which an error may put off to a later run
        self._changed |= found & ~NOT_FINITE
        if found & NOT_FINITE:
            raise not_finite("position", atoms.positions.numpy(), atoms.ids, "Å")
        part, writer = self._part_now(self._changed)
        self._changed = 0
        edges = self.reader.read(atoms.positions, atoms.ids, n_local)
        if self.check_lists:
            check_complete(edges, atoms.positions, atoms.ids, self.reader.limit)
            self.check_lists = False
        by_atom = functions.asked("vflag_atom", step)
        graph = part.graph(atoms.positions, *edges)
        if by_atom:
            out = evaluate_part(self.potential, graph, atomic_virial="half")
            write_own(out["forces"], self.units.force, atoms.ids, forces)
        else:
            # what evaluate_part does, without the cost of some twenty torch calls
            out = self.potential(graph)
            writer.write(out["forces"], atoms.ids, forces)
        self._give_totals(out)
        self._give_atomic(out, functions.asked("eflag_atom", step), by_atom)
        self.n_calls += 1

    def _part_now(self, changed: int) -> tuple[Part, ForceWriter]:
        """What stays of a step, made anew when atoms of any rank, their types or the box are others. Collective."""
        exchange, box = self._exchange_for(bool(changed & OTHER_IDS)), self.functions.box_bytes()
        kept = self._kept
        if kept is not None and kept[0].exchange is exchange and box == self._box and not changed & OTHER_TYPES:
            return kept
        if changed & OTHER_TYPES:
            self._atom_types = self.type_table[self.atoms.types.long()]
        if box != self._box:
            self._box = box
            self._read_box()
        part = part_of_rank(self._atom_types, self._cell, exchange, self._periodic)
        # under a barostat the box is another in each step
        if kept is None or kept[0].exchange is not exchange:
            writer = ForceWriter(exchange.plan, self.transport, self.units.force)
        else:
            writer = kept[1]
        self._kept = part, writer
        return self._kept

    def _exchange_for(self, changed: bool) -> Exchange:
        """The exchange of these atoms, a new one when those of any rank have changed."""
        if self.transport.size > 1:
            said = int(self.transport.all_reduce(torch.tensor(changed + WISH * self.stop_wanted)))
            changed, wishes = bool(said % WISH), said // WISH
        else:
            wishes = int(self.stop_wanted)
        if wishes and not self.stopped:
            self.stopped = True
            self.functions.stop()
        if changed or self._exchange is None:
            ids, n_local = torch.from_numpy(self.atoms.ids.astype(np.int64)), self.atoms.n_local
            plan = plan_from_ids(ids[:n_local], ids[n_local:], self.transport)
            self._exchange = Exchange(plan, self.transport)
            self.n_plans += 1
        return self._exchange

    def _read_box(self) -> None:
        """The cell (3, 3) Å, zeros along axes that are not periodic, and which are (3,) bool."""
        values, periodic = self.functions.box()
        lower, upper, (xy, yz, xz) = values[:3], values[3:6], values[6:]
        a, b, c = (high - low for low, high in zip(lower, upper, strict=True))
        cell = torch.tensor([[a, 0.0, 0.0], [xy, b, 0.0], [xz, yz, c]], dtype=torch.float64)
        self._periodic = torch.tensor(periodic)
        self._cell = cell * self._periodic[:, None] * self.units.length

    def _give_totals(self, out: dict[str, Tensor]) -> None:
        """Energy and virial of the whole: always, since fixes and variables may ask for them without saying so before."""
        (energy,), (w,) = out["energy"].tolist(), out["virial"].tolist()
        totals = [energy, *(0.5 * (w[row][column] + w[column][row]) for row, column in VOIGT)]
        if self.transport.size > 1:
            totals = self.transport.all_reduce(torch.tensor(totals, dtype=torch.float64)).tolist()
        if not all(map(math.isfinite, totals)):
            raise InputError(f"energy and virial (xx yy zz xy xz yz) of the system are {totals} eV: expected numbers")
        energy, *self._virial[:] = [one / self.units.energy for one in totals]
        self.functions.set_energy(self.fix, energy)
        self.functions.set_virial(self.fix, self._virial)

    def _give_atomic(self, out: dict[str, Tensor], energies: bool, virials: bool) -> None:
        if energies:
            self.functions.set_energies(self.fix, out["atomic_energy"].detach().numpy() / self.units.energy)
        if virials:
            half = out["atomic_virial"].detach()
            rows = (0.5 * (half + half.transpose(1, 2)))[:, ROWS, COLUMNS]
            self.functions.set_virials(self.fix, np.ascontiguousarray(rows.numpy() / self.units.energy))
