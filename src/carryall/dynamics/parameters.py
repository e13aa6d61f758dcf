"""Settings of a dynamics: one number for all systems, one for each by its `system_id`, or a `Ramp` over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.status import SYSTEM_ID
from carryall.errors import InputError

PerSystem: TypeAlias = float | Sequence[float] | np.ndarray | Tensor


@dataclass(frozen=True)
class Ramp:
    """A setting that changes over the steps that a system has taken: linear between points, constant before and after.

    `Ramp((0, 1000), (300, 600))` heats from 300 to 600 in 1000 steps. A value may be one number for each system.
    """

    steps: Sequence[int]
    """Ascending, at least one."""
    values: Sequence[PerSystem]
    """The setting at each of the steps."""

    def __post_init__(self) -> None:
        steps = list(self.steps)
        whole = all(isinstance(one, (int, np.integer)) and not isinstance(one, bool) and one >= 0 for one in steps)
        if not steps or not whole or any(a >= b for a, b in pairwise(steps)):
            raise InputError(f"steps of a Ramp must be ascending whole numbers of at least 0, got {self.steps!r}")
        if len(self.values) != len(steps):
            raise InputError(f"a Ramp needs one value for each of its {len(steps)} steps, got {len(self.values)}")


Setting: TypeAlias = PerSystem | Ramp


@dataclass(frozen=True)
class Parameter:
    """A checked setting in the units of its user; `at` gives rows in the units of the equations of motion."""

    name: str
    unit: float
    steps: tuple[int, ...]
    """(0,) unless it is a ramp."""
    values: tuple[tuple[float, ...], ...]
    """One row for each of `steps`: one number, or one for each system id."""

    @classmethod
    def of(cls, name: str, value: Setting, unit: float = 1.0, *, positive: bool = False, signed: bool = False) -> Parameter:
        """InputError names a value that is not finite, or too small: below zero unless `signed`, zero where `positive`."""
        ramp = value if isinstance(value, Ramp) else Ramp((0,), (value,))
        rows = [checked(name, one, positive=positive, signed=signed) for one in ramp.values]
        width = max(len(row) for row in rows)
        if any(len(row) not in (1, width) for row in rows):
            raise InputError(
                f"the values of a Ramp for {name} have {sorted({len(row) for row in rows})} numbers: give one count"
            )
        full = tuple(tuple(row) if len(row) == width else tuple(row * width) for row in rows)
        return cls(name, float(unit), tuple(int(one) for one in ramp.steps), full)

    @property
    def constant(self) -> bool:
        """Whether it is the same at every step."""
        return len(self.steps) == 1

    def at(self, batch: Batch, steps: Tensor | None = None) -> Tensor:
        """(n_systems,) float64 for systems that have taken `steps` (n_systems,) int64 steps; 0 where None.

        A setting with one number for each system goes by `system_id`, so that it follows a system through refills.
        """
        table = torch.from_numpy(self._table).to(batch.device)
        rows = table.expand(-1, batch.n_systems) if len(self.values[0]) == 1 else table[:, self._index(batch)]
        if steps is None or self.constant:
            return rows[0].clone()
        at = torch.tensor(self.steps, dtype=torch.float64, device=batch.device)
        right = torch.searchsorted(at, steps.double(), right=True).clamp(1, len(self.steps) - 1)
        low, high = at[right - 1], at[right]
        part = ((steps.double() - low) / (high - low)).clamp(0.0, 1.0)
        below, above = (rows.gather(0, index[None])[0] for index in (right - 1, right))
        # Exactly the last value at the end: below + (above - below) may miss it by a rounding.
        return torch.where(part < 1.0, below + part * (above - below), above)

    @cached_property
    def _table(self) -> np.ndarray:
        return np.array(self.values) * self.unit

    def _index(self, batch: Batch) -> Tensor:
        count = len(self.values[0])
        ids = batch.get(SYSTEM_ID) if SYSTEM_ID in batch else torch.arange(batch.n_systems, device=batch.device)
        if batch.n_systems and bool(((ids < 0) | (ids >= count)).any()):
            stranger = int(ids[(ids < 0) | (ids >= count)][0])
            raise InputError(
                f"{self.name} has {count} values but there is a system with the id {stranger}: "
                "give one value, or one for each system_id, from 0 on"
            )
        return ids

    def shown(self) -> Any:
        """Plain values for messages and checkpoints: a number, a list, or {"steps": ..., "values": ...}."""
        rows = [row[0] if len(row) == 1 else list(row) for row in self.values]
        return rows[0] if self.constant else {"steps": list(self.steps), "values": rows}


def checked(name: str, value: PerSystem, *, positive: bool = False, signed: bool = False) -> list[float]:
    """The numbers of a setting, one or many; InputError names one that is not finite or too small."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "fiu" or array.ndim > 1 or array.size == 0:
        raise InputError(f"{name} must be a number, or one number for each system, got {value!r}")
    numbers = [float(one) for one in array.reshape(-1)]
    for one in numbers:
        if not math.isfinite(one) or (one < 0 and not signed) or (positive and one <= 0):
            least = "finite" if signed and not positive else f"{'positive' if positive else 'zero or more'} and finite"
            raise InputError(f"{name} must be {least}, got {one}")
    return numbers


def whole(name: str, value: int, least: int = 0) -> int:
    """A whole number of at least `least`; InputError names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a {'non-negative' if least == 0 else 'positive'} integer, got {value!r}")
    return value
