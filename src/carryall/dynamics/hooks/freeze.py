"""Atoms that do not move for a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.constraints.selection import AtomSelection, Mask, Where
from carryall.dynamics.forces import Snapshot
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.hooks.measures import own_steps
from carryall.dynamics.status import atom_rows
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine


class FreezeAtoms:
    """Keeps positions and velocities of atoms exactly as they are while their system takes its steps `start` to `stop` - 1.

    Which atoms: `indices`, `mask`, `elements` or `where`, as in `FixAtoms`; `where` is asked in every step. Steps are those of
    each system in its stage, so that a system that comes later is frozen as long; stop None: for good. No force acts on frozen
    atoms, so that a relaxation can converge. Their velocities, which they have again afterwards, go on to count in the kinetic
    energy; for atoms that never move, `FixAtoms` counts degrees of freedom right. When a span ends, the forces are evaluated
    once more.
    """

    stages = (HookStageEnum.BEFORE_STEP, HookStageEnum.AFTER_PRE_UPDATE, HookStageEnum.AFTER_POST_UPDATE)
    frequency = 1

    def __init__(
        self,
        indices: Iterable[int] | None = None,
        mask: Mask | None = None,
        elements: Iterable[str | int] | None = None,
        where: Where | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.selection = AtomSelection.of("FreezeAtoms", indices, mask, elements, where)
        whole = all(isinstance(one, int) and not isinstance(one, bool) for one in (start, 0 if stop is None else stop))
        if not whole or start < 0 or (stop is not None and stop <= start):
            raise InputError(f"FreezeAtoms needs whole numbers 0 <= start < stop, got start={start!r} and stop={stop!r}")
        self.start, self.stop = start, stop
        self._held: tuple[Batch, Tensor, Tensor, Tensor | None] | None = None
        """In a step: the batch, its frozen atoms, and positions and velocities that they keep."""
        self._known: tuple[Snapshot, Tensor] | None = None

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Note what frozen atoms have before a step, and give it back after each half."""
        if dynamics.current_hook_stage is HookStageEnum.BEFORE_STEP:
            self._held = self._hold(batch, dynamics)
        elif self._held is not None and self._held[0] is batch:
            _, frozen, positions, velocities = self._held
            if dynamics.current_hook_stage is HookStageEnum.AFTER_PRE_UPDATE:
                batch.positions = torch.where(frozen, positions, batch.positions)
            if velocities is not None:
                batch.velocities = torch.where(frozen, velocities, batch.velocities)
            if dynamics.current_hook_stage is HookStageEnum.AFTER_POST_UPDATE:
                self._held = None

    def on_forces(self, batch: Batch, dynamics: Engine, mask: Tensor | None) -> None:
        """No force on frozen atoms of systems that were evaluated."""
        active = self._active(batch, dynamics, mask)
        if bool(active.any()):
            batch.forces = batch.forces.masked_fill(self._atoms(batch, active), 0.0)

    def _hold(self, batch: Batch, dynamics: Engine) -> tuple[Batch, Tensor, Tensor, Tensor | None] | None:
        running, steps = dynamics.running(batch), own_steps(batch, dynamics)
        ended = torch.zeros_like(steps) > 0 if self.stop is None else steps == self.stop
        if bool((ended if running is None else ended & running).any()):
            # a copy counts as moved: the forces on these atoms are wanted again
            batch.positions = batch.positions.clone()
        active = self._active(batch, dynamics, running)
        if not bool(active.any()):
            return None
        frozen = self._atoms(batch, active)
        batch.forces = batch.forces.masked_fill(frozen, 0.0)
        return batch, frozen, batch.positions, batch.velocities if "velocities" in batch else None

    def _active(self, batch: Batch, dynamics: Engine, mask: Tensor | None) -> Tensor:
        """(n_systems,) bool, systems of `mask` that are in the span."""
        steps = own_steps(batch, dynamics)
        found = steps >= self.start
        if self.stop is not None:
            found = found & (steps < self.stop)
        return found if mask is None else found & mask

    def _atoms(self, batch: Batch, active: Tensor) -> Tensor:
        """(n_atoms, 1) bool."""
        return (self._chosen(batch) & atom_rows(active, batch))[:, None]

    def _chosen(self, batch: Batch) -> Tensor:
        """(n_atoms,) bool, the selection; looked up again when the systems are others, or when a function says which."""
        if self.selection.where is not None:
            return self.selection(batch)
        if self._known is None or not self._known[0].holds(batch.ptr, batch.atomic_numbers):
            self._known = (Snapshot.of(batch.ptr, batch.atomic_numbers), self.selection(batch))
        return self._known[1]
