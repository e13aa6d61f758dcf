"""Constant temperature: Langevin dynamics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.units import fs, kB, ps
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.convergence import ConvergenceHook, Criteria
from carryall.dynamics.integrators.nve import drifted, ensure_velocities, half_kick, kicked
from carryall.dynamics.noise import Stream, check_seed, normal_vectors
from carryall.dynamics.parameters import PerSystem, checked, per_system, shown
from carryall.dynamics.status import SYSTEM_ID, atom_rows, keep_frozen
from carryall.dynamics.thermo import mobile
from carryall.graph.potential import Potential

NOISE_STEP = "noise_step"
"""(n_systems,) int64: how many random kicks a system has had, in whatever dynamics; never set back, so noise never repeats."""


class NVTLangevin(BaseDynamics):
    """BAOAB splitting (Leimkuhler and Matthews, Appl. Math. Res. Express 2013, 34): kick, drift, noise, drift, forces, kick.

    | symbol | argument | unit |
    |---|---|---|
    | h | timestep | fs |
    | T | temperature | K |
    | gamma | friction | 1/ps |

    Noise step: v <- c v + sqrt((1 - c²) k_B T / m) R with c = exp(-gamma h). R depends on (seed, system_id, index of the atom
    in its system, number of the kick) only: a system meets the same noise alone, in any batch, and after a restart.
    All three settings are one number or one for each system.
    """

    __provides_keys__: ClassVar[frozenset[str]] = frozenset({"positions", "velocities"})
    prefix = "langevin"
    has_time = True

    def __init__(
        self,
        model: Potential,
        temperature: PerSystem = 300.0,
        timestep: PerSystem = 1.0,
        friction: PerSystem = 1.0,
        seed: int = 0,
        hooks: Iterable[Any] = (),
        convergence_hook: ConvergenceHook | Criteria = None,
        n_steps: int | None = None,
        *,
        skin: float = 0.5,
        exit_status: int = 1,
    ) -> None:
        super().__init__(model, hooks, convergence_hook, n_steps, skin=skin, exit_status=exit_status)
        self._temperatures = checked("temperature", temperature)
        self._timesteps = checked("timestep", timestep, positive=True)
        self._frictions = checked("friction", friction)
        self.seed = check_seed(seed)

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """dt (Å sqrt(amu / eV)), decay c of the velocity, kT (eV)."""
        dt = per_system("timestep", [one * fs for one in self._timesteps], batch)
        rates = per_system("friction", [one / ps for one in self._frictions], batch)
        # Python's exp: a vectorised one may differ in the last bit with the place in the array.
        decay = [math.exp(-rate * time) for rate, time in zip(rates.tolist(), dt.tolist(), strict=True)]
        energy = per_system("temperature", [kB * one for one in self._temperatures], batch)
        return {"dt": dt, "decay": torch.tensor(decay, dtype=torch.float64, device=batch.device), "kT": energy}

    def init_state(self, batch: Batch, fresh: bool) -> None:
        """Also gives atoms without velocities zero ones, and starts the count of random kicks where there is none."""
        super().init_state(batch, fresh)
        ensure_velocities(batch)
        if NOISE_STEP not in batch:
            batch.set(NOISE_STEP, torch.zeros(batch.n_systems, dtype=torch.int64, device=batch.device), level="system")

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """B A O A."""
        half = 0.5 * atom_rows(batch.get(self.key("dt")), batch)
        atoms = None if mask is None else atom_rows(mask, batch)
        velocities = kicked(batch.velocities, batch.forces, batch.masses, half)
        positions = drifted(batch.positions, velocities, half)
        velocities = self._with_noise(batch, velocities)
        positions = drifted(positions, velocities, half)
        batch.velocities = keep_frozen(atoms, velocities, batch.velocities)
        batch.positions = keep_frozen(atoms, positions, batch.positions)
        batch.set(NOISE_STEP, batch.get(NOISE_STEP) + (1 if mask is None else mask.long()))

    def post_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """B."""
        half_kick(batch, 0.5 * atom_rows(batch.get(self.key("dt")), batch), mask)

    def describe(self) -> dict[str, Any]:
        """temperature (K), timestep (fs), friction (1/ps), seed."""
        settings = {"temperature": self._temperatures, "timestep": self._timesteps, "friction": self._frictions}
        return {**{name: shown(value) for name, value in settings.items()}, "seed": self.seed}

    def _with_noise(self, batch: Batch, velocities: Tensor) -> Tensor:
        decay = batch.get(self.key("decay"))
        strength = (1.0 - decay * decay) * batch.get(self.key("kT"))
        width = torch.sqrt(atom_rows(strength, batch) / batch.masses)
        noise = system_noise(batch, self.seed, Stream.THERMOSTAT, batch.get(NOISE_STEP))
        mixed = velocities * atom_rows(decay, batch)[:, None] + noise * width[:, None]
        free = mobile(batch)
        return mixed if free is None else torch.where(free, mixed, 0.0)


def system_noise(batch: Batch, seed: int, stream: Stream, step: Tensor) -> Tensor:
    """(n_atoms, 3) standard normals of a batch; step (n_systems,) int64."""
    index = torch.arange(batch.n_atoms, device=batch.device) - atom_rows(batch.ptr[:-1], batch)
    return normal_vectors(seed, stream, atom_rows(batch.get(SYSTEM_ID), batch), index, atom_rows(step, batch))
