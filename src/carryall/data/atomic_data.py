"""One structure: atoms, an optional cell, and optional labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from carryall.data.elements import N_ELEMENTS, SYMBOLS
from carryall.data.fields import FIELDS, OF_EXTRAS, ArrayLike, as_tensor, check_finite
from carryall.errors import InputError

if TYPE_CHECKING:
    import ase


@dataclass(frozen=True, eq=False, init=False, repr=False)
class AtomicData:
    """One structure, immutable. Lists and numpy arrays are copied to tensors; floating-point dtypes are kept.

    >>> water = AtomicData([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]], [8, 1, 1], energy=-14.2)
    >>> water.n_atoms, water.positions.dtype, water.pbc.tolist()
    (3, torch.float64, [False, False, False])
    """

    positions: Tensor
    """(n_atoms, 3) float, Å."""
    atomic_numbers: Tensor
    """(n_atoms,) int64."""
    cell: Tensor | None
    """(3, 3) float, Å, rows are lattice vectors; None (also for nine zeros) where there is no cell."""
    pbc: Tensor
    """(3,) bool, periodic along each cell vector; True with a cell and False without one unless given."""
    velocities: Tensor | None
    """(n_atoms, 3) float, Å per ASE time unit (`carryall.data.units.fs` of them make a femtosecond)."""
    masses: Tensor | None
    """(n_atoms,) float, amu; None stands for the standard atomic weights."""
    charges: Tensor | None
    """(n_atoms,) float, e."""
    spins: Tensor | None
    """(n_atoms,) or (n_atoms, 3) float, Bohr magnetons."""
    forces: Tensor | None
    """(n_atoms, 3) float, eV/Å, label."""
    energy: Tensor | None
    """() float, eV, label."""
    stress: Tensor | None
    """(3, 3) float, eV/Å³, label; ASE's sign, tension is positive: (dE/dstrain) / volume."""
    edge_index: Tensor | None
    """(n_edges, 2) int64, atom indices of each edge."""
    info: dict[str, Any]
    """Free-form facts that travel with the structure."""
    atom_extras: dict[str, Tensor]
    """Further per-atom tensors, (n_atoms, ...), by name."""
    system_extras: dict[str, Tensor]
    """Further tensors of the whole structure, any shape, by name."""
    edge_extras: dict[str, Tensor]
    """Further per-edge tensors, (n_edges, ...), by name."""

    def __init__(
        self,
        positions: ArrayLike,
        atomic_numbers: ArrayLike,
        cell: ArrayLike | None = None,
        pbc: ArrayLike | None = None,
        velocities: ArrayLike | None = None,
        masses: ArrayLike | None = None,
        charges: ArrayLike | None = None,
        spins: ArrayLike | None = None,
        forces: ArrayLike | None = None,
        energy: ArrayLike | None = None,
        stress: ArrayLike | None = None,
        edge_index: ArrayLike | None = None,
        info: Mapping[str, Any] | None = None,
        atom_extras: Mapping[str, ArrayLike] | None = None,
        system_extras: Mapping[str, ArrayLike] | None = None,
        edge_extras: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        given: dict[str, ArrayLike | None] = {
            "positions": positions,
            "atomic_numbers": atomic_numbers,
            "cell": cell,
            "pbc": pbc,
            "velocities": velocities,
            "masses": masses,
            "charges": charges,
            "spins": spins,
            "forces": forces,
            "energy": energy,
            "stress": stress,
            "edge_index": edge_index,
        }
        values = _standard_fields(given)
        n_atoms = len(values["positions"])
        extras = {
            "atom": _extras("atom", atom_extras, n_atoms),
            "system": _extras("system", system_extras, None),
            "edge": _extras("edge", edge_extras, None),
        }
        _check_edges(values.get("edge_index"), extras["edge"], n_atoms)
        _check_distinct(extras)
        _assign(self, values, extras, dict(info or {}))

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return self.positions.shape[0]

    @property
    def n_edges(self) -> int:
        """Number of edges; 0 without edge data."""
        for value in (self.edge_index, *self.edge_extras.values()):
            if value is not None:
                return value.shape[0]
        return 0

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.positions.device

    @property
    def symbols(self) -> list[str]:
        """Chemical symbol of each atom."""
        return [SYMBOLS[number] for number in self.atomic_numbers.tolist()]

    @property
    def volume(self) -> float:
        """Volume of the cell, Å³; 0 without a cell."""
        return 0.0 if self.cell is None else abs(float(torch.linalg.det(self.cell.detach().double())))

    def replace(self, **changes: Any) -> AtomicData:
        """A copy with some fields exchanged, checked like a new structure."""
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise InputError(f"AtomicData has no field {name!r}: it has {', '.join(sorted(known))}")
        return AtomicData(**{**{name: getattr(self, name) for name in known}, **changes})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AtomicData:
        """The structure on another device, its floating-point tensors in another dtype."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        values = {name: moved(value) for name in FIELDS if (value := getattr(self, name)) is not None}
        extras = {level: {k: moved(v) for k, v in getattr(self, name).items()} for level, name in OF_EXTRAS.items()}
        return unchecked(values, extras, dict(self.info))

    @classmethod
    def from_ase(cls, atoms: ase.Atoms) -> AtomicData:
        """The structure of an `ase.Atoms`, with the labels that its calculator holds; nothing is computed."""
        from carryall.data.ase import from_ase

        return from_ase(atoms)

    def to_ase(self) -> ase.Atoms:
        """An `ase.Atoms`; labels go to a SinglePointCalculator. Edge data has no place there and is left out."""
        from carryall.data.ase import to_ase

        return to_ase(self)

    def __repr__(self) -> str:
        labels = [name for name in ("energy", "forces", "stress") if getattr(self, name) is not None]
        periodic = "".join(axis for axis, on in zip("abc", self.pbc.tolist(), strict=True) if on) or "none"
        return f"AtomicData({formula(self)}, {self.n_atoms} atoms, periodic: {periodic}, labels: {', '.join(labels) or 'none'})"


def unchecked(values: Mapping[str, Tensor], extras: Mapping[str, dict[str, Tensor]], info: dict[str, Any]) -> AtomicData:
    """A structure from tensors that are known to fit, such as a batch's: NaN (a fill, a run that exploded) passes."""
    data = object.__new__(AtomicData)
    _assign(data, values, extras, info)
    return data


def formula(data: AtomicData) -> str:
    """Chemical formula, elements in the order of first appearance, such as `O64H128`."""
    counts: dict[int, int] = {}
    for number in data.atomic_numbers.tolist():
        counts[number] = counts.get(number, 0) + 1
    return "".join(f"{SYMBOLS[number]}{count if count > 1 else ''}" for number, count in counts.items()) or "empty"


def _assign(
    data: AtomicData, values: Mapping[str, Tensor], extras: Mapping[str, dict[str, Tensor]], info: dict[str, Any]
) -> None:
    for name in FIELDS:
        object.__setattr__(data, name, values.get(name))
    for level, name in OF_EXTRAS.items():
        object.__setattr__(data, name, extras.get(level, {}))
    object.__setattr__(data, "info", info)


def _standard_fields(given: Mapping[str, ArrayLike | None]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name, value in given.items():
        if value is not None:
            values[name] = as_tensor(name, value, FIELDS[name].kind)
    if values["positions"].numel() == 0:
        values["positions"] = values["positions"].reshape(0, 3)
    if "pbc" in values and values["pbc"].dim() == 0:
        values["pbc"] = values["pbc"].repeat(3)
    if "energy" in values and values["energy"].numel() == 1:
        values["energy"] = values["energy"].reshape(())
    if "edge_index" in values and values["edge_index"].numel() == 0:
        values["edge_index"] = values["edge_index"].reshape(0, 2)
    n_atoms = len(values["positions"]) if values["positions"].dim() else 0
    for name, value in values.items():
        _check_shape(name, value, n_atoms)
        if FIELDS[name].kind == "float":
            check_finite(name, value, FIELDS[name].level)
    if "cell" in values and not bool(values["cell"].any()):
        del values["cell"]
    if "pbc" not in values:
        values["pbc"] = torch.full((3,), "cell" in values, device=values["positions"].device)
    _check_atoms(values)
    return values


def _check_shape(name: str, value: Tensor, n_atoms: int) -> None:
    field = FIELDS[name]
    if field.level == "edge":
        expected = [(value.shape[0] if value.dim() else 0, *row) for row in field.row_shapes]
    else:
        lead = (n_atoms,) if field.level == "atom" else ()
        expected = [(*lead, *row) for row in field.row_shapes]
    if tuple(value.shape) not in expected:
        wanted = " or ".join(str(shape) for shape in expected)
        where = f" for {n_atoms} atoms" if field.level == "atom" and name != "positions" else ""
        wanted = "(n_atoms, 3)" if name == "positions" else "(n_edges, 2)" if name == "edge_index" else wanted
        raise InputError(f"{name} has shape {tuple(value.shape)}, expected {wanted}{where}")


def _check_atoms(values: Mapping[str, Tensor]) -> None:
    numbers = values["atomic_numbers"]
    bad = ((numbers < 1) | (numbers > N_ELEMENTS)).nonzero()
    if len(bad):
        atom = int(bad[0])
        raise InputError(f"atomic number of atom {atom} is {int(numbers[atom])}, expected 1 to {N_ELEMENTS}")
    masses = values.get("masses")
    if masses is not None and not bool((masses > 0).all()):
        atom = int((masses <= 0).nonzero()[0])
        raise InputError(f"mass of atom {atom} is {float(masses[atom])} amu: expected a positive number")


def _extras(level: str, given: Mapping[str, ArrayLike] | None, n_rows: int | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in (given or {}).items():
        if name in FIELDS:
            raise InputError(f"{OF_EXTRAS[level]} holds {name!r}, which is a field of its own: give it as {name}=")
        tensor = as_tensor(f"{OF_EXTRAS[level]}[{name!r}]", value)
        if level != "system" and tensor.dim() == 0:
            raise InputError(f"{OF_EXTRAS[level]}[{name!r}] is a single value: expected one row per {level}")
        if n_rows is not None and len(tensor) != n_rows:
            raise InputError(f"{OF_EXTRAS[level]}[{name!r}] has {len(tensor)} rows, expected {n_rows}, one per {level}")
        found[name] = tensor
    return found


def _check_edges(edge_index: Tensor | None, extras: Mapping[str, Tensor], n_atoms: int) -> None:
    lengths = {name: len(value) for name, value in {"edge_index": edge_index, **extras}.items() if value is not None}
    if len(set(lengths.values())) > 1:
        raise InputError(f"edge data must have one row per edge, got {lengths}")
    if edge_index is not None:
        bad = ((edge_index < 0) | (edge_index >= n_atoms)).any(1).nonzero()
        if len(bad):
            edge = int(bad[0])
            raise InputError(f"edge_index[{edge}] is {edge_index[edge].tolist()}, expected atoms 0 to {n_atoms - 1}")


def _check_distinct(extras: Mapping[str, Mapping[str, Tensor]]) -> None:
    level_of: dict[str, str] = {}
    for level, values in extras.items():
        for name in values:
            if name in level_of:
                raise InputError(f"{name!r} is in {OF_EXTRAS[level_of[name]]} and in {OF_EXTRAS[level]}: rename one")
            level_of[name] = level
