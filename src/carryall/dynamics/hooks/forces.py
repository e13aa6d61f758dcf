"""Hooks that change the forces of a potential after every evaluation, the one before the first step too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.status import atom_rows, keep_frozen
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine

BiasFunction: TypeAlias = Callable[[Batch], Mapping[str, Tensor]]


class BiasPotential:
    """Adds a function's energies and forces to the potential's: restraints, walls, fields.

    function: of the batch, returns {"energy": (n_systems,) eV, "forces": (n_atoms, 3) eV/Å}, and "virial" (n_systems, 3, 3) eV,
    without which the bias does not act on cells that change. By the batch's `system_id` it may treat systems differently; it
    must depend on a system's own rows only. Convergence, conserved energy and constraints see the sum. The energy of the bias
    alone is kept as the batch's key `NAME_energy`; two biases need two names. A system whose bias is not finite is set aside.
    """

    stages: tuple[HookStageEnum, ...] = ()
    frequency = 1

    def __init__(self, function: BiasFunction, name: str = "bias") -> None:
        if not callable(function):
            raise InputError(f"BiasPotential needs a function of a batch, got {function!r}")
        self.function, self.name = function, name

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Nothing: the work is done by `on_forces`."""

    def on_forces(self, batch: Batch, dynamics: Engine, mask: Tensor | None) -> None:
        """Add the bias to systems that were evaluated."""
        found = self._bias(batch)
        for key, value in found.items():
            if key in batch:
                rows = None if mask is None else atom_rows(mask, batch) if key == "forces" else mask
                batch.set(key, keep_frozen(rows, batch.get(key) + value, batch.get(key)))
        own = f"{self.name}_energy"
        old = batch.get(own) if own in batch else torch.zeros_like(found["energy"])
        batch.set(own, keep_frozen(mask, found["energy"], old), level="system")
        if "virial" in found and "virial" in batch:
            dynamics.host.evaluator.write_stress(batch)
        if not bool(torch.isfinite(found["energy"].sum() + found["forces"].sum())):
            self._set_aside(batch, dynamics, found, mask)

    def _bias(self, batch: Batch) -> dict[str, Tensor]:
        found = self.function(batch)
        shapes = {"energy": (batch.n_systems,), "forces": (batch.n_atoms, 3), "virial": (batch.n_systems, 3, 3)}
        if not isinstance(found, Mapping) or not {"energy", "forces"} <= found.keys() <= shapes.keys():
            shown = list(found) if isinstance(found, Mapping) else repr(found)
            raise InputError(f'the function of BiasPotential must return "energy", "forces" and perhaps "virial", got {shown}')
        for key, value in found.items():
            if tuple(value.shape) != shapes[key]:
                raise InputError(
                    f"the function of BiasPotential returned {key} of shape {tuple(value.shape)}, expected {shapes[key]}"
                )
        return {key: value.detach() for key, value in found.items()}

    def _set_aside(self, batch: Batch, dynamics: Engine, found: dict[str, Tensor], mask: Tensor | None) -> None:
        rows = (~torch.isfinite(found["forces"]).all(1)).long()
        bad = torch.zeros_like(batch.ptr[1:]).index_add(0, batch.system, rows) > 0
        bad = bad | ~torch.isfinite(found["energy"])
        for index in (bad if mask is None else bad & mask).nonzero().squeeze(1).tolist():
            dynamics.set_aside(batch, index, f"energy or forces of {self.name} are not finite")


class MaxForceClamp:
    """Scales forces that exceed `max_force`, eV/Å, down to it, their direction kept: to get past bad starting structures.

    This changes the physics: clamped forces are no derivative of the energy, total momentum and total energy are not conserved,
    and a relaxation takes longer. Use it for the first steps only, as a stage of its own.
    """

    stages: tuple[HookStageEnum, ...] = ()
    frequency = 1

    def __init__(self, max_force: float = 50.0) -> None:
        if not max_force > 0:
            raise InputError(f"max_force must be positive, got {max_force}")
        self.max_force = float(max_force)

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Nothing: the work is done by `on_forces`."""

    def on_forces(self, batch: Batch, dynamics: Engine, mask: Tensor | None) -> None:
        """Clamp the forces of systems that were evaluated."""
        squared = batch.forces.square()
        size = torch.sqrt((squared[:, 0] + squared[:, 1]) + squared[:, 2])
        large = size > self.max_force
        if mask is not None:
            large = large & atom_rows(mask, batch)
        scale = torch.where(large, self.max_force / size, 1.0)
        batch.forces = torch.where(large[:, None], batch.forces * scale[:, None], batch.forces)
