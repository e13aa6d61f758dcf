"""Settings that are one number for all systems or one for each, brought to one row a system."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.errors import InputError

PerSystem: TypeAlias = float | Sequence[float] | np.ndarray | Tensor


def checked(name: str, value: PerSystem, *, positive: bool = False) -> list[float]:
    """The numbers of a setting, one or many; InputError names one that is not finite or too small."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "fiu" or array.ndim > 1 or array.size == 0:
        raise InputError(f"{name} must be a number, or one number for each system, got {value!r}")
    numbers = [float(one) for one in array.reshape(-1)]
    for one in numbers:
        if not math.isfinite(one) or one < 0 or (positive and one == 0):
            raise InputError(f"{name} must be {'positive' if positive else 'zero or more'} and finite, got {one}")
    return numbers


def per_system(name: str, numbers: Sequence[float], batch: Batch) -> Tensor:
    """(n_systems,) float64 of one number for all, or one each."""
    if len(numbers) not in (1, batch.n_systems):
        raise InputError(f"{name} has {len(numbers)} values for {batch.n_systems} systems: give one, or one for each system")
    row = torch.tensor(list(numbers), dtype=torch.float64, device=batch.device)
    return row.expand(batch.n_systems).clone()


def shown(numbers: Sequence[float]) -> float | list[float]:
    """One number where there is one, for messages."""
    return numbers[0] if len(numbers) == 1 else list(numbers)
