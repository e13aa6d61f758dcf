"""Structures as users have them, in; structures with results, out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from carryall.data.atomic_data import AtomicData, unchecked
from carryall.data.batch import Batch
from carryall.data.extra_inputs import complete_input, structure_inputs
from carryall.data.fields import FIELDS, OF_EXTRAS
from carryall.dynamics.blobs import LABELS
from carryall.dynamics.samplers import Unreadable
from carryall.dynamics.thermo import MOVE_MASK
from carryall.errors import InputError
from carryall.graph.neighbor_search import neighbor_edges, type_indices
from carryall.graph.potential import Potential, PotentialSpec

if TYPE_CHECKING:
    import ase

OneStructure: TypeAlias = "AtomicData | ase.Atoms | Sourced | Unreadable"
Structures: TypeAlias = "OneStructure | Batch | Iterable[OneStructure]"

Check: TypeAlias = Callable[[AtomicData], None]
CONTACT = 2.0
"""Å, reach of the search that finds coincident atoms; they are much closer, but a search with tiny bins takes longer."""
ERRORS = ("raise", "set_aside")


@dataclass(frozen=True, eq=False)
class Sourced:
    """A structure that came from a file, or why it could not be read."""

    data: AtomicData | None
    source: str
    """Name of the file."""
    frame: int | None = None
    """Its place in the file."""
    reason: str | None = None
    """Why there is no structure."""


@dataclass(frozen=True, eq=False)
class Input:
    """One structure to work on, or the reason why it cannot be."""

    index: int
    data: AtomicData | None
    reason: str | None = None
    source: str | None = None
    frame: int | None = None


def structure_iterable(structures: Structures) -> Any:
    """One structure, a batch or many structures as something to go through; nothing is read or converted yet."""
    if isinstance(structures, Batch):
        return structures.to_data_list()
    if isinstance(structures, (AtomicData, Sourced)) or hasattr(structures, "get_atomic_numbers"):
        return [structures]
    indexed = hasattr(structures, "__len__") and hasattr(structures, "__getitem__")
    if isinstance(structures, (str, bytes, Mapping)) or not (indexed or isinstance(structures, Iterable)):
        raise InputError(
            f"structures must be AtomicData, ase.Atoms, a Batch, or several of them, got {structures!r}: "
            "read a file with carryall.data.read_structures"
        )
    return structures


def each(structures: Any) -> Iterator[Any]:
    """What `structure_iterable` gave, one by one; `Unreadable` where an indexed data set fails."""
    if isinstance(structures, (list, tuple)) or not hasattr(structures, "__getitem__"):
        yield from structures
        return
    for index in range(len(structures)):
        try:
            item = structures[index]
        except Exception as error:  # a data set of the user's may raise anything
            item = Unreadable(str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")
        yield item


def first_index_of(structures: Any) -> int:
    """Number of the first of many structures: their `first_index` where they are a shard of a larger run, else 0."""
    return int(getattr(structures, "first_index", 0))


def checked_input(index: int, structure: Any, check: Check) -> Input:
    """A structure that can be worked on, or the reason why not: what `check` says in an InputError."""
    one = read_input(index, structure)
    if one.data is None or one.reason is not None:
        return one
    try:
        check(one.data)
    except InputError as error:
        return replace(one, reason=str(error))
    return one


def read_input(index: int, structure: Any) -> Input:
    """A structure as AtomicData, not yet checked, or the reason why there is none."""
    if isinstance(structure, Sourced):
        if structure.data is None:
            return Input(index, None, structure.reason or "it could not be read", structure.source, structure.frame)
        return Input(index, structure.data, None, structure.source, structure.frame)
    if isinstance(structure, Unreadable):
        return Input(index, None, structure.reason)
    try:
        return Input(index, structure if isinstance(structure, AtomicData) else _from_ase(structure))
    except InputError as error:
        return Input(index, None, str(error))


def check_structure(data: AtomicData, potential: Potential) -> None:
    """InputError for no atoms, an unknown element, positions that are not finite, a cell without volume, coincident atoms, and
    for what the potential takes beside the geometry and the structure has not."""
    if data.n_atoms == 0:
        raise InputError("the structure has no atoms")
    type_indices(data.atomic_numbers, potential.spec.type_map)
    if MOVE_MASK in data.atom_extras and data.atom_extras[MOVE_MASK].numel() not in (data.n_atoms, 3 * data.n_atoms):
        shape = tuple(data.atom_extras[MOVE_MASK].shape)
        raise InputError(f"move_mask has shape {shape}, expected ({data.n_atoms}, 3) or ({data.n_atoms},)")
    _check_inputs(data, potential.spec)
    cell = torch.zeros(3, 3) if data.cell is None else data.cell
    positions = data.positions.detach().cpu().double().numpy()
    neighbor_edges(positions, cell.detach().cpu().double().numpy(), data.pbc.cpu().numpy(), CONTACT)


def _check_inputs(data: AtomicData, spec: PotentialSpec) -> None:
    """InputError for a structure that lacks what the potential takes beside the geometry."""
    if not spec.extra_inputs:
        return
    found = structure_inputs(data)
    needs = {
        "fparam": (1, spec.dim_fparam, spec.default_fparam),
        "aparam": (data.n_atoms, spec.dim_aparam, None),
        "spin": (data.n_atoms, 3, None),
        "charge_spin": (1, spec.dim_chg_spin, spec.default_chg_spin),
    }
    for name in spec.extra_inputs:
        complete_input(name, found.get(name), *needs[name])


def check_all(inputs: Iterable[Input]) -> None:
    """InputError with the index of the first structure that cannot be worked on."""
    for one in inputs:
        if one.reason is not None:
            raise InputError(f"structure {one.index}: {one.reason}")


def finished_structure(original: AtomicData, batch: Batch, index: int) -> AtomicData:
    """The original with the positions, cell, velocities and results that system `index` of the batch has.

    A system whose positions are not finite keeps the original's; one whose results are not finite has none.
    """
    rows = slice(int(batch.ptr[index]), int(batch.ptr[index + 1]))
    values = {key: batch.get(key)[rows].clone() for key in ("positions", "velocities") if key in batch}
    results = {"energy": batch.energy[index].clone(), "forces": batch.forces[rows].clone()}
    if original.cell is not None:
        values["cell"] = batch.cell[index].clone()
        if "stress" in batch:
            results["stress"] = batch.stress[index].clone()
    kept = {name: value for name in FIELDS if name not in LABELS and (value := getattr(original, name)) is not None}
    if _all_finite(values):
        kept |= values | (results if _all_finite(results) else {})
    extras = {level: dict(getattr(original, name)) for level, name in OF_EXTRAS.items()}
    return unchecked(kept, extras, dict(original.info))


def _all_finite(values: Mapping[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values.values())


def check_errors_argument(errors: str) -> None:
    """InputError unless it is "raise" or "set_aside"."""
    if errors not in ERRORS:
        raise InputError(f"errors must be one of {', '.join(map(repr, ERRORS))}, got {errors!r}")


def _from_ase(structure: Any) -> AtomicData:
    if not hasattr(structure, "get_atomic_numbers"):
        raise InputError(f"expected AtomicData or ase.Atoms, got {type(structure).__name__}")
    return AtomicData.from_ase(structure)
