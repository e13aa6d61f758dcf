"""Options of optimizers that say whether and how the cell changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from carryall.data.units import GPa
from carryall.dynamics.base import DynamicsOptions
from carryall.dynamics.parameters import Parameter, PerSystem, Ramp
from carryall.errors import InputError, nearest

KINDS = ("unit_cell", "frechet")
VOIGT = ((0, 5, 4), (5, 1, 3), (4, 3, 2))

CellMask: TypeAlias = Any
"""(3, 3) or (6,) bools."""


class OptimizerOptions(DynamicsOptions, total=False):
    """What every optimizer takes beside its own settings."""

    cell_filter: str | None
    """None: the cell stays. "unit_cell", "frechet": atoms and cell relax together, as ASE's filters of these names."""
    pressure: PerSystem
    """GPa, one or one for each system id; what E + p V is minimised at. Default 0."""
    cell_mask: CellMask
    """Components of the strain that may change: (3, 3), symmetric, or (6,) in the order xx, yy, zz, yz, xz, xy. Default all."""
    hydrostatic_strain: bool
    """The cell changes its volume only, not its shape."""
    constant_volume: bool
    """The cell changes its shape only (to first order in a step, as in ASE)."""
    cell_factor: float | None
    """What the coordinates of the cell are multiplied by and its forces divided by; None: the number of atoms, as in ASE."""


@dataclass(frozen=True)
class CellSettings:
    """How the cell changes."""

    kind: str
    """One of `KINDS`."""
    pressure: Parameter
    mask: tuple[tuple[float, ...], ...] | None = None
    """(3, 3), 1 where the strain may change and 0 where not; None: everywhere."""
    hydrostatic_strain: bool = False
    constant_volume: bool = False
    factor: float | None = None

    def shown(self) -> dict[str, Any]:
        """Settings that differ from the defaults, plain."""
        found: dict[str, Any] = {"cell_filter": self.kind}
        if self.pressure.shown() != 0.0:
            found["pressure"] = self.pressure.shown()
        if self.mask is not None:
            found["cell_mask"] = [[bool(one) for one in row] for row in self.mask]
        if self.hydrostatic_strain:
            found["hydrostatic_strain"] = True
        if self.constant_volume:
            found["constant_volume"] = True
        if self.factor is not None:
            found["cell_factor"] = self.factor
        return found


def take_cell_settings(options: OptimizerOptions) -> CellSettings | None:
    """Remove the cell's options from `options` and check them; None at fixed cell. InputError names what is wrong."""
    names = ("pressure", "cell_mask", "hydrostatic_strain", "constant_volume", "cell_factor")
    kind = options.pop("cell_filter", None)
    given: dict[str, Any] = {name: options.pop(name) for name in names if name in options}  # type: ignore[misc]
    if kind is None:
        idle = [name for name, value in given.items() if value is not None and value is not False and not _zero(value)]
        if idle:
            raise InputError(
                f'{", ".join(idle)} has no effect at fixed cell: give cell_filter="frechet" as well, or leave it out'
            )
        return None
    if kind not in KINDS:
        raise InputError(f"cell_filter must be None or one of {', '.join(KINDS)}, got {kind!r}{nearest(str(kind), KINDS)}")
    pressure = given.get("pressure", 0.0)
    if isinstance(pressure, Ramp):
        raise InputError("pressure of an optimizer is one number, or one for each system: a minimum has no schedule")
    return CellSettings(
        kind=kind,
        pressure=Parameter.of("pressure", pressure, GPa, signed=True),
        mask=checked_mask(given.get("cell_mask")),
        hydrostatic_strain=_checked_switch("hydrostatic_strain", given.get("hydrostatic_strain", False)),
        constant_volume=_checked_switch("constant_volume", given.get("constant_volume", False)),
        factor=_checked_factor(given.get("cell_factor")),
    )


def checked_mask(mask: CellMask) -> tuple[tuple[float, ...], ...] | None:
    """(3, 3) of 0 and 1; None where every component may change."""
    if mask is None:
        return None
    try:
        array = np.asarray(mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask)
    except ValueError:
        array = np.zeros(0)
    if array.shape not in ((3, 3), (6,)):
        raise InputError(
            f"cell_mask has shape {array.shape}, expected (3, 3), or (6,) in the order xx, yy, zz, yz, xz, xy: "
            "true where the strain may change"
        )
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise InputError(f"cell_mask must hold true and false only, got {mask!r}")
    full = array[np.array(VOIGT)] if array.shape == (6,) else array
    if (full != full.T).any():
        raise InputError(f"cell_mask must be symmetric, as strains are: components ij and ji are one, got {full.tolist()}")
    return None if full.all() else tuple(tuple(float(one) for one in row) for row in full)


def _zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _checked_switch(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} must be true or false, got {value!r}")
    return bool(value)


def _checked_factor(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise InputError(f"cell_factor must be a positive number, got {value!r}")
    return float(value)
