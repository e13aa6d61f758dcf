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
FMAX = "fmax"
"""(n_systems,) float64, eV/Å: largest generalised force, where a stage relaxes the cell; criteria on it read this key then."""
REASON = "failure"
"""Key of `batch.info[i]` with the reason why system i failed."""


class Outcome(IntEnum):
    """Why a system stopped; RUNNING until it does."""

    RUNNING = 0
    CONVERGED = 1
    STEP_BUDGET = 2
    FAILED = 3


def ensure_keys(batch: Batch, entry_status: int = 0) -> None:
    """Add the bookkeeping keys that the batch lacks: all running in the entry stage, numbered by their order."""
    count, device = batch.n_systems, batch.device
    if STATUS not in batch:
        batch.set(STATUS, torch.full((count,), entry_status, dtype=torch.int64, device=device), level="system")
    if OUTCOME not in batch:
        batch.set(OUTCOME, torch.full((count,), int(Outcome.RUNNING), dtype=torch.int64, device=device), level="system")
    if SYSTEM_ID not in batch:
        batch.set(SYSTEM_ID, torch.arange(count, device=device), level="system")


def reopen(batch: Batch, entry_status: int = 0) -> None:
    """Set systems that an earlier dynamics brought to its end running again; failed ones stay aside."""
    outcome = batch.get(OUTCOME)
    again = (outcome == Outcome.CONVERGED) | (outcome == Outcome.STEP_BUDGET)
    batch.set(STATUS, batch.get(STATUS).masked_fill(again, entry_status))
    batch.set(OUTCOME, outcome.masked_fill(again, int(Outcome.RUNNING)))


def atom_rows(mask: Tensor, batch: Batch) -> Tensor:
    """(n_atoms,) of a value per system."""
    return mask.index_select(0, batch.system)


def keep_frozen(mask: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` where `mask` (rows,) is true and `old`, bit for bit, elsewhere; None stands for all true."""
    if mask is None:
        return new
    return torch.where(mask.reshape(-1, *[1] * (new.dim() - 1)), new, old)
