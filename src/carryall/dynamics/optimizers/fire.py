"""FIRE: the fast inertial relaxation engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics, DynamicsOptions
from carryall.dynamics.status import atom_rows, keep_frozen
from carryall.errors import InputError
from carryall.graph.potential import Potential


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


@dataclass(frozen=True)
class FireState:
    """What FIRE remembers of each system."""

    velocities: Tensor
    """(n_atoms, 3)."""
    dt: Tensor
    """(n_systems,)."""
    alpha: Tensor
    """(n_systems,), how much of the velocity turns towards the force."""
    n_positive: Tensor
    """(n_systems,) int64 steps downhill since the last stop; -1 before the first step."""


def fire_step(state: FireState, forces: Tensor, system: Tensor, settings: FireSettings) -> tuple[FireState, Tensor]:
    """The next state and the displacement (n_atoms, 3), Å; forces (n_atoms, 3), system (n_atoms,).

    Bitzek, Koskinen, Gähler, Moseler, Gumbsch, Phys. Rev. Lett. 97, 170201 (2006), in the order of operations of ASE 3.29.
    """

    def total(a: Tensor, b: Tensor) -> Tensor:
        product = a * b
        rows = product[:, 0] + product[:, 1] + product[:, 2]
        return torch.zeros_like(state.dt).index_add(0, system, rows)

    def to_atoms(value: Tensor) -> Tensor:
        return value.index_select(0, system)[:, None]

    power = total(forces, state.velocities)
    downhill, started = power > 0, state.n_positive >= 0
    fraction = torch.sqrt(total(state.velocities, state.velocities)) / torch.sqrt(total(forces, forces))
    turned = to_atoms(1.0 - state.alpha) * state.velocities + to_atoms(state.alpha * fraction) * forces
    velocities = torch.where(to_atoms(downhill), turned, 0.0)
    grow = downhill & (state.n_positive > settings.Nmin)
    stop = started & ~downhill
    dt = torch.where(grow, (state.dt * settings.finc).clamp(max=settings.dtmax), state.dt)
    dt = torch.where(stop, dt * settings.fdec, dt)
    alpha = torch.where(grow, state.alpha * settings.fa, state.alpha)
    alpha = torch.where(stop, settings.astart, alpha)
    n_positive = torch.where(downhill, state.n_positive + 1, 0)
    velocities = velocities + to_atoms(dt) * forces
    step = to_atoms(dt) * velocities
    length = torch.sqrt(total(step, step))
    scale = torch.where(length > settings.maxstep, settings.maxstep / length, 1.0)
    return FireState(velocities, dt, alpha, n_positive), step * to_atoms(scale)


class FIRE(BaseDynamics):
    """FIRE at fixed cell, every system with its own time step, mixing and counters; step for step the same as ASE's.

    As in ASE, `maxstep` bounds the length of the whole displacement of a system. Its velocities are a key of their own
    (`fire_velocities`); those of the batch are left alone.
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
        **options: Unpack[DynamicsOptions],
    ) -> None:
        super().__init__(model, **options)
        self.settings = FireSettings(dt, maxstep, dtmax, Nmin, finc, fdec, astart, fa)

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """velocities, dt, alpha, n_positive of a start."""
        row = torch.ones(batch.n_systems, dtype=torch.float64, device=batch.device)
        return {
            "velocities": torch.zeros_like(batch.positions),
            "dt": row * self.settings.dt,
            "alpha": row * self.settings.astart,
            "n_positive": torch.full_like(row, -1, dtype=torch.int64),
        }

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """The whole step: FIRE moves by the forces that are there."""
        names = ("velocities", "dt", "alpha", "n_positive")
        old = FireState(*(batch.get(self.key(name)) for name in names))
        new, displacement = fire_step(old, batch.forces, batch.system, self.settings)
        atoms = None if mask is None else atom_rows(mask, batch)
        for name in names:
            rows = atoms if name in self.atom_state else mask
            batch.set(self.key(name), keep_frozen(rows, getattr(new, name), getattr(old, name)))
        batch.positions = keep_frozen(atoms, batch.positions + displacement, batch.positions)

    def describe(self) -> dict[str, Any]:
        """Settings that differ from the defaults."""
        values, defaults = vars(self.settings), vars(FireSettings())
        return {name: value for name, value in values.items() if value != defaults[name]}
