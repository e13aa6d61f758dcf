"""What became of each system: status codes, outcomes, and the bookkeeping keys of a batch."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from carryall.data.batch import Batch

STATUS = "status"
"""(n_systems,) int64: the stage that a system is in; at or above the exit status it is done and frozen."""
OUTCOME = "outcome"
"""(n_systems,) int64: an `Outcome`."""
SYSTEM_ID = "system_id"
"""(n_systems,) int64: names a system for good, whatever batch it is in; noise and results go by it."""
PREVIOUS_ENERGY = "previous_energy"
"""(n_systems,) float64, eV: energy before the last evaluation, kept where a criterion asks for it."""
EVALUATED = "evaluated"
"""(n_systems,) bool: whether a system is still part of the model call."""
REASON = "failure"
"""Key of `batch.info[i]` with the reason why system i failed."""


class Outcome(IntEnum):
    """Why a system stopped; RUNNING until it does."""

    RUNNING = 0
    CONVERGED = 1
    STEP_BUDGET = 2
    FAILED = 3


def ensure_keys(batch: Batch) -> None:
    """Add the bookkeeping keys that the batch lacks: all running, numbered by their order."""
    count, device = batch.n_systems, batch.device
    defaults = {
        STATUS: torch.zeros(count, dtype=torch.int64, device=device),
        OUTCOME: torch.full((count,), int(Outcome.RUNNING), dtype=torch.int64, device=device),
        SYSTEM_ID: torch.arange(count, device=device),
        EVALUATED: torch.ones(count, dtype=torch.bool, device=device),
    }
    for key, value in defaults.items():
        if key not in batch:
            batch.set(key, value, level="system")


def reopen_converged(batch: Batch) -> None:
    """Set systems that an earlier dynamics converged running again; failed ones stay aside."""
    again = batch.get(OUTCOME) == Outcome.CONVERGED
    batch.set(STATUS, batch.get(STATUS).masked_fill(again, 0))
    batch.set(OUTCOME, batch.get(OUTCOME).masked_fill(again, int(Outcome.RUNNING)))


def atom_rows(mask: Tensor, batch: Batch) -> Tensor:
    """(n_atoms,) of a value per system."""
    return mask.index_select(0, batch.system)


def keep_frozen(mask: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` where `mask` (rows,) is true and `old`, bit for bit, elsewhere; None stands for all true."""
    if mask is None:
        return new
    return torch.where(mask.reshape(-1, *[1] * (new.dim() - 1)), new, old)
