"""Constant temperature: Langevin dynamics."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import system_sums
from carryall.data.units import fs, kB, ps
from carryall.dynamics.base import BaseDynamics, DynamicsOptions
from carryall.dynamics.integrators.nve import drifted, ensure_velocities, half_kick, kicked
from carryall.dynamics.noise import Stream, check_seed
from carryall.dynamics.parameters import Parameter, PerSystem, Setting
from carryall.dynamics.status import atom_rows, keep_frozen
from carryall.dynamics.system_noise import NOISE_STEP, count_kick, ensure_noise_step, system_noise
from carryall.dynamics.thermo import mobile
from carryall.graph.potential import Potential


class NVTLangevin(BaseDynamics):
    """BAOAB splitting (Leimkuhler and Matthews, Appl. Math. Res. Express 2013, 34): kick, drift, noise, drift, forces, kick.

    | symbol | argument | unit |
    |---|---|---|
    | h | timestep | fs |
    | T | temperature | K |
    | gamma | friction | 1/ps |

    Noise step: v <- c v + sqrt((1 - c²) k_B T / m) R with c = exp(-gamma h). R depends on (seed, system_id, index of the atom
    in its system, number of the kick) only: a system meets the same noise alone, in any batch, and after a restart.
    All three settings are one number or one for each system; the temperature may be a `Ramp`.

    `conserved_energy` is the kinetic and potential energy less the heat of all noise steps (state `heat`, eV); its drift is
    the work of the timestep's error.
    """

    __provides_keys__: ClassVar[frozenset[str]] = frozenset({"positions", "velocities"})
    prefix = "langevin"
    has_time = True

    def __init__(
        self,
        model: Potential,
        temperature: Setting = 300.0,
        timestep: PerSystem = 1.0,
        friction: PerSystem = 1.0,
        seed: int = 0,
        **options: Unpack[DynamicsOptions],
    ) -> None:
        super().__init__(model, **options)
        self._temperature = Parameter.of("temperature", temperature, kB)
        self._timestep = Parameter.of("timestep", timestep, fs, positive=True)
        self._friction = Parameter.of("friction", friction, 1 / ps)
        self.seed = check_seed(seed)

    def prepare(self, batch: Batch) -> None:
        """Also gives atoms without velocities zero ones, and starts the count of random kicks where there is none."""
        super().prepare(batch)
        ensure_velocities(batch)
        ensure_noise_step(batch)

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """dt (Å sqrt(amu / eV)), decay c of the velocity, kT (eV), heat (eV) that the noise has brought."""
        dt = self._timestep.at(batch)
        decay = exponential_decay(self._friction.at(batch) * dt)
        return {"dt": dt, "decay": decay, "kT": self._temperature.at(batch), "heat": torch.zeros_like(dt)}

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """B A O A."""
        if not self._temperature.constant:
            energy = self._temperature.at(batch, self.steps(batch))
            batch.set(self.key("kT"), keep_frozen(mask, energy, batch.get(self.key("kT"))))
        half = 0.5 * atom_rows(batch.get(self.key("dt")), batch)
        atoms = None if mask is None else atom_rows(mask, batch)
        before = kicked(batch.velocities, batch.forces, batch.masses, half)
        positions = drifted(batch.positions, before, half)
        velocities = self.constrained(batch, self._with_noise(batch, before))
        positions = drifted(positions, velocities, half)
        heat = batch.get(self.key("heat"))
        batch.set(self.key("heat"), keep_frozen(mask, heat + _gained(batch, before, velocities), heat))
        batch.velocities = keep_frozen(atoms, velocities, batch.velocities)
        batch.positions = keep_frozen(atoms, positions, batch.positions)
        count_kick(batch, mask)

    def post_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """B."""
        half_kick(batch, 0.5 * atom_rows(batch.get(self.key("dt")), batch), mask)

    def conserved_energy(self, batch: Batch) -> Tensor:
        """(n_systems,) eV: kinetic and potential energy less the heat that the noise has brought."""
        return super().conserved_energy(batch) - batch.get(self.key("heat"))

    def describe(self) -> dict[str, Any]:
        """temperature (K), timestep (fs), friction (1/ps), seed."""
        settings = (self._temperature, self._timestep, self._friction)
        return {**{one.name: one.shown() for one in settings}, "seed": self.seed}

    def _with_noise(self, batch: Batch, velocities: Tensor) -> Tensor:
        decay = batch.get(self.key("decay"))
        strength = (1.0 - decay * decay) * batch.get(self.key("kT"))
        width = torch.sqrt(atom_rows(strength, batch) / batch.masses)
        noise = system_noise(batch, self.seed, Stream.THERMOSTAT, batch.get(NOISE_STEP))
        mixed = velocities * atom_rows(decay, batch)[:, None] + noise * width[:, None]
        free = mobile(batch)
        return mixed if free is None else torch.where(free, mixed, 0.0)


def exponential_decay(exponents: Tensor) -> Tensor:
    """exp(-x) per system: Python's, since a vectorised one may differ in the last bit with the place in the array."""
    return torch.tensor([math.exp(-one) for one in exponents.tolist()], dtype=torch.float64, device=exponents.device)


def _gained(batch: Batch, before: Tensor, after: Tensor) -> Tensor:
    """(n_systems,) eV of kinetic energy between velocities before and after."""
    change = (after - before) * (after + before)
    per_atom = 0.5 * batch.masses * (change[:, 0] + change[:, 1] + change[:, 2])
    return system_sums(batch, per_atom)
