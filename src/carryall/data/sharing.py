"""A batch that holds one rank's part of a large system: some of its atoms, and its system-level rows, which all ranks have.

Whoever adds up over a system's atoms, or counts them, does it here; where ranks share the system the sums go over all of them,
so that what is computed of them (thermostats, barostats, convergence) is the same on each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.levels import Columns
from carryall.errors import InputError

ATOM_INDEX = "atom_index"
"""(n_atoms,) int64: the place of an atom in its whole system, where a batch holds a part of one."""


class SharedAtoms(Protocol):
    """The ranks that have the atoms of one system; its methods are collective."""

    @property
    def n_atoms(self) -> int:
        """Atoms of the whole system."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, float64 or int64, bit by bit the same on each."""
        ...

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over ranks of each of `values` (k,), float64."""
        ...


def share(batch: Batch, shared: SharedAtoms) -> None:
    """Say that a batch of one system, with the key `atom_index`, holds a part of it only."""
    if batch.n_systems != 1:
        raise InputError(f"ranks share the atoms of one system, the batch has {batch.n_systems}")
    batch.level_of(ATOM_INDEX)
    batch._shared = shared


def system_sizes(batch: Batch) -> Tensor:
    """(n_systems,) int64 atoms of each system, those on other ranks too."""
    counts = batch.ptr[1:] - batch.ptr[:-1]
    return counts if batch._shared is None else torch.full_like(counts, batch._shared.n_atoms)


def system_sums(batch: Batch, rows: Tensor) -> Tensor:
    """(n_systems, ...) sums of `rows` (n_atoms, ...) over the atoms of each system."""
    return over_ranks(batch, rows.new_zeros(batch.n_systems, *rows.shape[1:]).index_add(0, batch.system, rows))


def over_ranks(batch: Batch, sums: Tensor) -> Tensor:
    """Sums over the atoms that the batch holds, made whole."""
    return sums if batch._shared is None else batch._shared.total(sums)


def largest_over_ranks(batch: Batch, values: Tensor) -> Tensor:
    """(n_systems,) maxima over the atoms that the batch holds, made those over all."""
    return values if batch._shared is None else batch._shared.largest(values)


def hold_atoms(batch: Batch, rows: Mapping[str, Tensor]) -> None:
    """Give the only system of a batch other atoms, in place: rows of every key of that level."""
    old = batch._columns
    if rows.keys() != old.values["atom"].keys() or batch.n_systems != 1:
        raise InputError(f"expected rows of {sorted(old.values['atom'])} for one system, got {sorted(rows)}")
    values = {**old.values, "atom": dict(rows)}
    batch._use(Columns(np.array([len(rows["positions"])]), old.edge_counts, values, old.info))
