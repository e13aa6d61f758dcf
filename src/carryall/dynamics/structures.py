"""Structures as users have them, in; structures with results, out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.dynamics.status import SYSTEM_ID
from carryall.dynamics.thermo import MOVE_MASK, standard_masses
from carryall.errors import InputError
from carryall.graph.neighbor_search import neighbor_edges, type_indices
from carryall.graph.potential import Potential

if TYPE_CHECKING:
    import ase

OneStructure: TypeAlias = "AtomicData | ase.Atoms"
Structures: TypeAlias = "OneStructure | Batch | Iterable[OneStructure]"

CONTACT = 0.5
"""Å, reach of the search that finds coincident atoms; they are much closer."""
ERRORS = ("raise", "set_aside")


@dataclass(frozen=True, eq=False)
class Input:
    """One structure to work on, or the reason why it cannot be."""

    index: int
    data: AtomicData | None
    reason: str | None = None


def structure_list(structures: Structures) -> list[Any]:
    """One structure, a batch or many structures as a list; nothing is converted yet."""
    if isinstance(structures, Batch):
        return structures.to_data_list()
    if isinstance(structures, AtomicData) or hasattr(structures, "get_atomic_numbers"):
        return [structures]
    if isinstance(structures, (str, bytes)) or not isinstance(structures, Iterable):
        raise InputError(
            f"structures must be AtomicData, ase.Atoms, a Batch, or several of them, got {structures!r}: "
            "read a file with carryall.data.read_structures"
        )
    return list(structures)


def checked_input(index: int, structure: Any, potential: Potential) -> Input:
    """A structure that the potential can work on, or the reason why not."""
    try:
        data = structure if isinstance(structure, AtomicData) else _from_ase(structure)
        check_structure(data, potential)
    except InputError as error:
        return Input(index, structure if isinstance(structure, AtomicData) else None, str(error))
    return Input(index, data)


def check_structure(data: AtomicData, potential: Potential) -> None:
    """InputError for no atoms, an unknown element, positions that are not finite, a cell without volume, coincident atoms."""
    if data.n_atoms == 0:
        raise InputError("the structure has no atoms")
    type_indices(data.atomic_numbers, potential.spec.type_map)
    cell = torch.zeros(3, 3) if data.cell is None else data.cell
    positions = data.positions.detach().cpu().double().numpy()
    neighbor_edges(positions, cell.detach().cpu().double().numpy(), data.pbc.cpu().numpy(), CONTACT)


def check_inputs(structures: Sequence[Any], potential: Potential) -> None:
    """InputError with the index of the first structure that cannot be worked on."""
    for index, structure in enumerate(structures):
        found = checked_input(index, structure, potential)
        if found.reason is not None:
            raise InputError(f"structure {index}: {found.reason}")


def chunks(inputs: Iterable[Input], max_atoms: int) -> Iterator[list[Input]]:
    """Runs of inputs with at most `max_atoms` atoms together; a larger structure is alone. Unusable inputs pass too."""
    held: list[Input] = []
    atoms = 0
    for one in inputs:
        size = 0 if one.data is None else one.data.n_atoms
        if held and atoms + size > max_atoms:
            yield held
            held, atoms = [], 0
        held.append(one)
        atoms += size
    if held:
        yield held


def working_batch(inputs: Sequence[Input], velocities: bool = False) -> Batch:
    """A batch of what dynamics needs of the structures, float64; `system_id` is the input's index."""
    bare = []
    held = any(one.data is not None and MOVE_MASK in one.data.atom_extras for one in inputs)
    for one in inputs:
        assert one.data is not None
        data = one.data
        values: dict[str, Any] = {"masses": standard_masses(data.atomic_numbers) if data.masses is None else data.masses}
        if velocities:
            values["velocities"] = torch.zeros_like(data.positions) if data.velocities is None else data.velocities
        if held:
            values["atom_extras"] = {MOVE_MASK: _move_mask(data)}
        moving = AtomicData(data.positions, data.atomic_numbers, data.cell, data.pbc, **values)
        bare.append(moving.to(dtype=torch.float64))
    batch = Batch.from_data_list(bare)
    batch.set(SYSTEM_ID, torch.tensor([one.index for one in inputs]), level="system")
    return batch


def finished_structure(original: AtomicData, batch: Batch, index: int) -> AtomicData:
    """The original with the positions, cell, velocities and results that system `index` of the batch has.

    A system whose positions are not finite keeps the original's; one whose results are not finite has none.
    """
    rows = slice(int(batch.ptr[index]), int(batch.ptr[index + 1]))
    atom_keys = ["positions", *(["velocities"] if "velocities" in batch else [])]
    values: dict[str, Any] = {key: batch.get(key)[rows].clone() for key in atom_keys}
    if not all(bool(torch.isfinite(value).all()) for value in values.values()):
        return original.replace(energy=None, forces=None, stress=None)
    results: dict[str, Any] = {"energy": batch.energy[index].clone(), "forces": batch.forces[rows].clone()}
    if original.cell is not None:
        values["cell"] = batch.cell[index].clone()
        if "stress" in batch:
            results["stress"] = batch.stress[index].clone()
    usable = all(bool(torch.isfinite(value).all()) for value in results.values())
    labels = {"energy": None, "forces": None, "stress": None}
    return original.replace(**values, **{**labels, **(results if usable else {})})


def check_errors_argument(errors: str) -> None:
    """InputError unless it is "raise" or "set_aside"."""
    if errors not in ERRORS:
        raise InputError(f"errors must be one of {', '.join(map(repr, ERRORS))}, got {errors!r}")


def _move_mask(data: AtomicData) -> torch.Tensor:
    mask = data.atom_extras.get(MOVE_MASK)
    if mask is None:
        return torch.ones(data.n_atoms, 3, dtype=torch.bool)
    return mask.to(torch.bool).reshape(data.n_atoms, -1).expand(-1, 3)


def _from_ase(structure: Any) -> AtomicData:
    if not hasattr(structure, "get_atomic_numbers"):
        raise InputError(f"expected AtomicData or ase.Atoms, got {type(structure).__name__}")
    return AtomicData.from_ase(structure)
