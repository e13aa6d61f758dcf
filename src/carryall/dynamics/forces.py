"""One model call for a batch: neighbours with a skin, finished systems left out, results written to the batch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.extra_inputs import FIELD, extra_inputs
from carryall.dynamics.status import EVALUATED, OUTCOME, PREVIOUS_ENERGY, STATUS, Outcome, atom_rows, keep_frozen
from carryall.dynamics.thermo import mobile
from carryall.errors import InputError
from carryall.graph.neighbor_search import SkinNeighborList, neighbor_edges
from carryall.graph.potential import Potential

COMPACT_BELOW = 0.8
"""Finished systems leave the model call when running ones hold less than this part of its atoms: a new search costs too."""
NOT_FINITE = "energy or forces are not finite"
SYSTEM_OUTPUTS = ("energy", "virial")
ATOM_OUTPUTS = ("forces", "magnetic_forces")


@dataclass(frozen=True)
class Snapshot:
    """Tensors as they were: tells whether a tensor was exchanged or changed in place since."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, *tensors: Tensor) -> Snapshot:
        """Keeps the tensors alive, so that their memory is not given to others."""
        return cls(tensors, tuple(-1 if one.is_inference() else one._version for one in tensors))

    def holds(self, *tensors: Tensor) -> bool:
        """Whether these are the same tensors, untouched; never true in inference mode, which keeps no count of changes."""
        return all(
            version >= 0
            and new.data_ptr() == old.data_ptr()
            and new.shape == old.shape
            and not new.is_inference()
            and new._version == version
            for new, old, version in zip(tensors, self.tensors, self.versions, strict=True)
        )


@dataclass(frozen=True)
class Selection:
    """The systems of one model call: the fields that a neighbour search reads, and where they are in the batch."""

    positions: Tensor
    atomic_numbers: Tensor
    system: Tensor
    cell: Tensor
    pbc: Tensor
    systems: Tensor | None
    """(k,) int64 systems of the batch; None for all."""
    atoms: Tensor | None
    """(m,) int64 atoms of the batch; None for all."""
    fparam: Tensor | None = None
    aparam: Tensor | None = None
    spins: Tensor | None = None
    charge_spin: Tensor | None = None

    def system_of(self, index: int) -> int:
        """Index in the batch of a system of the call."""
        return index if self.systems is None else int(self.systems[index])


class ForceEvaluator:
    """Evaluates a potential on a batch and knows for which positions the batch's forces are right."""

    def __init__(self, model: Potential, needs: Collection[str], owner: str, skin: float) -> None:
        self.model = model
        self.neighbors = SkinNeighborList(model.spec.cutoff, model.spec.type_map, skin)
        self._needs, self._owner = sorted(needs), owner
        self._current: Snapshot | None = None
        self._members: tuple[Snapshot, Tensor | None, Tensor | None] | None = None

    def is_current(self, batch: Batch) -> bool:
        """Whether energy and forces of the batch belong to its positions and cells."""
        if self._current is None or "forces" not in batch or "energy" not in batch:
            return False
        return self._current.holds(batch.positions, batch.cell, batch.atomic_numbers)

    def mark_current(self, batch: Batch) -> None:
        """Take the forces of the batch as those of its positions: after a move that does not change them."""
        self._current = Snapshot.of(batch.positions, batch.cell, batch.atomic_numbers)

    def evaluate(self, batch: Batch, running: Tensor | None) -> dict[int, str]:
        """Write energy, forces, virial and stress of the running systems (n_systems,) bool, None for all, into the batch.

        Returns the systems that cannot go on, with the reason. When a system has no neighbour graph nothing was evaluated, and
        the call has to be repeated without it.
        """
        chosen = self._select(batch, running)
        if chosen.cell.shape[0] == 0:
            self._write_missing(batch)
            self.mark_current(batch)
            return {}
        try:
            graph = self.neighbors.graph(cast(Batch, chosen))
        except InputError:
            found = _unsearchable(chosen, self.neighbors.cutoff)
            if not found:
                raise
            return {chosen.system_of(index): reason for index, reason in found.items()}
        output = {key: value.detach() for key, value in self.model(graph).items()}
        self._check(output)
        self._write(batch, output, chosen, running)
        self.mark_current(batch)
        return _not_finite(batch, output, running)

    def _check(self, output: dict[str, Tensor]) -> None:
        for key in self._needs:
            if key not in output:
                outputs = ", ".join(sorted(output))
                raise RuntimeError(
                    f"{self._owner} needs {key!r}, which {type(self.model).__name__} does not return (it returns {outputs}): "
                    f"use a potential that computes {key!r}"
                )

    def _select(self, batch: Batch, running: Tensor | None) -> Selection:
        systems, atoms = self._membership(batch, running)
        if systems is None or atoms is None:
            return Selection(
                batch.positions, batch.atomic_numbers, batch.system, batch.cell, batch.pbc, None, None, **_inputs(batch)
            )
        rows = {"system": systems, "atom": atoms}
        extra = {name: value.index_select(0, rows[batch.level_of(name)]) for name, value in _inputs(batch).items()}
        place = torch.full((batch.n_systems,), -1, dtype=torch.int64, device=batch.device)
        place[systems] = torch.arange(len(systems), device=batch.device)
        return Selection(
            batch.positions.index_select(0, atoms),
            batch.atomic_numbers.index_select(0, atoms),
            place.index_select(0, batch.system.index_select(0, atoms)),
            batch.cell.index_select(0, systems),
            batch.pbc.index_select(0, systems),
            systems,
            atoms,
            **extra,
        )

    def _membership(self, batch: Batch, running: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Systems and atoms of the model call; kept on the batch, so that a restarted run makes the same calls."""
        evaluated, outcome, status = batch.get(EVALUATED), batch.get(OUTCOME), batch.get(STATUS)
        if self._members is not None and self._members[0].holds(evaluated, outcome, status):
            return self._members[1:]
        running = torch.ones_like(evaluated) if running is None else running
        sizes = batch.ptr[1:] - batch.ptr[:-1]
        wanted = running | (evaluated & (outcome != Outcome.FAILED))
        if int(sizes[running].sum()) < COMPACT_BELOW * int(sizes[wanted].sum()):
            wanted = running
        if not torch.equal(wanted, evaluated):
            batch.set(EVALUATED, wanted)
            evaluated = batch.get(EVALUATED)
        systems = None if bool(wanted.all()) else wanted.nonzero().squeeze(1)
        atoms = None if systems is None else atom_rows(wanted, batch).nonzero().squeeze(1)
        self._members = (Snapshot.of(evaluated, outcome, status), systems, atoms)
        return systems, atoms

    def _write(self, batch: Batch, output: dict[str, Tensor], chosen: Selection, running: Tensor | None) -> None:
        if PREVIOUS_ENERGY in batch and "energy" in batch:
            batch.set(PREVIOUS_ENERGY, keep_frozen(running, batch.energy.double(), batch.get(PREVIOUS_ENERGY)))
        for key in SYSTEM_OUTPUTS:
            if key in output:
                _write(batch, key, output[key], "system", chosen.systems, running)
        moving = None if running is None else atom_rows(running, batch)
        for key in ATOM_OUTPUTS:
            if key in output:
                _write(batch, key, output[key], "atom", chosen.atoms, moving)
        mask = mobile(batch)
        if mask is not None:
            batch.forces = torch.where(mask, batch.forces, 0.0)
        if "virial" in output:
            volume = batch.volume.double()[:, None, None]
            stress = torch.where(volume > 0, -batch.get("virial") / volume.clamp(min=1e-300), 0.0)
            _write(batch, "stress", stress, "system", None, running)

    def _write_missing(self, batch: Batch) -> None:
        if "energy" not in batch:
            batch.energy = batch.positions.new_full((batch.n_systems,), torch.nan, dtype=torch.float64)
        if "forces" not in batch:
            batch.forces = torch.zeros_like(batch.positions)


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """What potentials take beside the geometry, by its names in a batch."""
    return {FIELD.get(name, name): value for name, value in extra_inputs(batch).items()}


def _write(batch: Batch, key: str, value: Tensor, level: str, rows: Tensor | None, mask: Tensor | None) -> None:
    """Set a key: `value` at `rows` (None for all) and, of these, where `mask` is true; other rows keep what they had."""
    known = key in batch
    if known:
        old = batch.get(key).to(value.dtype)
    else:
        length = batch.n_systems if level == "system" else batch.n_atoms
        old = value.new_full((length, *value.shape[1:]), torch.nan if key == "energy" else 0.0)
    new = value if rows is None else old.index_copy(0, rows, value)
    batch.set(key, keep_frozen(mask if known else None, new, old), level=level)


def _not_finite(batch: Batch, output: dict[str, Tensor], running: Tensor | None) -> dict[int, str]:
    # One number tells for all: NaN and infinities survive a sum.
    if bool(torch.isfinite(output["energy"].sum() + output["forces"].sum())):
        return {}
    bad = ~torch.isfinite(batch.energy)
    rows = (~torch.isfinite(batch.forces).all(1)).long()
    bad = bad | (torch.zeros_like(bad, dtype=torch.int64).index_add(0, batch.system, rows) > 0)
    if running is not None:
        bad = bad & running
    return {int(index): NOT_FINITE for index in bad.nonzero()}


def _unsearchable(chosen: Selection, cutoff: float) -> dict[int, str]:
    """Systems of the call that have no neighbour graph, with the search's own words."""
    found: dict[int, str] = {}
    positions, cell, pbc = (value.detach().cpu().numpy() for value in (chosen.positions, chosen.cell, chosen.pbc))
    system = chosen.system.cpu().numpy()
    for index in range(len(cell)):
        try:
            neighbor_edges(positions[system == index], cell[index], pbc[index], cutoff)
        except InputError as error:
            found[index] = str(error)
    return found
