"""Constant temperature: Nosé-Hoover chains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.units import fs, kB
from carryall.dynamics.base import BaseDynamics, DynamicsOptions
from carryall.dynamics.integrators.nve import at_rest, ensure_velocities, half_kick, kick_and_drift
from carryall.dynamics.integrators.velocity_rescaling import AT_REST, check_removed_degrees
from carryall.dynamics.parameters import Parameter, PerSystem, Setting
from carryall.dynamics.status import atom_rows, keep_frozen
from carryall.dynamics.thermo import kinetic_energy
from carryall.errors import InputError
from carryall.graph.potential import Potential

THREE = 1.0 / (2.0 - 2.0 ** (1.0 / 3.0))
FIVE = 1.0 / (4.0 - 4.0 ** (1.0 / 3.0))
WEIGHTS = {
    1: (1.0,),
    3: (THREE, 1.0 - 2.0 * THREE, THREE),
    5: (FIVE, FIVE, 1.0 - 4.0 * FIVE, FIVE, FIVE),
}
"""Parts of the time that an update of the chain is split into (Suzuki 1990, Yoshida 1990), by their number."""

FEW = 8
"""Up to so many systems plain numbers are cheaper than arrays."""

Array = Any
"""A number, a numpy array (n,) or a tensor (n,), of float64: the arithmetic below is the same for all."""


def chain_masses(kT: Array, degrees: Array, tau: Array, length: int) -> list[Array]:
    """Q_1 = N_f k_B T tau² and Q_j = k_B T tau², by links."""
    one = kT * (tau * tau)
    return [degrees * one, *([one] * (length - 1))]


def chain_energy(eta: Array, speed: Array, kT: Array, degrees: Array, masses: Sequence[Array]) -> Array:
    """(n,) energy of chains: N_f k_B T eta_1 + k_B T sum of the other eta + sum of Q speed² / 2; eta and speed (n, length)."""
    total = degrees * kT * eta[:, 0]
    for j, mass in enumerate(masses):
        total = total + 0.5 * mass * speed[:, j] * speed[:, j]
        total = total + kT * eta[:, j] if j else total
    return total


def chain_step(
    twice_kinetic: Array,
    eta: Sequence[Array],
    speed: Sequence[Array],
    kT: Array,
    degrees: Array,
    masses: Sequence[Array],
    time: Array,
    weights: Sequence[float] = WEIGHTS[3],
) -> tuple[Array, list[Array], list[Array]]:
    """Move chains, and what they hold, for `time`: the factor of the held velocities, and new eta and speed, by links.

    twice_kinetic: sum of m v² of what is held; speed is the rate of eta. Martyna, Tuckerman, Tobias and Klein, Mol. Phys. 87,
    1117 (1996), eq. 29; in the order of operations of Tuckerman, Statistical Mechanics (2010), sec. 4.11.
    """
    x, v = list(eta), list(speed)
    factor: Array = 1.0
    for weight in weights:
        part = weight * time
        for j in reversed(range(len(v))):
            v[j] = _kicked_link(j, v, twice_kinetic, kT, degrees, masses, part)
        scale = _exp(-part * v[0])
        factor, twice_kinetic = factor * scale, twice_kinetic * (scale * scale)
        x = [place + part * rate for place, rate in zip(x, v, strict=True)]
        for j in range(len(v)):
            v[j] = _kicked_link(j, v, twice_kinetic, kT, degrees, masses, part)
    return factor, x, v


def moved_chain(
    twice_kinetic: Tensor,
    eta: Tensor,
    speed: Tensor,
    kT: Tensor,
    degrees: Tensor,
    masses: Sequence[Tensor],
    time: Tensor,
    weights: Sequence[float] = WEIGHTS[3],
) -> tuple[Tensor, Tensor, Tensor]:
    """`chain_step` of tensors: eta and speed (n, length), all else (n,).

    On the CPU in numpy, or in plain numbers for a few systems: the same operations, correctly rounded alike, in cheaper calls.
    """
    n, length = eta.shape
    if kT.device.type != "cpu":
        factor, x, v = chain_step(twice_kinetic, eta.unbind(1), speed.unbind(1), kT, degrees, masses, time, weights)
        return factor, torch.stack(x, 1), torch.stack(v, 1)
    table = np.stack([one.numpy() for one in (twice_kinetic, kT, degrees, time, *eta.unbind(1), *speed.unbind(1), *masses)])
    in_numbers = 0 < n <= FEW
    moved = []
    with np.errstate(all="ignore"):  # a system that explodes is set aside once its forces are not finite
        for kinetic, energy, count, span, *links in table.T.tolist() if in_numbers else [table]:
            eta_links, speed_links, mass_links = (links[k * length : (k + 1) * length] for k in range(3))
            factor, x, v = chain_step(kinetic, eta_links, speed_links, energy, count, mass_links, span, weights)
            moved.append([factor, *x, *v])
    rows = torch.from_numpy(np.array(moved).T if in_numbers else np.stack(moved[0]))
    return rows[0], rows[1 : 1 + length].T.contiguous(), rows[1 + length :].T.contiguous()


def _kicked_link(
    j: int, v: list[Array], twice_kinetic: Array, kT: Array, degrees: Array, masses: Sequence[Array], part: Array
) -> Array:
    """Rate of link j after half of `part`, dragged by the next link."""
    pull = masses[j - 1] * v[j - 1] * v[j - 1] - kT if j else twice_kinetic - degrees * kT
    kick = 0.5 * part * pull / masses[j]
    if j + 1 == len(v):
        return v[j] + kick
    drag = _exp(-0.25 * part * v[j + 1])
    return (v[j] * drag + kick) * drag


def _exp(x: Array) -> Array:
    """Python's on the CPU: a vectorised one may differ in the last bit with the place in the array."""
    if isinstance(x, Tensor):
        return torch.exp(x)
    return np.array([_exp(one) for one in x.tolist()]) if isinstance(x, np.ndarray) else math.exp(min(x, 700.0))


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
        if suzuki_yoshida not in WEIGHTS:
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
        eta, speed, kT, tau, dt = (batch.get(self.key(name)) for name in ("eta", "eta_velocity", "kT", "tau", "dt"))
        degrees = self.degrees_of_freedom(batch)
        masses = chain_masses(kT, degrees, tau, self.chain_length)
        rows = (2.0 * kinetic_energy(batch), eta, speed, kT, degrees, masses, 0.5 * dt)
        factor, new_eta, new_speed = moved_chain(*rows, WEIGHTS[self.suzuki_yoshida])
        batch.set(self.key("eta"), keep_frozen(mask, new_eta, eta))
        batch.set(self.key("eta_velocity"), keep_frozen(mask, new_speed, speed))
        scaled = batch.velocities * atom_rows(factor, batch)[:, None]
        batch.velocities = keep_frozen(None if mask is None else atom_rows(mask, batch), scaled, batch.velocities)

    def _follow_temperature(self, batch: Batch, mask: Tensor | None) -> None:
        before, kT = self._chain_energy(batch), batch.get(self.key("kT"))
        batch.set(self.key("kT"), keep_frozen(mask, self._temperature.at(batch, self.steps(batch)), kT))
        shift = batch.get(self.key("shift"))
        batch.set(self.key("shift"), keep_frozen(mask, shift + (before - self._chain_energy(batch)), shift))

    def _chain_energy(self, batch: Batch) -> Tensor:
        eta, speed, kT, tau = (batch.get(self.key(name)) for name in ("eta", "eta_velocity", "kT", "tau"))
        degrees = self.degrees_of_freedom(batch)
        return chain_energy(eta, speed, kT, degrees, chain_masses(kT, degrees, tau, self.chain_length))
