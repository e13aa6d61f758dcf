"""Names of ensembles, thermostats and barostats, and the dynamics that each stands for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from carryall.dynamics import integrators
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.parameters import Parameter, PerSystem, Setting
from carryall.errors import InputError, nearest
from carryall.graph.potential import Potential

ENSEMBLES = ("nve", "nvt", "npt", "nph")
THERMOSTATS = {"langevin": "NVTLangevin", "nose_hoover": "NVTNoseHoover", "velocity_rescaling": "NVTVelocityRescaling"}
BAROSTATS = ("stochastic_cell_rescaling", "mtk")
CELL_MODES = ("isotropic", "anisotropic", "triclinic")


@dataclass(frozen=True, eq=False)
class Conditions:
    """What a run is held at; each setting is one number, or one for each structure."""

    ensemble: str = "nvt"
    thermostat: str = "langevin"
    barostat: str = "stochastic_cell_rescaling"
    cell_mode: str = "isotropic"
    temperature: Setting = 300.0
    """K."""
    pressure: Setting = 0.0
    """GPa."""
    timestep: PerSystem = 1.0
    """fs."""
    friction: PerSystem = 1.0
    """1/ps."""
    tau: PerSystem = 100.0
    """fs."""
    barostat_tau: PerSystem = 1000.0
    """fs."""
    compressibility: PerSystem | None = None
    """1/GPa."""

    def __post_init__(self) -> None:
        known: dict[str, Iterable[str]] = {
            "ensemble": ENSEMBLES,
            "thermostat": THERMOSTATS,
            "barostat": BAROSTATS,
            "cell_mode": CELL_MODES,
        }
        for name, values in known.items():
            given = getattr(self, name)
            if given not in values:
                raise InputError(f"{name} must be one of {', '.join(values)}, got {given!r}{nearest(str(given), values)}")

    def check_counts(self, n_structures: int) -> None:
        """InputError for a setting with some other number of values than one or one for each structure."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, str):
                continue
            count = len(Parameter.of(field.name, value, signed=field.name == "pressure").values[0])
            if count not in (1, n_structures):
                raise InputError(f"{field.name} has {count} values for {n_structures} structures: give one, or one for each")

    def dynamics(self, potential: Potential, seed: int, **options: Any) -> BaseDynamics:
        """The dynamics; `options` are those that every dynamics takes."""
        kind, settings = self._kind()
        if kind in SEEDED:
            settings["seed"] = seed
        made: BaseDynamics = getattr(integrators, kind)(potential, **settings, **options)
        return made

    def _kind(self) -> tuple[str, dict[str, Any]]:
        """Class and its settings."""
        step = {"timestep": self.timestep}
        heat = {"temperature": self.temperature, **step}
        if self.ensemble == "nve":
            return "NVE", step
        if self.ensemble == "nvt":
            bath = {"friction": self.friction} if self.thermostat == "langevin" else {"tau": self.tau}
            return THERMOSTATS[self.thermostat], {**heat, **bath}
        raise NotImplementedError


SEEDED = ("NVTLangevin", "NVTVelocityRescaling")
"""Dynamics that draw random numbers."""
