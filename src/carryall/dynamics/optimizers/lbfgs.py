"""L-BFGS: quasi-Newton steps from the last displacements and changes of the forces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.optimizers.cell_filters import Point
from carryall.dynamics.optimizers.cell_settings import OptimizerOptions
from carryall.dynamics.optimizers.rows import Rows, Segments, added, dot, longest, scaled, subtracted
from carryall.dynamics.optimizers.stepping import split_options, write_step
from carryall.dynamics.status import atom_rows
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


class History(NamedTuple):
    """Pairs of each system, the newest first; zeros where a system has had fewer."""

    displacements: Rows
    """s: (n_atoms, memory, 3) and, for the cell, (n_systems, memory, 3, 3)."""
    changes: Rows
    """y, changes of the gradient: the same shapes."""
    inverse_curvature: Tensor
    """(n_systems, memory): 1 / (y · s)."""


class Who(NamedTuple):
    """The systems that get a pair, and how many pairs there are at most."""

    systems: Tensor | None
    """(n_systems,) bool; None for all."""
    atoms: Tensor | None
    """(n_atoms,) bool; None for all."""
    depth: int
    """No system has more pairs than this, the new one counted."""


def pushed(history: History, step: Rows, change: Rows, who: Who, of: Segments) -> History:
    """The history with one pair more; the oldest of a full one goes.

    As in ASE a pair counts whatever the sign of its curvature y · s. One without curvature, where ASE divides by zero, has no
    effect.
    """
    curvature = dot(change, step, of)
    inverse = torch.where(curvature == 0, 0.0, 1.0 / curvature)
    return History(
        _with_newest(history.displacements, step, who),
        _with_newest(history.changes, change, who),
        _shifted(history.inverse_curvature, inverse, who.systems, who.depth),
    )


def quasi_newton_direction(history: History, forces: Rows, depth: int, alpha: float, of: Segments) -> Rows:
    """The inverse Hessian of the pairs times the forces: Nocedal, Math. Comput. 35, 773 (1980), from 1 / alpha at first.

    depth: pairs of the system that has most; those that a system lacks are zero and change nothing.
    """
    steps, changes = _by_age(history.displacements, depth), _by_age(history.changes, depth)
    inverses = history.inverse_curvature[:, :depth].unbind(1)
    direction, weights = forces, []
    for step, change, inverse in zip(steps, changes, inverses, strict=True):
        weights.append(inverse * dot(step, direction, of))
        direction = subtracted(direction, scaled(change, weights[-1], of))
    direction = Rows(direction.atoms / alpha, None if direction.cell is None else direction.cell / alpha)
    for step, change, inverse, weight in zip(steps[::-1], changes[::-1], inverses[::-1], weights[::-1], strict=True):
        direction = added(direction, scaled(step, weight - inverse * dot(change, direction, of), of))
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
            "displacements": _untouched_zeros(atoms, (memory, len(atoms), 3)).transpose(0, 1),
            "changes": _untouched_zeros(atoms, (memory, len(atoms), 3)).transpose(0, 1),
            "last_step": torch.zeros_like(atoms),
            "last_forces": torch.zeros_like(atoms),
            "inverse_curvature": cells.new_zeros(memory, len(cells)).T,
            "n_made": torch.zeros(len(cells), dtype=torch.int64, device=batch.device),
        }
        if cell := self.cell.start(batch):
            state |= cell | {
                "cell_displacements": _untouched_zeros(cells, (memory, len(cells), 3, 3)).transpose(0, 1),
                "cell_changes": _untouched_zeros(cells, (memory, len(cells), 3, 3)).transpose(0, 1),
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
        moving = n_made if mask is None else n_made * mask
        most, made = torch.stack((n_made.max(), moving.max())).tolist()
        memory = self.settings.memory
        who = Who(mask, None if mask is None else atom_rows(mask, batch), min(most + 1, memory))
        history = self._pushed(batch, point, n_made, who, of)
        direction = quasi_newton_direction(history, point.forces, min(made, memory), self.settings.alpha, of)
        moved = self.cell.moved(batch, point, bounded_step(direction, self.settings, of), self.key)
        state = {
            "last_step": moved.atom_steps,
            "last_forces": point.forces.atoms,
            "last_cell": point.cell_coordinates,
            "last_cell_forces": point.forces.cell,
            "n_made": n_made + 1,
        }
        write_step(self, batch, mask, moved, state)
        # a history keeps what does not move by itself
        kept = {
            "displacements": history.displacements.atoms,
            "changes": history.changes.atoms,
            "inverse_curvature": history.inverse_curvature,
            "cell_displacements": history.displacements.cell,
            "cell_changes": history.changes.cell,
        }
        for name, value in kept.items():
            if value is not None:
                batch.set(self.key(name), value)

    def _pushed(self, batch: Batch, point: Point, n_made: Tensor, who: Who, of: Segments) -> History:
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
        return pushed(history, Rows(self._read(batch, "last_step"), cell_step), subtracted(forces, point.forces), who, of)

    def _read(self, batch: Batch, name: str) -> Tensor:
        return batch.get(self.key(name))

    def after_forces(self, batch: Batch, mask: Tensor | None) -> None:
        """Write `fmax` of the generalised forces where the cell relaxes."""
        self.cell.write_fmax(batch, mask, self.key)

    def describe(self) -> dict[str, Any]:
        """Settings that differ from the defaults."""
        values, defaults = vars(self.settings), vars(LBFGSSettings())
        return {name: value for name, value in values.items() if value != defaults[name]} | self.cell.describe()


def _by_age(rows: Rows, depth: int) -> list[Rows]:
    atoms = rows.atoms[:, :depth].unbind(1)
    cells = (None,) * depth if rows.cell is None else rows.cell[:, :depth].unbind(1)
    return [Rows(*one) for one in zip(atoms, cells, strict=True)]


def _with_newest(rows: Rows, newest: Rows, who: Who) -> Rows:
    atoms = _shifted(rows.atoms, newest.atoms, who.atoms, who.depth)
    if rows.cell is None or newest.cell is None:
        return Rows(atoms)
    return Rows(atoms, _shifted(rows.cell, newest.cell, who.systems, who.depth))


def _shifted(old: Tensor, newest: Tensor, mask: Tensor | None, depth: int) -> Tensor:
    """`old` (rows, memory, ...) one place on, with `newest` (rows, ...) in front, where `mask` (rows,) is true; else `old`.

    In memory one age comes after the other, whole: what no system has reached yet is not touched, and an age is read in a row.
    """
    pages = old.transpose(0, 1)
    new = _untouched_zeros(old, pages.shape)
    if mask is None:
        new[0], new[1:depth] = newest, pages[: depth - 1]
    else:
        rows = mask.reshape(-1, *[1] * (newest.dim() - 1)).expand(newest.shape).contiguous()
        new[0] = torch.where(rows, newest, pages[0])
        torch.where(rows, pages[: depth - 1], pages[1:depth], out=new[1:depth])
    return new.transpose(0, 1)


def _untouched_zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros that take no memory before they are written to: the system's, which torch would fill by hand."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(shape, dtype=np.float64))
