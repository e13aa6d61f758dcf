"""Forces of a rank's own atoms into LAMMPS' array, with what ghosts got, here and on other ranks."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from carryall.engines.lammps.atoms import not_finite
from carryall.engines.lammps.capi import rows_view
from carryall.errors import InputError
from carryall.exchange import ExchangePlan, Transport
from carryall.native import library


class ForceWriter:
    """Adds up and writes the forces of one plan's atoms; buffers and messages are made once for it."""

    def __init__(self, plan: ExchangePlan, transport: Transport, unit: float) -> None:
        """`unit`: eV/Å, of LAMMPS' unit of force."""
        self.plan, self.transport, self.unit = plan, transport, unit
        self._native = library()
        self._shape = plan.n_local + plan.n_ghost, 3
        self._sums = torch.zeros(plan.n_local + plan.n_received, 3, dtype=torch.float64)
        self._found = torch.zeros(len(plan.send_row), 3, dtype=torch.float64)
        behind = self._sums[plan.n_local :]
        # what ghosts got goes the way back
        self._sends = [(peer, behind[begin:end].view(torch.uint8)) for peer, begin, end in plan.receives]
        self._receives = [(peer, self._found[begin:end].view(torch.uint8)) for peer, begin, end in plan.sends]
        self._source = plan.source.contiguous()
        self._places = self._source.data_ptr(), self._sums.data_ptr()
        self._more = self._sums.data_ptr(), self._found.data_ptr(), plan.send_row.data_ptr()

    def write(self, forces: Tensor, ids: np.ndarray, place: int) -> None:
        """Forces (n_local + n_ghost, 3) eV/Å to LAMMPS' rows (n_local, 3). Collective.

        InputError where a sum is no number, or where there are not as many rows.
        """
        n_local, n_rows = self.plan.n_local, len(self._sums)
        if forces.shape != self._shape or forces.dtype != torch.float64:
            raise InputError(
                f"the potential returned forces of shape {tuple(forces.shape)} and {forces.dtype}, expected {self._shape} and "
                "torch.float64"
            )
        if self._native is None:
            self._sums.zero_()
            self._sums[:n_local] = forces[:n_local].detach()
            self._sums.index_add_(0, self._source, forces[n_local:].detach())
        else:
            first = forces.contiguous().data_ptr()
            self._native.carryall_lammps_sums(n_local, self.plan.n_ghost, n_rows, first, *self._places)
        if self.transport.size > 1:
            self.transport.send_receive(self._sends, self._receives)
        if n_local and not self._finish(place):
            raise not_finite("force", self._sums[:n_local].numpy(), ids, "eV/Å")

    def _finish(self, place: int) -> bool:
        """Writes; whether all are numbers."""
        n_local, n_found = self.plan.n_local, len(self._found)
        if self._native is None:
            self._sums.index_add_(0, self.plan.send_row, self._found)
            own = self._sums[:n_local].numpy()
            np.divide(own, self.unit, out=rows_view(place, n_local))
            return bool(np.isfinite(own).all())
        out = ctypes.c_void_p.from_address(place).value
        return bool(self._native.carryall_lammps_forces(n_local, n_found, *self._more, self.unit, out))


def write_own(forces: Tensor, unit: float, ids: np.ndarray, place: int) -> None:
    """Forces (n_local, 3) eV/Å that are whole already, to LAMMPS' rows; InputError where one is no number."""
    if not len(forces):
        return
    found = forces.detach().numpy()
    np.divide(found, unit, out=rows_view(place, len(found)))
    if not np.isfinite(found).all():
        raise not_finite("force", found, ids, "eV/Å")
