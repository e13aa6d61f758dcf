"""L-BFGS: quasi-Newton steps from the last displacements and changes of the forces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
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

    steps: Rows
    """(n_atoms, memory, 3) and (n_systems, memory, 3, 3): displacements s."""
    changes: Rows
    """The same shapes: changes y of the gradient."""
    inverse_curvature: Tensor
    """(n_systems, memory): 1 / (y · s)."""

    def pair(self, age: int) -> tuple[Rows, Rows, Tensor]:
        """s, y and 1 / (y · s) of one age."""
        return _at(self.steps, age), _at(self.changes, age), self.inverse_curvature[:, age]


def pushed(history: History, step: Rows, change: Rows, of: Segments) -> History:
    """The history with one pair more; the oldest of a full one goes.

    As in ASE a pair counts whatever the sign of its curvature y · s. One without curvature, where ASE divides by zero, has no effect.
    """
    curvature = dot(change, step, of)
    inverse = torch.where(curvature == 0, 0.0, 1.0 / curvature)
    return History(
        _with_newest(history.steps, step),
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
    atom_state: ClassVar[frozenset[str]] = frozenset({"steps_made", "changes", "last_step", "last_forces"})

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
            "steps_made": atoms.new_zeros(len(atoms), memory, 3),
            "changes": atoms.new_zeros(len(atoms), memory, 3),
            "last_step": torch.zeros_like(atoms),
            "last_forces": torch.zeros_like(atoms),
            "inverse_curvature": atoms.new_zeros(len(cells), memory),
            "n_made": torch.zeros(len(cells), dtype=torch.int64, device=batch.device),
        }
        if cell := self.cell.start(batch):
            state |= cell | {
                "cell_steps_made": atoms.new_zeros(len(cells), memory, 3, 3),
                "cell_changes": atoms.new_zeros(len(cells), memory, 3, 3),
                "last_cell": torch.zeros_like(cells),
                "last_cell_forces": torch.zeros_like(cells),
            }
        return state

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems whose cell cannot change, where it should."""
        return self.cell.unfit(batch)
