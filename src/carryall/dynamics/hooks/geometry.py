"""Hooks that write the same structure in other coordinates: energies stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.constraints.averages import inverse_of
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.hooks.measures import own_steps
from carryall.dynamics.status import atom_rows, keep_frozen
from carryall.dynamics.thermo import mobile
from carryall.errors import InputError
from carryall.graph.neighbor_graph import rows_times

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine

VECTORS = ("positions", "velocities", "forces", "magnetic_forces")
TENSORS = ("virial", "stress")
LOWER = 1e-12
"""A cell is lower-triangular when nothing above its diagonal exceeds this part of its largest entry."""


class WrapPositions:
    """Brings atoms back into the cell along periodic axes; energies and forces stay as they are, no model call is made.

    Not for optimizers that remember positions, and not where the path of an atom is wanted: `frequency=1000` is often enough.
    """

    stage = HookStageEnum.AFTER_STEP

    def __init__(self, frequency: int = 1) -> None:
        self.frequency = frequency

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Wrap the running systems."""
        whole = lattice_shifts(batch)
        mask = dynamics.running(batch)
        if mask is not None:
            whole = whole * atom_rows(mask, batch)[:, None]
        if not bool((whole != 0).any()):
            return
        current = dynamics.forces_are_current(batch)
        moved = batch.positions - rows_times(whole, batch.cell, batch.system)
        batch.positions = torch.where((whole != 0).any(1)[:, None], moved, batch.positions)
        if current:
            dynamics.mark_forces_current(batch)


def lattice_shifts(batch: Batch) -> Tensor:
    """(n_atoms, 3) whole numbers of cells by which atoms are outside of [0, 1) along periodic axes."""
    # The pseudo-inverse gives the coordinates along the vectors that there are, when some are zero.
    inverse = inverse_of(batch.cell) if bool((batch.volume > 0).all()) else torch.linalg.pinv(batch.cell)
    fractional = rows_times(batch.positions, inverse, batch.system)
    return torch.where(atom_rows(batch.pbc, batch), torch.floor(fractional), 0.0)


class AlignCell:
    """Turns each system, once, before its first step, so that its cell is lower-triangular with a positive diagonal.

    Positions, velocities, forces, virial and stress are turned with the cell; the state of the dynamics, which may have vectors
    too, starts anew. A left-handed cell is turned, never mirrored, so that its last diagonal entry is negative. No model call
    is made; the potential must not depend on directions, such as an external field's. Systems with atoms that are fixed along
    some axes only cannot be turned: InputError.
    """

    stage = HookStageEnum.BEFORE_STEP
    frequency = 1

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Turn systems that have not moved yet."""
        new = own_steps(batch, dynamics) == 0
        mask = dynamics.running(batch)
        new = new if mask is None else new & mask
        if not bool(new.any()):
            return
        above = torch.stack([batch.cell[:, 0, 1], batch.cell[:, 0, 2], batch.cell[:, 1, 2]], 1).abs().amax(1)
        turn = new & (above > LOWER * batch.cell.abs().amax((1, 2)))
        turn = turn | (new & ((batch.cell[:, 0, 0] < 0) | (batch.cell[:, 1, 1] < 0)))
        if bool(turn.any()):
            self._turn(batch, dynamics, turn)

    def _turn(self, batch: Batch, dynamics: Engine, turn: Tensor) -> None:
        _check_free(batch, turn)
        rotation, rows = rotations(batch.cell, turn), atom_rows(turn, batch)
        current = dynamics.forces_are_current(batch)
        for key in VECTORS:
            if key in batch:
                batch.set(key, keep_frozen(rows, rows_times(batch.get(key), rotation, batch.system), batch.get(key)))
        for key in TENSORS:
            if key in batch:
                turned = rotation.transpose(1, 2) @ batch.get(key) @ rotation
                batch.set(key, keep_frozen(turn, turned, batch.get(key)))
        upper = torch.ones(3, 3, dtype=torch.bool, device=batch.device).triu(1)
        batch.cell = keep_frozen(turn, (batch.cell @ rotation).masked_fill(upper, 0.0), batch.cell)
        for part in dynamics.parts:
            part.enter(batch, turn)
        if current:
            dynamics.mark_forces_current(batch)


def rotations(cell: Tensor, turn: Tensor) -> Tensor:
    """(n_systems, 3, 3) rotations Q that make `cell @ Q` lower-triangular; the identity where not `turn`."""
    found = torch.eye(3, dtype=cell.dtype, device=cell.device).repeat(len(cell), 1, 1)
    for index in turn.nonzero().squeeze(1).tolist():
        # A^T = Q R gives A Q = R^T; signs make the first two diagonal entries positive, the last one what keeps it a rotation
        q, r = torch.linalg.qr(cell[index].T)
        signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(cell.dtype)
        q = q * signs
        q[:, 2] = q[:, 2] * torch.linalg.det(q).sign()
        found[index] = q
    return found


def _check_free(batch: Batch, turn: Tensor) -> None:
    moves = mobile(batch)
    if moves is not None and bool((atom_rows(turn, batch) & moves.any(1) & ~moves.all(1)).any()):
        raise InputError(
            "AlignCell cannot turn systems with atoms that are fixed along some axes only: fix them along all, or none"
        )
