"""One model call for a batch: neighbours with a skin, finished systems left out, results written to the batch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.extra_inputs import FIELD, LEVELS, extra_inputs
from carryall.dynamics.status import PREVIOUS_ENERGY, SYSTEM_ID, atom_rows, keep_frozen
from carryall.dynamics.thermo import mobile
from carryall.graph.potential import Potential
from carryall.graph.skin import SkinNeighborList, Systems, UnsearchableError

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
        for new, old, version in zip(tensors, self.tensors, self.versions, strict=True):
            if version < 0:
                return False
            if new is not old and (new.data_ptr() != old.data_ptr() or new.shape != old.shape or new.is_inference()):
                return False
            if new._version != version:
                return False
        return True


@dataclass(frozen=True, eq=False)
class Members:
    """The systems of a model call and where they are in the batch."""

    of: Snapshot
    """What the choice was made from."""
    systems: Tensor | None
    """(k,) int64 systems of the batch; None for all."""
    atoms: Tensor | None
    """(m,) int64 atoms of the batch; None for all."""
    fixed: dict[str, Tensor]
    """The rows of them that no step changes, by the names of `Systems`."""

    def index(self, system: int) -> int:
        """Index in the batch of a system of the call."""
        return system if self.systems is None else int(self.systems[system])


class ForceEvaluator:
    """Evaluates a potential on a batch and knows for which positions the batch's forces are right."""

    def __init__(self, model: Potential, needs: Collection[str], owner: str, skin: float) -> None:
        self.model = model
        self.neighbors = SkinNeighborList(model.spec.cutoff, model.spec.type_map, skin)
        self._direct = getattr(model, "evaluate_systems", None)
        self._needs, self._owner = sorted(needs), owner
        self._current: Snapshot | None = None
        self._members: Members | None = None
        self._volume: tuple[Snapshot, Tensor] | None = None

    def is_current(self, batch: Batch) -> bool:
        """Whether energy and forces of the batch belong to its positions and cells."""
        if self._current is None or "forces" not in batch or "energy" not in batch:
            return False
        return self._current.holds(batch.positions, batch.cell, batch.atomic_numbers)

    def forget(self) -> None:
        """Take the forces of the batch as those of no positions."""
        self._current = None

    def mark_current(self, batch: Batch) -> None:
        """Take the forces of the batch as those of its positions: after a move that does not change them."""
        self._current = Snapshot.of(batch.positions, batch.cell, batch.atomic_numbers)

    def evaluate(self, batch: Batch, running: Tensor | None) -> dict[int, str]:
        """Write energy, forces, virial and stress of the running systems (n_systems,) bool, None for all, into the batch.

        Returns the systems that cannot go on, with the reason. When a system has no neighbour graph nothing was evaluated, and
        the call has to be repeated without it.
        """
        members = self._choose(batch, running)
        if members.systems is not None and not len(members.systems):
            self._write_missing(batch)
            self.mark_current(batch)
            return {}
        systems = self._systems(batch, members)
        try:
            output = None if self._direct is None else self._direct(self.neighbors, systems)
            if output is None:
                output = self.model(self.neighbors.graph(systems))
        except UnsearchableError as error:
            return {members.index(one): reason for one, reason in error.reasons.items()}
        output = {key: value.detach() for key, value in output.items()}
        self._check(output)
        self._write(batch, output, members, running)
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

    def _choose(self, batch: Batch, running: Tensor | None) -> Members:
        """Who takes part; chosen again only when another batch, or other systems, came."""
        mask = batch.ptr if running is None else running
        names = ("atomic_numbers", "pbc", SYSTEM_ID)
        inputs = (mask, batch.ptr, *(batch.get(name) for name in names))
        if self._members is not None and self._members.of.holds(*inputs):
            return self._members
        fixed = {"atomic_numbers": batch.atomic_numbers, "pbc": batch.pbc, "ids": batch.get(SYSTEM_ID)}
        if running is None:
            systems = atoms = None
            fixed |= {"system": batch.system, "ptr": batch.ptr}
        else:
            systems, atoms = running.nonzero().squeeze(1), atom_rows(running, batch).nonzero().squeeze(1)
            rows = {"atomic_numbers": atoms, "pbc": systems, "ids": systems}
            fixed = {name: value.index_select(0, rows[name]) for name, value in fixed.items()}
            counts = (batch.ptr[1:] - batch.ptr[:-1]).index_select(0, systems)
            fixed["ptr"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            fixed["system"] = torch.repeat_interleave(counts, output_size=len(atoms))
        self._members = Members(Snapshot.of(*inputs), systems, atoms, fixed)
        return self._members

    def _systems(self, batch: Batch, members: Members) -> Systems:
        values = {"positions": batch.positions, "cell": batch.cell}
        if any(FIELD.get(name, name) in batch for name in LEVELS):
            values |= {FIELD.get(name, name): value for name, value in extra_inputs(batch).items()}
        if members.systems is not None and members.atoms is not None:
            rows = {"system": members.systems, "atom": members.atoms}
            values = {name: value.index_select(0, rows[batch.level_of(name)]) for name, value in values.items()}
        return Systems(**values, **members.fixed)

    def _write(self, batch: Batch, output: dict[str, Tensor], members: Members, running: Tensor | None) -> None:
        if PREVIOUS_ENERGY in batch and "energy" in batch:
            batch.set(PREVIOUS_ENERGY, keep_frozen(running, batch.energy.double(), batch.get(PREVIOUS_ENERGY)))
        for key in SYSTEM_OUTPUTS:
            if key in output:
                _write(batch, key, output[key], "system", members.systems)
        for key in ATOM_OUTPUTS:
            if key in output:
                _write(batch, key, output[key], "atom", members.atoms)
        mask = mobile(batch)
        if mask is not None:
            batch.forces = torch.where(mask, batch.forces, 0.0)
        if "virial" in output:
            self.write_stress(batch)

    def write_stress(self, batch: Batch) -> None:
        """Stress (n_systems, 3, 3), eV/Å³, of the virial that the batch has; systems without a cell have none."""
        if self._volume is None or not self._volume[0].holds(batch.cell):
            volume = batch.volume.double()[:, None, None]
            self._volume = (Snapshot.of(batch.cell), torch.where(volume > 0, -1.0 / volume.clamp(min=1e-300), 0.0))
        # frozen systems have the virial and the cell that they had, and so the same stress
        batch.set("stress", batch.get("virial") * self._volume[1])

    def _write_missing(self, batch: Batch) -> None:
        if "energy" not in batch:
            batch.energy = batch.positions.new_full((batch.n_systems,), torch.nan, dtype=torch.float64)
        if "forces" not in batch:
            batch.forces = torch.zeros_like(batch.positions)


def _write(batch: Batch, key: str, value: Tensor, level: str, rows: Tensor | None) -> None:
    """Set a key: `value` at `rows` (None for all); other rows keep what they had."""
    if rows is not None:
        if key in batch:
            old = batch.get(key).to(value.dtype)
        else:
            length = batch.n_systems if level == "system" else batch.n_atoms
            old = value.new_full((length, *value.shape[1:]), torch.nan if key == "energy" else 0.0)
        value = old.index_copy(0, rows, value)
    batch.set(key, value, level=level)


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
