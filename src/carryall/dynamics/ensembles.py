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
BAROSTATS = {"stochastic_cell_rescaling": "NPTStochasticCellRescaling", "mtk": "NPT"}
OWN_THERMOSTATS = {"stochastic_cell_rescaling": "velocity_rescaling", "mtk": "nose_hoover"}
"""Barostats and the thermostat that each comes with."""
CELL_MODES = ("isotropic", "anisotropic", "triclinic")
SEEDED = ("NVTLangevin", "NVTVelocityRescaling", "NPTStochasticCellRescaling")
"""Dynamics that draw random numbers."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """What a run is held at; each setting is one number, or one for each structure."""

    ensemble: str = "nvt"
    thermostat: str | None = None
    """None: "langevin" at constant volume, the barostat's own at constant pressure."""
    barostat: str | None = None
    """None: "stochastic_cell_rescaling" for "npt", "mtk" for "nph"."""
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
    """1/GPa; None: that of water."""

    def __post_init__(self) -> None:
        known: dict[str, Iterable[str]] = {
            "ensemble": ENSEMBLES,
            "thermostat": THERMOSTATS,
            "barostat": BAROSTATS,
            "cell_mode": CELL_MODES,
        }
        for name, values in known.items():
            given = getattr(self, name)
            if given not in values and not (given is None and name in ("thermostat", "barostat")):
                raise InputError(f"{name} must be one of {', '.join(values)}, got {given!r}{nearest(str(given), values)}")
        has_bath, has_piston = self.ensemble in ("nvt", "npt"), self.ensemble in ("npt", "nph")
        if self.thermostat is not None and not has_bath:
            raise InputError(f'ensemble "{self.ensemble}" has no thermostat: leave thermostat out, or take "nvt" or "npt"')
        if self.barostat is not None and not has_piston:
            raise InputError(f'ensemble "{self.ensemble}" has no barostat: leave barostat out, or take "npt" or "nph"')
        if self.ensemble == "nph" and self.barostat == "stochastic_cell_rescaling":
            raise InputError('stochastic_cell_rescaling heats and cools: ensemble "nph" takes barostat "mtk"')
        own = OWN_THERMOSTATS.get(self._barostat)
        if self.ensemble == "npt" and self.thermostat not in (None, own):
            raise InputError(f'barostat "{self._barostat}" comes with thermostat "{own}": leave thermostat out')

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

    @property
    def heated(self) -> bool:
        """Whether there is a thermostat."""
        return self.ensemble in ("nvt", "npt")

    @property
    def _barostat(self) -> str:
        return self.barostat or ("mtk" if self.ensemble == "nph" else "stochastic_cell_rescaling")

    def _kind(self) -> tuple[str, dict[str, Any]]:
        """Class and its settings."""
        heat = {"temperature": self.temperature, "timestep": self.timestep}
        if self.ensemble == "nve":
            return "NVE", {"timestep": self.timestep}
        if self.ensemble == "nvt":
            thermostat = self.thermostat or "langevin"
            bath = {"friction": self.friction} if thermostat == "langevin" else {"tau": self.tau}
            return THERMOSTATS[thermostat], {**heat, **bath}
        piston = {"pressure": self.pressure, "barostat_tau": self.barostat_tau, "mode": self.cell_mode}
        if self.ensemble == "nph":
            return "NPH", {**heat, **piston}
        if self._barostat == "stochastic_cell_rescaling" and self.compressibility is not None:
            piston["compressibility"] = self.compressibility
        return BAROSTATS[self._barostat], {**heat, **piston, "tau": self.tau}
