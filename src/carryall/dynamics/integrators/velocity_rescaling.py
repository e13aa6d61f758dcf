"""Constant temperature: stochastic velocity rescaling."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.units import fs, kB
from carryall.dynamics.base import BaseDynamics, DynamicsOptions
from carryall.dynamics.integrators.langevin import exponential_decay
from carryall.dynamics.integrators.nve import at_rest, ensure_velocities, half_kick, kick_and_drift
from carryall.dynamics.noise import Stream, check_seed
from carryall.dynamics.parameters import Parameter, PerSystem, Setting
from carryall.dynamics.status import SYSTEM_ID, atom_rows, keep_frozen
from carryall.dynamics.system_noise import NOISE_STEP, count_kick, ensure_noise_step, normal_and_chi_squared
from carryall.dynamics.thermo import kinetic_energy
from carryall.errors import InputError
from carryall.graph.potential import Potential

AT_REST = "it is at rest, and this thermostat only scales velocities: give it some first, with initialize_velocities"


class NVTVelocityRescaling(BaseDynamics):
    """A step of velocity Verlet, then all velocities of a system times one random factor.

    Bussi, Donadio and Parrinello, J. Chem. Phys. 126, 014101 (2007). The factor alpha takes the kinetic energy K along its own
    stochastic equation, which has the canonical distribution as its stationary one and relaxes with `tau`:

        alpha² = c + (1 - c) k_B T / (2 K) (R_1² + S) + 2 R_1 sqrt(c (1 - c) k_B T / (2 K)),   c = exp(-h / tau)

    with R_1 normal, S the sum of N_f - 1 squared normals (N_f: degrees of freedom), and the sign of alpha that of
    sqrt(c) + R_1 sqrt((1 - c) k_B T / (2 K)). Both depend on (seed, system_id, number of the kick) only.

    | symbol | argument | unit |
    |---|---|---|
    | h | timestep | fs |
    | T | temperature | K |
    | tau | tau | fs |

    All three are one number or one for each system; the temperature may be a `Ramp`. removed_degrees: 3 (the default) where
    nothing outside acts on the system, so that its centre of mass, which should rest, keeps resting; 0 in an external field.
    A system at rest is set aside: no factor sets it moving.

    `conserved_energy` is the paper's effective energy: kinetic and potential energy less the heat of all factors, which the
    state `heat` holds.
    """

    __provides_keys__: ClassVar[frozenset[str]] = frozenset({"positions", "velocities"})
    prefix = "velocity_rescaling"
    has_time = True

    def __init__(
        self,
        model: Potential,
        temperature: Setting = 300.0,
        timestep: PerSystem = 1.0,
        tau: PerSystem = 100.0,
        seed: int = 0,
        *,
        removed_degrees: int = 3,
        **options: Unpack[DynamicsOptions],
    ) -> None:
        super().__init__(model, **options)
        self._temperature = Parameter.of("temperature", temperature, kB)
        self._timestep = Parameter.of("timestep", timestep, fs, positive=True)
        self._tau = Parameter.of("tau", tau, fs, positive=True)
        self.seed = check_seed(seed)
        self.removed_degrees = check_removed_degrees(removed_degrees)

    def prepare(self, batch: Batch) -> None:
        """Also gives atoms without velocities zero ones, and starts the count of random kicks where there is none."""
        super().prepare(batch)
        ensure_velocities(batch)
        ensure_noise_step(batch)

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems at rest that are to be heated, unless a stage before this one may set them moving."""
        if self.host is not self:
            return {}
        target = self._temperature.at(batch).tolist()
        heated = [kT > 0 or not self._temperature.constant for kT in target]
        return {i: AT_REST for i, (rests, wanted) in enumerate(zip(at_rest(batch), heated, strict=True)) if rests and wanted}

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """dt (Å sqrt(amu / eV)), decay c, kT (eV), heat (eV) that the factors have brought."""
        dt = self._timestep.at(batch)
        decay = exponential_decay(dt / self._tau.at(batch))
        return {"dt": dt, "decay": decay, "kT": self._temperature.at(batch), "heat": torch.zeros_like(dt)}

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Half kick, then drift."""
        if not self._temperature.constant:
            energy = self._temperature.at(batch, self.steps(batch))
            batch.set(self.key("kT"), keep_frozen(mask, energy, batch.get(self.key("kT"))))
        kick_and_drift(batch, atom_rows(batch.get(self.key("dt")), batch), mask)

    def post_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Half kick with the new forces, then the random factor."""
        half_kick(batch, 0.5 * atom_rows(batch.get(self.key("dt")), batch), mask)
        kinetic = kinetic_energy(batch)
        factor, squared = self._factor(batch, kinetic)
        heat = batch.get(self.key("heat"))
        batch.set(self.key("heat"), keep_frozen(mask, heat + (squared - 1.0) * kinetic, heat))
        scaled = batch.velocities * atom_rows(factor, batch)[:, None]
        batch.velocities = keep_frozen(None if mask is None else atom_rows(mask, batch), scaled, batch.velocities)
        count_kick(batch, mask)

    def conserved_energy(self, batch: Batch) -> Tensor:
        """(n_systems,) eV: kinetic and potential energy less the heat that the factors have brought."""
        return super().conserved_energy(batch) - batch.get(self.key("heat"))

    def describe(self) -> dict[str, Any]:
        """temperature (K), timestep (fs), tau (fs), seed, removed_degrees."""
        settings = (self._temperature, self._timestep, self._tau)
        shown = {one.name: one.shown() for one in settings}
        return {**shown, "seed": self.seed, "removed_degrees": self.removed_degrees}

    def _factor(self, batch: Batch, kinetic: Tensor) -> tuple[Tensor, Tensor]:
        """(n_systems,) alpha and alpha²."""
        decay, kT = batch.get(self.key("decay")), batch.get(self.key("kT"))
        others = self.degrees_of_freedom(batch) - 1.0
        normal, total = normal_and_chi_squared(
            self.seed, Stream.VELOCITY_RESCALING, batch.get(SYSTEM_ID), batch.get(NOISE_STEP), others
        )
        return rescaling(kinetic, kT, decay, normal, total)


def rescaling(kinetic: Tensor, kT: Tensor, decay: Tensor, normal: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) alpha and alpha² of the paper's eq. A7; 1 where nothing moves.

    kinetic and kT: eV. decay: exp(-h / tau). normal: R_1; total: the sum of the other N_f - 1 squared normals.
    """
    moving = kinetic > 0.0
    ratio = (1.0 - decay) * kT / (2.0 * torch.where(moving, kinetic, 1.0))
    root = torch.sqrt(decay) + normal * torch.sqrt(ratio)
    squared = torch.where(moving, root * root + ratio * total, 1.0)
    size = torch.sqrt(squared)
    return torch.where(moving & (root < 0.0), -size, size), squared


def check_removed_degrees(removed: int) -> int:
    """0 or 3."""
    if isinstance(removed, bool) or removed not in (0, 3):
        raise InputError(f"removed_degrees must be 3 (the centre of mass rests) or 0 (an external field), got {removed!r}")
    return int(removed)
