"""Gradient descent with a fixed step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.optimizers.cell_settings import OptimizerOptions
from carryall.dynamics.optimizers.rows import Rows, Segments, longest, scaled
from carryall.dynamics.optimizers.stepping import split_options, write_step
from carryall.errors import InputError
from carryall.graph.potential import Potential


@dataclass(frozen=True)
class DescentSettings:
    """step_size in Å²/eV: stable below two over the largest curvature. maxstep in Å."""

    step_size: float = 0.01
    maxstep: float = 0.2

    def __post_init__(self) -> None:
        for name in ("step_size", "maxstep"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} of GradientDescent must be positive, got {getattr(self, name)!r}")


def descent_step(forces: Rows, of: Segments, settings: DescentSettings) -> Rows:
    """step_size times the forces, all of a system made shorter alike where its longest row would exceed maxstep."""
    reach = (settings.maxstep / longest(forces, of)).clamp_(max=settings.step_size)
    return scaled(forces, reach, of)


class GradientDescent(BaseDynamics):
    """Moves along the forces, `step_size` Å²/eV times their size, no atom further than `maxstep`; no memory, no line search.

    Slow, and as simple as can be: for teaching, for comparison, and where other optimizers misbehave. See `OptimizerOptions`
    for the cell.
    """

    prefix = "descent"

    def __init__(
        self,
        model: Potential,
        step_size: float = DescentSettings.step_size,
        maxstep: float = DescentSettings.maxstep,
        **options: Unpack[OptimizerOptions],
    ) -> None:
        self.settings = DescentSettings(step_size, maxstep)
        self.cell, rest = split_options(options)
        self.__needs_keys__ = self.__needs_keys__ | self.cell.needs  # type: ignore[misc]
        self.__provides_keys__ = self.__provides_keys__ | self.cell.provides  # type: ignore[misc]
        super().__init__(model, **rest)

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """Nothing at fixed cell; where the cell started with a cell filter."""
        return self.cell.start(batch)

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems whose cell cannot change, where it should."""
        return self.cell.unfit(batch)

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """The whole step."""
        point = self.cell.point(batch, self.key)
        step = descent_step(point.forces, Segments.of(batch), self.settings)
        write_step(self, batch, mask, self.cell.moved(batch, point, step, self.key), {})

    def after_forces(self, batch: Batch, mask: Tensor | None) -> None:
        """Write `fmax` of the generalised forces where the cell relaxes."""
        self.cell.write_fmax(batch, mask, self.key)

    def describe(self) -> dict[str, Any]:
        """Settings that differ from the defaults."""
        values, defaults = vars(self.settings), vars(DescentSettings())
        return {name: value for name, value in values.items() if value != defaults[name]} | self.cell.describe()
