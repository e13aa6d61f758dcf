"""When a system is done: criteria on the keys of a batch, combined with AND."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import largest_over_ranks, system_sizes
from carryall.dynamics.status import PREVIOUS_ENERGY
from carryall.errors import InputError, nearest

REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "min": torch.amin,
    "max": torch.amax,
    "norm": lambda value, dim: torch.linalg.vector_norm(value, dim=dim),
    "mean": torch.mean,
    "sum": torch.sum,
}
ENERGY_CHANGES = ("energy_change", "energy_change_per_atom")
COMPUTED = ("fmax", *ENERGY_CHANGES)
DEFAULT_FMAX = 0.05


@dataclass(frozen=True)
class ConvergenceCriterion:
    """One condition: the reduced value of `key` is at most `threshold`.

    A value per atom counts as the largest in its system. Rows with more than one number are reduced first: by `reduce_op` over
    `reduce_dims` (axes of the tensor other than the first; default all), by the norm without `reduce_op`. Components of forces
    count by their size, never their sign. Computed keys: `fmax` (eV/Å, the largest force), `energy_change` and
    `energy_change_per_atom` (eV, size of the change since the evaluation before).
    """

    key: str
    threshold: float
    reduce_op: str | None = None
    reduce_dims: int | tuple[int, ...] | None = None
    custom_op: Callable[[Tensor], Tensor] | None = None
    """Called with the tensor as it is; returns one bool per system."""

    def __post_init__(self) -> None:
        if not isinstance(self.key, str) or not self.key:
            raise InputError(f"the key of a convergence criterion must be a name, got {self.key!r}")
        if self.reduce_op is not None and self.reduce_op not in REDUCTIONS:
            hint = nearest(self.reduce_op, REDUCTIONS)
            raise InputError(f"reduce_op must be one of {', '.join(REDUCTIONS)}, got {self.reduce_op!r}{hint}")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)) or self.threshold != self.threshold:
            raise InputError(f"the threshold of criterion {self.key!r} must be a number, got {self.threshold!r}")

    def converged(self, batch: Batch) -> Tensor:
        """(n_systems,) bool; NaN never converges."""
        value, level = read_key(batch, self.key)
        if self.custom_op is not None:
            return _checked_mask(self, self.custom_op(value), batch.n_systems)
        if self.key == "forces":
            value = value.abs()
        rows = self._rows(value)
        if level != "system":
            # NaN wins every maximum, and is below no threshold
            offsets = batch.ptr if level == "atom" else batch.edge_ptr
            rows = torch.segment_reduce(rows.double(), "max", offsets=offsets, initial=-torch.inf, unsafe=True)
            rows = largest_over_ranks(batch, rows)
        return rows <= self.threshold

    def _rows(self, value: Tensor) -> Tensor:
        if value.dim() == 1:
            return value
        dims = tuple(range(1, value.dim())) if self.reduce_dims is None else self.reduce_dims
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        dims = tuple(dim % value.dim() for dim in dims)
        if 0 in dims:
            raise InputError(f"reduce_dims of criterion {self.key!r} holds the first axis, which counts systems or atoms")
        reduced = REDUCTIONS[self.reduce_op or "norm"](value, dim=dims)
        return reduced if reduced.dim() == 1 else reduced.flatten(1).amax(1)


Criteria: TypeAlias = (
    ConvergenceCriterion | Mapping[str, Any] | Iterable[ConvergenceCriterion | Mapping[str, Any]] | float | None
)


class ConvergenceHook:
    """All criteria together (AND), looked at every `frequency` steps; by default fmax <= 0.05 eV/Å."""

    def __init__(self, criteria: Criteria = None, frequency: int = 1) -> None:
        if isinstance(frequency, bool) or not isinstance(frequency, int) or frequency < 1:
            raise InputError(f"ConvergenceHook has frequency {frequency!r}: expected an integer of at least 1")
        self.criteria = _parse(criteria)
        self.frequency = frequency

    @classmethod
    def from_fmax(cls, threshold: float = DEFAULT_FMAX, frequency: int = 1) -> ConvergenceHook:
        """Largest force of a system at most `threshold`, eV/Å."""
        return cls(ConvergenceCriterion("fmax", threshold), frequency)

    @classmethod
    def from_forces(cls, threshold: float = DEFAULT_FMAX, frequency: int = 1) -> ConvergenceHook:
        """Norm of every atom's force at most `threshold`, eV/Å: the same condition, read from the key `forces`."""
        return cls(ConvergenceCriterion("forces", threshold, reduce_op="norm"), frequency)

    @property
    def num_criteria(self) -> int:
        """Number of criteria."""
        return len(self.criteria)

    @property
    def needs_previous_energy(self) -> bool:
        """Whether a criterion compares with the evaluation before."""
        return any(criterion.key in ENERGY_CHANGES for criterion in self.criteria)

    def converged(self, batch: Batch) -> Tensor:
        """(n_systems,) bool. A system without atoms never converges."""
        mask = system_sizes(batch) > 0
        for criterion in self.criteria:
            mask = mask & criterion.converged(batch)
        return mask

    def evaluate(self, batch: Batch) -> Tensor | None:
        """(k,) int64 indices of the converged systems, None when there are none."""
        found = self.converged(batch).nonzero().squeeze(1)
        return found if len(found) else None

    def __repr__(self) -> str:
        parts = [f"{c.key} <= {c.threshold:g}" if c.custom_op is None else f"custom({c.key})" for c in self.criteria]
        return f"ConvergenceHook({' and '.join(parts)})"


def read_key(batch: Batch, key: str) -> tuple[Tensor, str]:
    """Tensor and level of a key of the batch, or of one of the computed keys; a missing key is a KeyError."""
    if key in batch:
        return batch.get(key), batch.level_of(key)
    if key == "fmax" and "forces" in batch:
        return torch.linalg.vector_norm(batch.forces, dim=1), "atom"
    if key in ENERGY_CHANGES and "energy" in batch and PREVIOUS_ENERGY in batch:
        change = (batch.energy - batch.get(PREVIOUS_ENERGY)).abs()
        return (change if key == "energy_change" else change / system_sizes(batch).clamp(min=1)), "system"
    known = [*batch.keys(), *(name for name in COMPUTED if name not in batch)]
    raise KeyError(
        f"the batch has no key {key!r} for the convergence criterion{nearest(key, known)}; it has {', '.join(known)}"
    )


def _checked_mask(criterion: ConvergenceCriterion, mask: Any, n_systems: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (n_systems,):
        found = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
        raise InputError(f"custom_op of criterion {criterion.key!r} returned {found}, expected ({n_systems},) of torch.bool")
    return mask


def _parse(criteria: Criteria) -> tuple[ConvergenceCriterion, ...]:
    if criteria is None:
        return (ConvergenceCriterion("fmax", DEFAULT_FMAX),)
    if isinstance(criteria, ConvergenceCriterion):
        return (criteria,)
    if isinstance(criteria, (int, float)):
        return (ConvergenceCriterion("fmax", criteria),)
    if isinstance(criteria, Mapping):
        known = [field.name for field in fields(ConvergenceCriterion)]
        for name in criteria:
            if name not in known:
                raise InputError(
                    f"a convergence criterion has no {name!r}: it has {', '.join(known)}{nearest(str(name), known)}"
                )
        if missing := [name for name in ("key", "threshold") if name not in criteria]:
            raise InputError(f"a convergence criterion needs {' and '.join(missing)}, got {dict(criteria)}")
        return (ConvergenceCriterion(**criteria),)
    found = tuple(one for item in criteria for one in _parse(item))
    if not found:
        raise InputError("ConvergenceHook got an empty list of criteria, which every system would meet: give at least one")
    return found
