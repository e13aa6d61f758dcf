"""Constant pressure by a cell with inertia: Martyna, Tobias and Klein's equations, with and without Nosé-Hoover chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.units import GPa, fs, kB
from carryall.dynamics.base import BaseDynamics, DynamicsOptions
from carryall.dynamics.integrators import chains
from carryall.dynamics.integrators.cell_motion import (
    CELL_DEGREES,
    EYE,
    Array,
    allowed,
    check_mode,
    combined,
    flow,
    host,
    kinetic_array,
    onto,
    squared,
    trace,
    unfit_cells,
    volumes,
    without_wild,
)
from carryall.dynamics.integrators.nve import at_rest, ensure_velocities
from carryall.dynamics.integrators.velocity_rescaling import AT_REST, check_removed_degrees
from carryall.dynamics.parameters import Parameter, PerSystem, Setting
from carryall.dynamics.status import atom_rows, keep_frozen
from carryall.errors import InputError
from carryall.graph.potential import Potential


@dataclass(frozen=True)
class _Numbers:
    """What the equations of motion need of each system: (n,) each, on the host."""

    dt: Array
    kT: Array
    pressure: Array
    barostat_tau: Array
    degrees: Array

    @property
    def inertia(self) -> Array:
        """W of the cell, for every mode: (N_f + 3) k_B T tau² / 3."""
        return (self.degrees + 3.0) * self.kT * (self.barostat_tau * self.barostat_tau) / 3.0

    def drag(self, rate: Array) -> Array:
        """Of the atoms' velocities by the cell, (n, 3, 3), over half a step."""
        return (rate + (trace(rate) / self.degrees)[:, None, None] * EYE) * (-0.5 * self.dt)[:, None, None]

    def kicked(self, batch: Batch, decay: Array, kick: Array) -> Tensor:
        """(n_atoms, 3) velocities after half a step of the forces, with the `flow` of the drag."""
        acceleration = batch.forces / batch.masses[:, None]
        return combined(batch.velocities, decay, acceleration, kick * (0.5 * self.dt)[:, None, None], batch)


class NPH(BaseDynamics):
    """Constant pressure and enthalpy: a cell with inertia, no thermostat.

    Martyna, Tobias and Klein, J. Chem. Phys. 101, 4177 (1994); splitting of Tuckerman, Alejandre, López-Rendón, Jochim and
    Martyna, J. Phys. A 39, 5629 (2006), which keeps the measure of the phase space and can be turned back in time. With the
    rate of strain g, a symmetric matrix (rows of h are the cell vectors):

        dr/dt = v + r g,   dv/dt = F/m - v (g + tr g / N_f),   dh/dt = h g
        W dg/dt = V (p - P) + 2 K / N_f,   V p = sum of m v ⊗ v + virial,   W = (N_f + 3) k_B T tau² / 3

    | symbol | argument | unit |
    |---|---|---|
    | P | pressure | GPa |
    | h | timestep | fs |
    | tau | barostat_tau | fs |
    | T | temperature: it sets the inertia of the cell only | K |

    All are one number or one for each system; the pressure may be a `Ramp`. mode: "isotropic" (the cell keeps its shape: g is
    its trace / 3), "anisotropic" (a rectangular cell along x, y and z, three lengths: the diagonal of g) or "triclinic" (all
    six strains; the cell does not turn). removed_degrees: 3 (the default) where nothing outside acts on the system, so that its
    centre of mass, which should rest, keeps resting; 0 in an external field.

    Systems without a volume, not periodic along all axes or with fixed atoms are set aside, as are those whose cell would
    be strained by more than 0.25 in a step.

    `conserved_energy` is K + U + P V + W tr(g²) / 2; what a changing pressure adds to it is kept in the state `shift`.
    """

    __needs_keys__: ClassVar[frozenset[str]] = frozenset({"energy", "forces", "virial"})
    __provides_keys__: ClassVar[frozenset[str]] = frozenset({"positions", "velocities", "cell"})
    prefix = "nph"
    has_time = True

    def __init__(
        self,
        model: Potential,
        pressure: Setting = 0.0,
        timestep: PerSystem = 1.0,
        barostat_tau: PerSystem = 1000.0,
        mode: str = "isotropic",
        temperature: Setting = 300.0,
        *,
        removed_degrees: int = 3,
        **options: Unpack[DynamicsOptions],
    ) -> None:
        super().__init__(model, **options)
        self._pressure = Parameter.of("pressure", pressure, GPa, signed=True)
        self._timestep = Parameter.of("timestep", timestep, fs, positive=True)
        self._barostat_tau = Parameter.of("barostat_tau", barostat_tau, fs, positive=True)
        self._temperature = Parameter.of("temperature", temperature, kB, positive=True)
        self.mode = check_mode(mode, self.constraints)
        self.removed_degrees = check_removed_degrees(removed_degrees)

    def prepare(self, batch: Batch) -> None:
        """Also gives atoms without velocities zero ones."""
        super().prepare(batch)
        ensure_velocities(batch)

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems whose cell cannot follow a pressure."""
        return unfit_cells(batch, self.mode)

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """dt and barostat_tau (Å sqrt(amu / eV)), kT (eV), pressure (eV/Å³), degrees, rate (n_systems, 3, 3), shift (eV)."""
        settings = (self._timestep, self._barostat_tau, self._temperature, self._pressure)
        values = {name: one.at(batch) for name, one in zip(("dt", "barostat_tau", "kT", "pressure"), settings, strict=True)}
        zero = torch.zeros_like(values["dt"])
        return {
            **values,
            "degrees": self.degrees_of_freedom(batch),
            "rate": zero.new_zeros(batch.n_systems, 3, 3),
            "shift": zero,
        }

    @np.errstate(all="ignore")
    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Thermostat, cell's velocity and atoms' velocities for half a step; then atoms and cell for a whole one."""
        self._follow_settings(batch, mask)
        numbers, rate = self._numbers(batch), host(batch.get(self.key("rate")))
        kinetic = kinetic_array(batch, batch.velocities)
        factor, rate, chain = self._thermostat(batch, numbers, kinetic, rate)
        rate = self._pushed(batch, numbers, kinetic * (factor * factor)[:, None, None], rate)
        strain = rate * numbers.dt[:, None, None]
        mask = without_wild(self, batch, strain, mask)
        (decay, kick), (growth, drift) = flow(numbers.drag(rate), strain)
        velocities = numbers.kicked(batch, decay * factor[:, None, None], kick)
        positions = combined(batch.positions, growth, velocities, drift * numbers.dt[:, None, None], batch)
        cell = torch.bmm(batch.cell, onto(growth, batch))
        atoms = None if mask is None else atom_rows(mask, batch)
        batch.velocities = keep_frozen(atoms, velocities, batch.velocities)
        batch.positions = keep_frozen(atoms, positions, batch.positions)
        batch.cell = keep_frozen(mask, cell, batch.cell)
        self._set(batch, {"rate": rate, **chain}, mask)

    @np.errstate(all="ignore")
    def post_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """The first half backwards, with the new forces."""
        numbers, rate = self._numbers(batch), host(batch.get(self.key("rate")))
        ((decay, kick),) = flow(numbers.drag(rate))
        velocities = numbers.kicked(batch, decay, kick)
        kinetic = kinetic_array(batch, velocities)
        rate = self._pushed(batch, numbers, kinetic, rate)
        factor, rate, chain = self._thermostat(batch, numbers, kinetic, rate)
        if chain:
            velocities = velocities * atom_rows(onto(factor, batch), batch)[:, None]
        atoms = None if mask is None else atom_rows(mask, batch)
        batch.velocities = keep_frozen(atoms, velocities, batch.velocities)
        self._set(batch, {"rate": rate, **chain}, mask)

    def conserved_energy(self, batch: Batch) -> Tensor:
        """(n_systems,) eV: kinetic and potential energy, P V, and the energy of the cell (and of the chains)."""
        return super().conserved_energy(batch) + onto(self._extended_energy(batch), batch) + batch.get(self.key("shift"))

    def describe(self) -> dict[str, Any]:
        """Settings: pressure (GPa), timestep and barostat_tau (fs), mode, temperature (K), removed_degrees."""
        parameters = (self._pressure, self._timestep, self._barostat_tau, self._temperature)
        shown = {one.name: one.shown() for one in parameters}
        return {**shown, "mode": self.mode, "removed_degrees": self.removed_degrees}

    # -- inside

    def _thermostat(
        self, batch: Batch, numbers: _Numbers, kinetic: Array, rate: Array
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Half a step of the thermostat: factor of the atoms' velocities, the cell's rate, and new state; here none."""
        return np.ones_like(numbers.dt), rate, {}

    def _pushed(self, batch: Batch, numbers: _Numbers, kinetic: Array, rate: Array) -> Array:
        """Rate of strain after half a step of the forces on the cell."""
        isotropic = trace(kinetic) / numbers.degrees - numbers.pressure * volumes(host(batch.cell))
        force = allowed(kinetic + host(batch.get("virial")) + isotropic[:, None, None] * EYE, self.mode)
        return rate + force * (0.5 * numbers.dt / numbers.inertia)[:, None, None]

    def _numbers(self, batch: Batch) -> _Numbers:
        names = ("dt", "kT", "pressure", "barostat_tau", "degrees")
        return _Numbers(**{name: host(batch.get(self.key(name))) for name in names})

    def _set(self, batch: Batch, values: dict[str, Array], mask: Tensor | None) -> None:
        for name, value in values.items():
            key = self.key(name)
            batch.set(key, keep_frozen(mask, onto(value, batch), batch.get(key)))

    def _follow_settings(self, batch: Batch, mask: Tensor | None) -> None:
        """Take up what a ramp gives for the step that begins."""
        moving = [(key, one) for key, one in (("kT", self._temperature), ("pressure", self._pressure)) if not one.constant]
        if not moving:
            return
        before = self._extended_energy(batch)
        for name, parameter in moving:
            self._set(batch, {name: host(parameter.at(batch, self.steps(batch)))}, mask)
        change = self._extended_energy(batch) - before
        self._set(batch, {"shift": host(batch.get(self.key("shift"))) - change}, mask)

    def _extended_energy(self, batch: Batch) -> Array:
        """(n,) eV of what is not in the atoms."""
        numbers = self._numbers(batch)
        moving = 0.5 * numbers.inertia * squared(host(batch.get(self.key("rate"))))
        return numbers.pressure * volumes(host(batch.cell)) + moving


class NPT(NPH):
    """Constant pressure and temperature: a cell with inertia, Nosé-Hoover chains on the atoms and on the cell.

    Equations, splitting, modes and systems that are set aside as in `NPH`; further

        dv/dt = ... - v xi_1,   W dg/dt = ... - W g xi'_1

    with a chain xi for the N_f degrees of freedom of the atoms (period `tau`) and one, xi', for the 1, 3 or 6 of the cell
    (period `barostat_tau`); see `chains`. Volumes are distributed as V^(N_f / 3) exp(-P V / k_B T) for an ideal gas, in every
    mode.

    | symbol | argument | unit |
    |---|---|---|
    | T | temperature, above zero | K |
    | P | pressure | GPa |
    | h | timestep | fs |
    | | tau | fs |
    | tau | barostat_tau | fs |

    All are one number or one for each system; temperature and pressure may be a `Ramp`, and the inertia of cell and chains
    follows the temperature. chain_length: links of each chain. A system at rest is set aside.

    `conserved_energy` is that of `NPH` and the energy of both chains.
    """

    prefix = "npt"

    def __init__(
        self,
        model: Potential,
        temperature: Setting = 300.0,
        pressure: Setting = 0.0,
        timestep: PerSystem = 1.0,
        tau: PerSystem = 100.0,
        barostat_tau: PerSystem = 1000.0,
        mode: str = "isotropic",
        chain_length: int = 3,
        *,
        removed_degrees: int = 3,
        **options: Unpack[DynamicsOptions],
    ) -> None:
        super().__init__(model, pressure, timestep, barostat_tau, mode, temperature, removed_degrees=removed_degrees, **options)
        self._tau = Parameter.of("tau", tau, fs, positive=True)
        if isinstance(chain_length, bool) or not isinstance(chain_length, int) or chain_length < 1:
            raise InputError(f"chain_length must be a whole number of at least 1, got {chain_length!r}")
        self.chain_length = chain_length

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems whose cell cannot follow a pressure, and systems at rest, unless a stage before may set them moving."""
        resting = at_rest(batch) if self.host is self else []
        return {i: AT_REST for i, rests in enumerate(resting) if rests} | super().unfit(batch)

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """As NPH, and tau; chain_position and chain_rate (n_systems, 2, chain_length): of the atoms' chain, and the cell's."""
        links = torch.zeros(batch.n_systems, 2, self.chain_length, dtype=torch.float64, device=batch.device)
        chain = {"chain_position": links, "chain_rate": links.clone()}
        return {**super().state_defaults(batch), "tau": self._tau.at(batch), **chain}

    def describe(self) -> dict[str, Any]:
        """Settings: as NPH; tau (fs), chain_length."""
        return {**super().describe(), "tau": self._tau.shown(), "chain_length": self.chain_length}

    # -- inside

    def _thermostat(
        self, batch: Batch, numbers: _Numbers, kinetic: Array, rate: Array
    ) -> tuple[Array, Array, dict[str, Array]]:
        held = np.concatenate([trace(kinetic), numbers.inertia * squared(rate)])
        position, chain_rate, degrees, kT, tau = self._chains(batch, numbers)
        time = 0.5 * np.concatenate([numbers.dt, numbers.dt])
        position, chain_rate, factor = chains.propagate(position, chain_rate, held, degrees, kT, tau, time)
        count = len(rate)
        shape = (self.chain_length, 2, count)
        new = {"chain_position": position, "chain_rate": chain_rate}
        rows = {name: value.reshape(shape).transpose(2, 1, 0) for name, value in new.items()}
        return factor[:count], rate * factor[count:, None, None], rows

    def _extended_energy(self, batch: Batch) -> Array:
        position, chain_rate, degrees, kT, tau = self._chains(batch, self._numbers(batch))
        energies = chains.energy(position, chain_rate, degrees, kT, tau).reshape(2, -1)
        return super()._extended_energy(batch) + energies[0] + energies[1]

    def _chains(self, batch: Batch, numbers: _Numbers) -> tuple[Array, Array, Array, Array, Array]:
        """position, rate (n_links, 2 n), degrees, kT, tau (2 n,): the chains of all systems' atoms, then those of the cells."""
        links = [host(batch.get(self.key(name))) for name in ("chain_position", "chain_rate")]
        position, rate = (one.transpose(2, 1, 0).reshape(self.chain_length, -1) for one in links)
        cell = np.full_like(numbers.degrees, CELL_DEGREES[self.mode])
        tau = np.concatenate([host(batch.get(self.key("tau"))), numbers.barostat_tau])
        return (
            position,
            rate,
            np.concatenate([numbers.degrees, cell]),
            np.concatenate([numbers.kT, numbers.kT]),
            tau,
        )
