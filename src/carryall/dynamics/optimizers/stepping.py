"""What the optimizers do alike: make the filter of their options, write a step into a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics, DynamicsOptions
from carryall.dynamics.optimizers.cell_filters import CellFilter, FixedCell, Moved
from carryall.dynamics.optimizers.cell_settings import OptimizerOptions, take_cell_settings
from carryall.dynamics.status import atom_rows, keep_frozen


def split_options(options: OptimizerOptions) -> tuple[FixedCell | CellFilter, DynamicsOptions]:
    """What is moved, and the options that every dynamics takes."""
    settings = take_cell_settings(options)
    return FixedCell() if settings is None else CellFilter(settings), cast(DynamicsOptions, options)


def write_step(
    dynamics: BaseDynamics, batch: Batch, mask: Tensor | None, moved: Moved, state: Mapping[str, Tensor | None]
) -> None:
    """Positions, cell and state of the systems where `mask` (n_systems,) is true; the others stay bit for bit."""
    atoms = None if mask is None else atom_rows(mask, batch)
    for name, value in state.items():
        if value is not None:
            key = dynamics.key(name)
            batch.set(key, keep_frozen(atoms if name in dynamics.atom_state else mask, value, batch.get(key)))
    batch.positions = keep_frozen(atoms, moved.positions, batch.positions)
    if moved.cell is not None:
        batch.cell = keep_frozen(mask, moved.cell, batch.cell)
