"""L-BFGS: quasi-Newton steps from the last displacements and changes of the forces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.optimizers.cell_filters import Point
from carryall.dynamics.optimizers.cell_settings import OptimizerOptions
from carryall.dynamics.optimizers.rows import Rows, Segments, added, dot, longest, scaled, subtracted
from carryall.dynamics.optimizers.stepping import split_options, write_step
from carryall.errors import InputError
from carryall.graph.potential import Potential

LARGEST_STEP = 1.0
"""Å; ASE refuses more."""


@dataclass(frozen=True)
class LBFGSSettings:
    """ASE's names and values. maxstep in Å; alpha, the first guess of the curvature, in eV/Å²."""

    maxstep: float = 0.2
    memory: int = 100
    damping: float = 1.0
    alpha: float = 70.0

    def __post_init__(self) -> None:
        for name in ("maxstep", "damping", "alpha"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} of LBFGS must be positive, got {getattr(self, name)!r}")
        if self.maxstep > LARGEST_STEP:
            raise InputError(f"maxstep of LBFGS must be at most {LARGEST_STEP:g} Å, got {self.maxstep:g}")
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 1:
            raise InputError(f"memory of LBFGS must be a positive integer, got {self.memory!r}")


@dataclass(frozen=True, eq=False)
class History:
    """Pairs of each system, the newest first; zeros where a system has had fewer."""

    displacements: Rows
    """(n_atoms, memory, 3) and (n_systems, memory, 3, 3): displacements s."""
    changes: Rows
    """The same shapes: changes y of the gradient."""
    inverse_curvature: Tensor
    """(n_systems, memory): 1 / (y · s)."""

    def pair(self, age: int) -> tuple[Rows, Rows, Tensor]:
        """s, y and 1 / (y · s) of one age."""
        return _at(self.displacements, age), _at(self.changes, age), self.inverse_curvature[:, age]


def pushed(history: History, step: Rows, change: Rows, of: Segments) -> History:
    """The history with one pair more; the oldest of a full one goes.

    As in ASE a pair counts whatever the sign of its curvature y · s. One without curvature, where ASE divides by zero, has no
    effect.
    """
    curvature = dot(change, step, of)
    inverse = torch.where(curvature == 0, 0.0, 1.0 / curvature)
    return History(
        _with_newest(history.displacements, step),
        _with_newest(history.changes, change),
        torch.cat([inverse[:, None], history.inverse_curvature[:, :-1]], 1),
    )


def quasi_newton_direction(history: History, forces: Rows, depth: int, alpha: float, of: Segments) -> Rows:
    """The inverse Hessian of the pairs times the forces: Nocedal, Math. Comput. 35, 773 (1980), from 1 / alpha at first.

    depth: pairs of the system that has most; those that a system lacks are zero and change nothing.
    """
    direction, weights = forces, []
    for age in range(depth):
        step, change, inverse = history.pair(age)
        weight = inverse * dot(step, direction, of)
        direction = subtracted(direction, scaled(change, weight, of))
        weights.append(weight)
    direction = Rows(direction.atoms / alpha, None if direction.cell is None else direction.cell / alpha)
    for age in reversed(range(depth)):
        step, change, inverse = history.pair(age)
        weight = weights[age] - inverse * dot(change, direction, of)
        direction = added(direction, scaled(step, weight, of))
    return direction


def bounded_step(direction: Rows, settings: LBFGSSettings, of: Segments) -> Rows:
    """The direction, all of a system made shorter alike where its longest row exceeds maxstep; then damped."""
    reach = (settings.maxstep / longest(direction, of)).clamp_(max=1.0).mul_(settings.damping)
    return scaled(direction, reach, of)


class LBFGS(BaseDynamics):
    """L-BFGS, every system with its own history; step for step the same as ASE's without line search, with its cell filters.

    Keeps `memory` pairs of each system, 48 bytes an atom and pair. `maxstep` bounds the longest displacement of an atom. See
    `OptimizerOptions` for the cell.
    """

    prefix = "lbfgs"
    atom_state: ClassVar[frozenset[str]] = frozenset({"displacements", "changes", "last_step", "last_forces"})

    def __init__(
        self,
        model: Potential,
        maxstep: float = LBFGSSettings.maxstep,
        memory: int = LBFGSSettings.memory,
        damping: float = LBFGSSettings.damping,
        alpha: float = LBFGSSettings.alpha,
        **options: Unpack[OptimizerOptions],
    ) -> None:
        self.settings = LBFGSSettings(maxstep, memory, damping, alpha)
        self.cell, rest = split_options(options)
        self.__needs_keys__ = self.__needs_keys__ | self.cell.needs  # type: ignore[misc]
        self.__provides_keys__ = self.__provides_keys__ | self.cell.provides  # type: ignore[misc]
        super().__init__(model, **rest)

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """An empty history: what it holds is listed at `History`; n_made (n_systems,) counts the steps since the start."""
        memory, atoms, cells = self.settings.memory, batch.positions, batch.cell
        state = {
            "displacements": atoms.new_zeros(len(atoms), memory, 3),
            "changes": atoms.new_zeros(len(atoms), memory, 3),
            "last_step": torch.zeros_like(atoms),
            "last_forces": torch.zeros_like(atoms),
            "inverse_curvature": atoms.new_zeros(len(cells), memory),
            "n_made": torch.zeros(len(cells), dtype=torch.int64, device=batch.device),
        }
        if cell := self.cell.start(batch):
            state |= cell | {
                "cell_displacements": atoms.new_zeros(len(cells), memory, 3, 3),
                "cell_changes": atoms.new_zeros(len(cells), memory, 3, 3),
                "last_cell": torch.zeros_like(cells),
                "last_cell_forces": torch.zeros_like(cells),
            }
        return state

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems whose cell cannot change, where it should."""
        return self.cell.unfit(batch)

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """The whole step."""
        of, n_made = Segments.of(batch), self._read(batch, "n_made")
        point = self.cell.point(batch, self.key)
        history = self._pushed(batch, point, n_made, of)
        counted = n_made if mask is None else n_made * mask
        depth = min(int(counted.max()), self.settings.memory)
        direction = quasi_newton_direction(history, point.forces, depth, self.settings.alpha, of)
        moved = self.cell.moved(batch, point, bounded_step(direction, self.settings, of), self.key)
        state = {
            "displacements": history.displacements.atoms,
            "changes": history.changes.atoms,
            "last_step": moved.atom_steps,
            "last_forces": point.forces.atoms,
            "inverse_curvature": history.inverse_curvature,
            "n_made": n_made + 1,
        }
        cells = {
            "cell_displacements": history.displacements.cell,
            "cell_changes": history.changes.cell,
            "last_cell": point.cell_coordinates,
            "last_cell_forces": point.forces.cell,
        }
        state |= {name: value for name, value in cells.items() if value is not None}
        write_step(self, batch, mask, moved, state)

    def _pushed(self, batch: Batch, point: Point, n_made: Tensor, of: Segments) -> History:
        """The history with the pair of the last step; a system that has made none gets one without curvature."""
        coordinates = point.cell_coordinates
        if coordinates is None:
            names: tuple[str | None, ...] = (None,) * 3
            cell_step = None
        else:
            names = ("last_cell_forces", "cell_displacements", "cell_changes")
            cell_step = (coordinates - self._read(batch, "last_cell")) * (n_made > 0)[:, None, None]
        forces, displacements, changes = (
            Rows(self._read(batch, name), None if cell is None else self._read(batch, cell))
            for name, cell in zip(("last_forces", "displacements", "changes"), names, strict=True)
        )
        history = History(displacements, changes, self._read(batch, "inverse_curvature"))
        # the gradient is minus the force
        return pushed(history, Rows(self._read(batch, "last_step"), cell_step), subtracted(forces, point.forces), of)

    def _read(self, batch: Batch, name: str) -> Tensor:
        return batch.get(self.key(name))

    def after_forces(self, batch: Batch, mask: Tensor | None) -> None:
        """Write `fmax` of the generalised forces where the cell relaxes."""
        self.cell.write_fmax(batch, mask, self.key)

    def describe(self) -> dict[str, Any]:
        """Settings that differ from the defaults."""
        values, defaults = vars(self.settings), vars(LBFGSSettings())
        return {name: value for name, value in values.items() if value != defaults[name]} | self.cell.describe()


def _at(rows: Rows, age: int) -> Rows:
    return Rows(rows.atoms[:, age], None if rows.cell is None else rows.cell[:, age])


def _with_newest(rows: Rows, newest: Rows) -> Rows:
    atoms = torch.cat([newest.atoms[:, None], rows.atoms[:, :-1]], 1)
    if rows.cell is None or newest.cell is None:
        return Rows(atoms)
    return Rows(atoms, torch.cat([newest.cell[:, None], rows.cell[:, :-1]], 1))
