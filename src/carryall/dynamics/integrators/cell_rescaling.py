"""Constant pressure and temperature by random rescaling: of the cell, and of the velocities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.units import GPa, fs, kB
from carryall.dynamics.base import BaseDynamics, DynamicsOptions
from carryall.dynamics.integrators.cell_motion import (
    EYE,
    Array,
    allowed,
    check_mode,
    combined,
    flow,
    host,
    kinetic_array,
    logarithm,
    onto,
    squared,
    trace,
    unfit_cells,
    volumes,
    without_wild,
)
from carryall.dynamics.integrators.chains import exponential
from carryall.dynamics.integrators.langevin import exponential_decay
from carryall.dynamics.integrators.nve import at_rest, ensure_velocities, kicked
from carryall.dynamics.integrators.velocity_rescaling import AT_REST, check_removed_degrees, rescaling
from carryall.dynamics.noise import Stream, check_seed
from carryall.dynamics.parameters import Parameter, PerSystem, Setting
from carryall.dynamics.status import SYSTEM_ID, atom_rows, keep_frozen
from carryall.dynamics.system_noise import NOISE_STEP, count_kick, ensure_noise_step, normal_and_chi_squared, normal_rows
from carryall.graph.potential import Potential

NOISES = {"isotropic": 1, "anisotropic": 3, "triclinic": 6}
"""Normal numbers of a step, by mode."""


@dataclass(frozen=True)
class _Numbers:
    """Of each system: (n,) each, on the host."""

    dt: Array
    kT: Array
    pressure: Array
    mobility: Array


class NPTStochasticCellRescaling(BaseDynamics):
    """Constant pressure and temperature: the cell follows the pressure with friction and noise, without inertia.

    Isotropic: Bernetti and Bussi, J. Chem. Phys. 153, 114107 (2020). All strains: Del Tatto, Raiteri, Bernetti and Bussi,
    Appl. Sci. 12, 1139 (2022). With lambda = sqrt(V), the internal pressure p = (sum of m v ⊗ v + virial) / V, its third of
    the trace p_0 and the rest p_d, and the mobility m = beta / tau:

        d lambda = m lambda / 2 (p_0 - P + k_B T / 2 V) dt + sqrt(m k_B T / 2) dW
        d strain = m / 3 p_d dt + sqrt(2 m k_B T / 3 V) dW_d      (without trace; not in the isotropic mode)

    A step: half kick, half drift, cell, half drift, forces, half kick (the reversible splitting of both papers), then the
    random factor of all velocities (Bussi, Donadio and Parrinello, J. Chem. Phys. 126, 014101 (2007)). With the cell, positions
    go from r to r exp(e) and velocities from v to v exp(-e), e being the strain.

    | symbol | argument | unit |
    |---|---|---|
    | T | temperature | K |
    | P | pressure | GPa |
    | h | timestep | fs |
    | | tau, of the velocities | fs |
    | tau | barostat_tau | fs |
    | beta | compressibility | 1/GPa |

    All are one number or one for each system; temperature and pressure may be a `Ramp`. Only beta / barostat_tau matters: with
    the material's own beta the volume relaxes with barostat_tau. mode: "isotropic" (the cell keeps its shape), "anisotropic" (a
    rectangular cell along x, y and z, three lengths) or "triclinic" (all six strains; the cell does not turn). Noise depends on
    (seed, system_id, number of the kick) only. removed_degrees: 3 (the default) where nothing outside acts on the system, so
    that its centre of mass, which should rest, keeps resting; 0 in an external field.

    Systems at rest, without a volume, not periodic along all axes or with fixed atoms are set aside, as are those whose cell
    would be strained by more than 0.25 in a step.

    `conserved_energy` is the papers' effective energy: K + U + P V less what the noise has brought (state `heat`), such that
    its change over a step is -k_B T times the logarithm of the ratio of the probabilities of the step backwards and forwards.
    """

    __needs_keys__: ClassVar[frozenset[str]] = frozenset({"energy", "forces", "virial"})
    __provides_keys__: ClassVar[frozenset[str]] = frozenset({"positions", "velocities", "cell"})
    prefix = "cell_rescaling"
    has_time = True

    def __init__(
        self,
        model: Potential,
        temperature: Setting = 300.0,
        pressure: Setting = 0.0,
        timestep: PerSystem = 1.0,
        tau: PerSystem = 100.0,
        barostat_tau: PerSystem = 1000.0,
        compressibility: PerSystem = 0.45,
        mode: str = "isotropic",
        seed: int = 0,
        *,
        removed_degrees: int = 3,
        **options: Unpack[DynamicsOptions],
    ) -> None:
        """The default compressibility is water's."""
        super().__init__(model, **options)
        self._temperature = Parameter.of("temperature", temperature, kB)
        self._pressure = Parameter.of("pressure", pressure, GPa, signed=True)
        self._timestep = Parameter.of("timestep", timestep, fs, positive=True)
        self._tau = Parameter.of("tau", tau, fs, positive=True)
        self._barostat_tau = Parameter.of("barostat_tau", barostat_tau, fs, positive=True)
        self._compressibility = Parameter.of("compressibility", compressibility, 1 / GPa, positive=True)
        self.mode = check_mode(mode, self.constraints)
        self.seed = check_seed(seed)
        self.removed_degrees = check_removed_degrees(removed_degrees)

    def prepare(self, batch: Batch) -> None:
        """Also gives atoms without velocities zero ones, and starts the count of random kicks where there is none."""
        super().prepare(batch)
        ensure_velocities(batch)
        ensure_noise_step(batch)

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems whose cell cannot follow a pressure, and those at rest that are to be heated, unless by a stage before."""
        resting = at_rest(batch) if self.host is self else []
        heated = [kT > 0 or not self._temperature.constant for kT in self._temperature.at(batch).tolist()]
        found = {i: AT_REST for i, rests in enumerate(resting) if rests and heated[i]}
        return found | unfit_cells(batch, self.mode)

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """dt (Å sqrt(amu / eV)), kT (eV), pressure (eV/Å³), decay of the velocities, mobility, degrees, heat (eV), strain."""
        dt = self._timestep.at(batch)
        return {
            "dt": dt,
            "kT": self._temperature.at(batch),
            "pressure": self._pressure.at(batch),
            "decay": exponential_decay(dt / self._tau.at(batch)),
            "mobility": self._compressibility.at(batch) / self._barostat_tau.at(batch),
            "degrees": self.degrees_of_freedom(batch),
            "heat": torch.zeros_like(dt),
            "strain": dt.new_zeros(batch.n_systems, 3, 3),
        }

    @np.errstate(all="ignore")
    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Half kick, half drift, cell, half drift."""
        self._follow_settings(batch, mask)
        numbers = self._numbers(batch)
        velocities = self._kicked(batch)
        strain, heat = self._random_strain(batch, numbers, kinetic_array(batch, velocities))
        mask = without_wild(self, batch, strain, mask)
        (stretch, _), (squeeze, _) = flow(strain, -strain)
        drift = (stretch + squeeze) * (0.5 * numbers.dt)[:, None, None]
        positions = combined(batch.positions, stretch, velocities, drift, batch)
        velocities = torch.bmm(velocities[:, None], onto(squeeze, batch).index_select(0, batch.system))[:, 0]
        cell = torch.bmm(batch.cell, onto(stretch, batch))
        atoms = None if mask is None else atom_rows(mask, batch)
        batch.velocities = keep_frozen(atoms, velocities, batch.velocities)
        batch.positions = keep_frozen(atoms, positions, batch.positions)
        batch.cell = keep_frozen(mask, cell, batch.cell)
        self._set(batch, {"strain": strain, "heat": host(batch.get(self.key("heat"))) + heat}, mask)

    @np.errstate(all="ignore")
    def post_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Half kick with the new forces, then the random factor of the velocities."""
        heat = host(batch.get(self.key("heat"))) - self._backward(batch, kinetic_array(batch, batch.velocities))
        velocities = self._kicked(batch)
        kinetic = 0.5 * onto(trace(kinetic_array(batch, velocities)), batch)
        normal, others = normal_and_chi_squared(
            self.seed,
            Stream.VELOCITY_RESCALING,
            batch.get(SYSTEM_ID),
            batch.get(NOISE_STEP),
            batch.get(self.key("degrees")) - 1.0,
        )
        kT, decay = batch.get(self.key("kT")), batch.get(self.key("decay"))
        factor, squared_factor = rescaling(kinetic, kT, decay, normal, others)
        velocities = velocities * atom_rows(factor, batch)[:, None]
        batch.velocities = keep_frozen(None if mask is None else atom_rows(mask, batch), velocities, batch.velocities)
        self._set(batch, {"heat": heat + host((squared_factor - 1.0) * kinetic)}, mask)
        count_kick(batch, mask)

    def conserved_energy(self, batch: Batch) -> Tensor:
        """(n_systems,) eV: the effective energy of the papers."""
        volume = onto(volumes(host(batch.cell)), batch)
        return super().conserved_energy(batch) + batch.get(self.key("pressure")) * volume - batch.get(self.key("heat"))

    def describe(self) -> dict[str, Any]:
        """Settings: temperature (K), pressure (GPa), timestep, tau and barostat_tau (fs), compressibility (1/GPa), others."""
        parameters = (
            self._temperature,
            self._pressure,
            self._timestep,
            self._tau,
            self._barostat_tau,
            self._compressibility,
        )
        shown = {one.name: one.shown() for one in parameters}
        return {**shown, "mode": self.mode, "seed": self.seed, "removed_degrees": self.removed_degrees}

    # -- inside

    def _random_strain(self, batch: Batch, numbers: _Numbers, kinetic: Array) -> tuple[Array, Array]:
        """Strain (n, 3, 3) of a step, and (n,) eV: k_B T times the logarithms of its density (of all but a constant)."""
        volume = volumes(host(batch.cell))
        noise, noise_squared = self._noise(batch)
        root = np.sqrt(volume)
        away, rest = self._drift(batch, numbers, kinetic, volume)
        width = np.sqrt(0.5 * numbers.mobility * numbers.kT * numbers.dt)
        new = root + away + width * (trace(noise) / np.sqrt(3.0))
        # the volume in between is the same backwards
        spread = np.sqrt(2.0 * numbers.mobility * numbers.kT * numbers.dt / (3.0 * root * new))
        growth = 2.0 * logarithm(new / root)
        shape = rest + self._shape(noise) * spread[:, None, None]
        return shape + (growth / 3.0)[:, None, None] * EYE, numbers.kT * (0.5 * noise_squared + 0.5 * growth)

    def _backward(self, batch: Batch, kinetic: Array) -> Array:
        """(n,) eV: -k_B T times the logarithm of the density of the strain backwards, from where the step came to."""
        numbers, strain = self._numbers(batch), host(batch.get(self.key("strain")))
        volume = volumes(host(batch.cell))
        back = exponential(-0.5 * trace(strain))
        away, rest = self._drift(batch, numbers, kinetic, volume)
        change = np.sqrt(volume) * (1.0 - back) + away
        shape = self._shape(strain) + rest
        both = change * change + (0.75 * volume * back) * squared(shape)
        return np.asarray(both / (numbers.mobility * numbers.dt))

    def _drift(self, batch: Batch, numbers: _Numbers, kinetic: Array, volume: Array) -> tuple[Array, Array]:
        """What the pressure does in a step: to the root of the volume (n,), and to the shape (n, 3, 3), without trace."""
        pressure = allowed(kinetic + host(batch.get("virial")), self.mode) / volume[:, None, None]
        excess = trace(pressure) / 3.0 - numbers.pressure + numbers.kT / (2.0 * volume)
        step = numbers.mobility * numbers.dt
        return 0.5 * step * np.sqrt(volume) * excess, self._shape(pressure) * (step / 3.0)[:, None, None]

    def _noise(self, batch: Batch) -> tuple[Array, Array]:
        """Normal numbers on the strains (n, 3, 3) that may vary, and (n,) the sum of the squares of them all."""
        ids, step = batch.get(SYSTEM_ID), batch.get(NOISE_STEP)
        rows = host(normal_rows(self.seed, Stream.CELL_RESCALING, ids, step, NOISES[self.mode]))
        noise = np.zeros((len(rows), 3, 3))
        if self.mode == "isotropic":
            noise += (rows[:, 0] / np.sqrt(3.0))[:, None, None] * EYE
        else:
            noise[:, [0, 1, 2], [0, 1, 2]] = rows[:, :3]
        if self.mode == "triclinic":
            half = rows[:, 3:] * np.sqrt(0.5)
            noise[:, [1, 0, 0], [2, 2, 1]] = half
            noise[:, [2, 2, 1], [1, 0, 0]] = half
        return noise, squared(noise)

    def _shape(self, tensor: Array) -> Array:
        """What of a strain (n, 3, 3) changes the shape of the cell: all but a third of its trace; nothing in isotropic mode."""
        if self.mode == "isotropic":
            return np.zeros_like(tensor)
        return tensor - (trace(tensor) / 3.0)[:, None, None] * EYE

    def _kicked(self, batch: Batch) -> Tensor:
        half = 0.5 * atom_rows(batch.get(self.key("dt")), batch)
        return kicked(batch.velocities, batch.forces, batch.masses, half)

    def _numbers(self, batch: Batch) -> _Numbers:
        return _Numbers(*(host(batch.get(self.key(name))) for name in ("dt", "kT", "pressure", "mobility")))

    def _set(self, batch: Batch, values: dict[str, Array], mask: Tensor | None) -> None:
        for name, value in values.items():
            key = self.key(name)
            batch.set(key, keep_frozen(mask, onto(value, batch), batch.get(key)))

    def _follow_settings(self, batch: Batch, mask: Tensor | None) -> None:
        """Take up what a ramp gives for the step that begins."""
        if not self._temperature.constant:
            self._set(batch, {"kT": host(self._temperature.at(batch, self.steps(batch)))}, mask)
        if not self._pressure.constant:
            pressure = host(self._pressure.at(batch, self.steps(batch)))
            work = (pressure - host(batch.get(self.key("pressure")))) * volumes(host(batch.cell))
            self._set(batch, {"pressure": pressure, "heat": host(batch.get(self.key("heat"))) + work}, mask)
