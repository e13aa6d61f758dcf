"""FIRE: the fast inertial relaxation engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.optimizers.cell_settings import OptimizerOptions
from carryall.dynamics.optimizers.rows import Rows, Segments, added, dot, scaled
from carryall.dynamics.optimizers.stepping import split_options, write_step
from carryall.errors import InputError
from carryall.graph.potential import Potential

SMALLEST = 1e-200
"""In place of a squared force of zero."""


@dataclass(frozen=True)
class FireSettings:
    """ASE's names and values. dt and dtmax in Å sqrt(amu / eV), with all masses 1 amu; maxstep in Å."""

    dt: float = 0.1
    maxstep: float = 0.2
    dtmax: float = 1.0
    Nmin: int = 5
    finc: float = 1.1
    fdec: float = 0.5
    astart: float = 0.1
    fa: float = 0.99

    def __post_init__(self) -> None:
        for name in ("dt", "maxstep", "dtmax", "finc", "fdec", "astart", "fa"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} of FIRE must be positive, got {getattr(self, name)!r}")


class FireState(NamedTuple):
    """What FIRE remembers of each system."""

    velocities: Rows
    dt: Tensor
    """(n_systems,)."""
    alpha: Tensor
    """(n_systems,), how much of the velocity turns towards the force."""
    n_positive: Tensor
    """(n_systems,) int64 steps downhill since the last stop; -1 before the first step."""


def fire_step(state: FireState, forces: Rows, of: Segments, settings: FireSettings) -> tuple[FireState, Rows]:
    """The next state and the displacement.

    Bitzek, Koskinen, Gähler, Moseler, Gumbsch, Phys. Rev. Lett. 97, 170201 (2006), with the rules of ASE 3.29: velocities turn
    by the alpha of the step before, and `maxstep` bounds the length of a system's whole displacement.
    """
    velocities, dt, alpha = state.velocities, state.dt, state.alpha
    # before the first step (-1) there is no velocity that could be stopped
    downhill = dot(forces, velocities, of) > state.n_positive.clamp(max=0)
    grow = downhill & (state.n_positive > settings.Nmin)
    turn = dot(velocities, velocities, of).div_(dot(forces, forces, of).clamp_(min=SMALLEST)).sqrt_().mul_(alpha)
    keep = (1.0 - alpha) * downhill
    dt = torch.where(grow, (dt * settings.finc).clamp_(max=settings.dtmax), torch.where(downhill, dt, dt * settings.fdec))
    alpha = torch.where(grow, alpha * settings.fa, torch.where(downhill, alpha, settings.astart))
    n_positive = (state.n_positive + 1) * downhill
    pull = turn.mul_(downhill).add_(dt)
    velocities = added(scaled(velocities, keep, of), scaled(forces, pull, of))
    length = dot(velocities, velocities, of).sqrt_().mul_(dt)
    reach = dt * (settings.maxstep / length).clamp_(max=1.0)
    return FireState(velocities, dt, alpha, n_positive), scaled(velocities, reach, of)


class FIRE(BaseDynamics):
    """FIRE, every system with its own time step, mixing and counters; step for step the same as ASE's, with its cell filters.

    As in ASE, `maxstep` bounds the length of the whole displacement of a system. Its velocities are a key of their own
    (`fire_velocities`); those of the batch are left alone. See `OptimizerOptions` for the cell.
    """

    prefix = "fire"
    atom_state: ClassVar[frozenset[str]] = frozenset({"velocities"})

    def __init__(
        self,
        model: Potential,
        dt: float = FireSettings.dt,
        maxstep: float = FireSettings.maxstep,
        dtmax: float = FireSettings.dtmax,
        Nmin: int = FireSettings.Nmin,
        finc: float = FireSettings.finc,
        fdec: float = FireSettings.fdec,
        astart: float = FireSettings.astart,
        fa: float = FireSettings.fa,
        **options: Unpack[OptimizerOptions],
    ) -> None:
        self.settings = FireSettings(dt, maxstep, dtmax, Nmin, finc, fdec, astart, fa)
        self.cell, rest = split_options(options)
        self.__needs_keys__ = self.__needs_keys__ | self.cell.needs  # type: ignore[misc]
        self.__provides_keys__ = self.__provides_keys__ | self.cell.provides  # type: ignore[misc]
        super().__init__(model, **rest)

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """velocities, dt, alpha, n_positive of a start; with a cell filter also cell_velocities and where the cell started."""
        row = torch.ones(batch.n_systems, dtype=torch.float64, device=batch.device)
        state = {
            "velocities": torch.zeros_like(batch.positions),
            "dt": row * self.settings.dt,
            "alpha": row * self.settings.astart,
            "n_positive": torch.full_like(row, -1, dtype=torch.int64),
        }
        if cell := self.cell.start(batch):
            state |= cell | {"cell_velocities": torch.zeros_like(batch.cell)}
        return state

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems whose cell cannot change, where it should."""
        return self.cell.unfit(batch)

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """The whole step: FIRE moves by the forces that are there."""
        point = self.cell.point(batch, self.key)
        cell_velocities = None if point.forces.cell is None else batch.get(self.key("cell_velocities"))
        velocities = Rows(batch.get(self.key("velocities")), cell_velocities)
        old = FireState(velocities, *(batch.get(self.key(name)) for name in ("dt", "alpha", "n_positive")))
        new, step = fire_step(old, point.forces, Segments.of(batch), self.settings)
        state = {
            "velocities": new.velocities.atoms,
            "cell_velocities": new.velocities.cell,
            "dt": new.dt,
            "alpha": new.alpha,
            "n_positive": new.n_positive,
        }
        write_step(self, batch, mask, self.cell.moved(batch, point, step, self.key), state)

    def after_forces(self, batch: Batch, mask: Tensor | None) -> None:
        """Write `fmax` of the generalised forces where the cell relaxes."""
        self.cell.write_fmax(batch, mask, self.key)

    def describe(self) -> dict[str, Any]:
        """Settings that differ from the defaults."""
        values, defaults = vars(self.settings), vars(FireSettings())
        return {name: value for name, value in values.items() if value != defaults[name]} | self.cell.describe()
