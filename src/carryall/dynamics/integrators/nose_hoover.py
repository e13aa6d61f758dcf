"""Constant temperature: Nosé-Hoover chains."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.units import fs, kB
from carryall.dynamics.base import BaseDynamics, DynamicsOptions
from carryall.dynamics.integrators import chains
from carryall.dynamics.integrators.nve import at_rest, ensure_velocities, half_kick, kick_and_drift
from carryall.dynamics.integrators.velocity_rescaling import AT_REST, check_removed_degrees
from carryall.dynamics.parameters import Parameter, PerSystem, Setting
from carryall.dynamics.status import atom_rows, keep_frozen
from carryall.dynamics.thermo import kinetic_energy
from carryall.errors import InputError
from carryall.graph.potential import Potential


class NVTNoseHoover(BaseDynamics):
    """Velocity Verlet between two half steps of a Nosé-Hoover chain: deterministic, and reversible in time.

    Martyna, Klein and Tuckerman, J. Chem. Phys. 97, 2635 (1992); step by step as in Martyna, Tuckerman, Tobias and Klein,
    Mol. Phys. 87, 1117 (1996). Chain of M links per system:

        dv/dt = F/m - w_1 v,   Q_1 dw_1/dt = 2 K - N_f k_B T - Q_1 w_1 w_2,
        Q_j dw_j/dt = Q_(j-1) w_(j-1)² - k_B T - Q_j w_j w_(j+1)

    with w the rates of eta, Q_1 = N_f k_B T tau² and Q_j = k_B T tau².

    | symbol | argument | unit |
    |---|---|---|
    | h | timestep | fs |
    | T | temperature, above zero | K |
    | tau | tau | fs |
    | M | chain_length | |

    The first three are one number or one for each system; the temperature may be a `Ramp`, which the chain's masses follow.
    suzuki_yoshida: 1, 3 or 5 parts of each half step of the chain. removed_degrees: 3 (the default) where nothing outside acts
    on the system, so that its centre of mass, which should rest, keeps resting; 0 in an external field. A system at rest is
    set aside.

    `conserved_energy` is K + U + N_f k_B T eta_1 + k_B T (eta_2 + ... + eta_M) + sum of Q_j w_j² / 2; what a changing
    temperature adds to it is kept in the state `shift`, so that it stays constant then too.
    """

    __provides_keys__: ClassVar[frozenset[str]] = frozenset({"positions", "velocities"})
    prefix = "nose_hoover"
    has_time = True

    def __init__(
        self,
        model: Potential,
        temperature: Setting = 300.0,
        timestep: PerSystem = 1.0,
        tau: PerSystem = 100.0,
        chain_length: int = 3,
        suzuki_yoshida: int = 3,
        *,
        removed_degrees: int = 3,
        **options: Unpack[DynamicsOptions],
    ) -> None:
        super().__init__(model, **options)
        self._temperature = Parameter.of("temperature", temperature, kB, positive=True)
        self._timestep = Parameter.of("timestep", timestep, fs, positive=True)
        self._tau = Parameter.of("tau", tau, fs, positive=True)
        if isinstance(chain_length, bool) or not isinstance(chain_length, int) or chain_length < 1:
            raise InputError(f"chain_length must be a whole number of at least 1, got {chain_length!r}")
        if suzuki_yoshida not in chains.WEIGHTS:
            raise InputError(f"suzuki_yoshida must be 1, 3 or 5, got {suzuki_yoshida!r}")
        self.chain_length, self.suzuki_yoshida = chain_length, suzuki_yoshida
        self.removed_degrees = check_removed_degrees(removed_degrees)

    def prepare(self, batch: Batch) -> None:
        """Also gives atoms without velocities zero ones."""
        super().prepare(batch)
        ensure_velocities(batch)

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems at rest, unless a stage before this one may set them moving."""
        return {i: AT_REST for i, rests in enumerate(at_rest(batch)) if rests} if self.host is self else {}

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """dt (Å sqrt(amu / eV)), kT (eV), tau (as dt), eta and its rate eta_velocity (n_systems, chain_length), shift (eV)."""
        dt = self._timestep.at(batch)
        start = {"dt": dt, "kT": self._temperature.at(batch), "tau": self._tau.at(batch), "shift": torch.zeros_like(dt)}
        links = dt.new_zeros(batch.n_systems, self.chain_length)
        return {**start, "eta": links, "eta_velocity": links.clone()}

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Half step of the chain, half kick, drift."""
        if not self._temperature.constant:
            self._follow_temperature(batch, mask)
        self._move_chain(batch, mask)
        kick_and_drift(batch, atom_rows(batch.get(self.key("dt")), batch), mask)

    def post_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Half kick with the new forces, half step of the chain."""
        half_kick(batch, 0.5 * atom_rows(batch.get(self.key("dt")), batch), mask)
        self._move_chain(batch, mask)

    def conserved_energy(self, batch: Batch) -> Tensor:
        """(n_systems,) eV: kinetic and potential energy and the energy of the chain."""
        return super().conserved_energy(batch) + self._chain_energy(batch) + batch.get(self.key("shift"))

    def describe(self) -> dict[str, Any]:
        """temperature (K), timestep (fs), tau (fs), chain_length, suzuki_yoshida, removed_degrees."""
        shown = {one.name: one.shown() for one in (self._temperature, self._timestep, self._tau)}
        whole = {name: getattr(self, name) for name in ("chain_length", "suzuki_yoshida", "removed_degrees")}
        return {**shown, **whole}

    def _move_chain(self, batch: Batch, mask: Tensor | None) -> None:
        half = 0.5 * batch.get(self.key("dt"))
        weights = chains.WEIGHTS[self.suzuki_yoshida]
        links, settings = self._chain(batch)
        moved = chains.propagate(*links, _host(2.0 * kinetic_energy(batch)), *settings, _host(half), weights)
        eta, rate, factor = (torch.from_numpy(np.ascontiguousarray(one.T)).to(batch.device) for one in moved)
        for name, new in (("eta", eta), ("eta_velocity", rate)):
            batch.set(self.key(name), keep_frozen(mask, new, batch.get(self.key(name))))
        scaled = batch.velocities * atom_rows(factor, batch)[:, None]
        batch.velocities = keep_frozen(None if mask is None else atom_rows(mask, batch), scaled, batch.velocities)

    def _follow_temperature(self, batch: Batch, mask: Tensor | None) -> None:
        before, kT = self._chain_energy(batch), batch.get(self.key("kT"))
        batch.set(self.key("kT"), keep_frozen(mask, self._temperature.at(batch, self.steps(batch)), kT))
        shift = batch.get(self.key("shift"))
        batch.set(self.key("shift"), keep_frozen(mask, shift + (before - self._chain_energy(batch)), shift))

    def _chain_energy(self, batch: Batch) -> Tensor:
        links, settings = self._chain(batch)
        return torch.from_numpy(chains.energy(*links, *settings)).to(batch.device)

    def _chain(self, batch: Batch) -> tuple[tuple[chains.Array, chains.Array], tuple[chains.Array, chains.Array, chains.Array]]:
        """eta and its rate (chain_length, n_systems); degrees of freedom, kT and tau (n_systems,)."""
        eta, rate = (_host(batch.get(self.key(name))).T for name in ("eta", "eta_velocity"))
        kT, tau = (_host(batch.get(self.key(name))) for name in ("kT", "tau"))
        return (eta, rate), (_host(self.degrees_of_freedom(batch)), kT, tau)


def _host(values: Tensor) -> chains.Array:
    return values.cpu().numpy()
