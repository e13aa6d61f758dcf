"""ASE's Atoms in and out, and the file formats that ASE reads and writes. The only module of this room that imports ASE."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from carryall.data.atomic_data import AtomicData
from carryall.data.extra_inputs import take_spins, take_system_inputs
from carryall.data.extxyz import select_frames
from carryall.data.fields import FIELDS
from carryall.data.labels import LabelKeys, full_stress, take_labels
from carryall.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    import ase

_OWN_ARRAYS = ("numbers", "positions", "momenta", "masses", "initial_charges", "initial_magmoms")


def import_ase() -> ModuleType:
    """The `ase` package; MissingDependencyError with the command that installs it."""
    try:
        import ase
    except ImportError:
        raise MissingDependencyError("this needs ASE, which is not installed: pip install 'carryall[ase]'") from None
    return ase


def from_ase(atoms: ase.Atoms, keys: LabelKeys | None = None) -> AtomicData:
    """The structure of an `ase.Atoms`; nothing is computed.

    Labels are what the calculator holds for exactly this structure, and label keys in `atoms.info` and `atoms.arrays`, with the
    precedence of the extended XYZ reader (REF_ and dft_ keys before plain results). info["fparam"] and info["charge_spin"]
    become system_extras. Spins are arrays["spin"], (n_atoms, 3), else magnetic moments. FixAtoms and FixCartesian become
    atom_extras["move_mask"], (n_atoms, 3) bool, true where an atom may move; another constraint is left out with a warning.
    """
    info = dict(atoms.info)
    columns = {name: np.array(array) for name, array in atoms.arrays.items() if name not in _OWN_ARRAYS}
    results = _results(atoms)
    info.update({name: results[name] for name in ("energy", "stress") if name in results})
    system_extras = take_system_inputs(info)
    columns.update({name: results[name] for name in ("forces",) if name in results})
    cell = np.array(atoms.cell.array) if atoms.cell.any() else None
    values: dict[str, Any] = take_labels(info, columns, cell, keys or LabelKeys())
    if atoms.has("masses"):
        values["masses"] = atoms.get_masses()
    if atoms.has("momenta"):
        values["velocities"] = atoms.get_velocities()
    for field, result, array in (("charges", "charges", "initial_charges"), ("spins", "magmoms", "initial_magmoms")):
        if result in results or atoms.has(array):
            values[field] = results[result] if result in results else atoms.arrays[array]
    if (vectors := take_spins(columns)) is not None:
        values["spins"] = vectors
    if atoms.constraints:
        mask = _move_mask(atoms)
        if not mask.all():
            columns["move_mask"] = mask
    text = {name: column.astype(str) for name, column in columns.items() if column.dtype.kind not in "fiub"}
    extras = {f"{name}_column" if name in FIELDS else name: column for name, column in columns.items() if name not in text}
    text = {f"{name}_column" if name in info else name: column for name, column in text.items()}
    return AtomicData(
        atoms.get_positions(),
        atoms.get_atomic_numbers(),
        cell,
        atoms.get_pbc(),
        info={**info, **text},
        atom_extras=extras,
        system_extras=system_extras,
        **values,
    )


def to_ase(data: AtomicData) -> ase.Atoms:
    """An `ase.Atoms`; labels go to a SinglePointCalculator, system_extras to `info`, atom_extras to `arrays`, edges nowhere."""
    import_ase()
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    info = {**data.info, **{name: _array(value) for name, value in data.system_extras.items()}}
    text = {name: value for name, value in info.items() if _is_text_column(value, data.n_atoms)}
    atoms = Atoms(
        numbers=_array(data.atomic_numbers),
        positions=_array(data.positions),
        cell=None if data.cell is None else _array(data.cell),
        pbc=_array(data.pbc),
        masses=None if data.masses is None else _array(data.masses),
        charges=None if data.charges is None else _array(data.charges),
        magmoms=None if data.spins is None else _array(data.spins),
        info={name: value for name, value in info.items() if name not in text},
    )
    if data.velocities is not None:
        atoms.set_velocities(_array(data.velocities))
    for name, column in {**data.atom_extras, **text}.items():
        if name == "move_mask":
            atoms.set_constraint(_constraints(_array(data.atom_extras[name])))
        else:
            atoms.set_array(name, _array(column) if isinstance(column, Tensor) else column)
    labels: dict[str, Any] = {}
    if data.energy is not None:
        labels["energy"] = float(data.energy)
    if data.forces is not None:
        labels["forces"] = _array(data.forces)
    if data.stress is not None:
        stress = _array(data.stress)
        labels["stress"] = ((stress + stress.T) / 2)[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    if labels:
        atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def read_ase(path: Path, index: int | slice | None, keys: LabelKeys, format: str | None = None) -> list[AtomicData]:
    """Structures of a file that ASE reads; errors name file and frame."""
    import_ase()
    from ase.io import read
    from ase.io.formats import UnknownFileTypeError

    try:
        images = read(path, index=":", format=format)
    except UnknownFileTypeError as error:
        raise InputError(
            f"{path}: neither carryall nor ASE knows this kind of file ({error}): "
            "give .extxyz, a DeePMD npy folder, .cif, .traj, .db, POSCAR or another format of ASE"
        ) from None
    except Exception as error:  # ASE's readers raise whatever their parsing meets
        raise InputError(f"{path}: ASE cannot read it: {type(error).__name__}: {error}") from error
    pairs = list(enumerate(images))
    if not pairs:
        raise InputError(f"{path}: the file holds no structure")
    found = []
    for number, atoms in pairs if index is None else select_frames(pairs, index, path):
        try:
            found.append(from_ase(atoms, keys))
        except InputError as error:
            raise InputError(f"{path}: frame {number}: {error}") from None
    return found


def write_ase(path: Path, structures: Sequence[AtomicData], format: str | None = None) -> None:
    """Write through ASE, in the format of the suffix unless given."""
    import_ase()
    from ase.io import write
    from ase.io.formats import UnknownFileTypeError

    images = [to_ase(data) for data in structures]
    try:
        write(path, images if len(images) > 1 else images[0], format=format)
    except UnknownFileTypeError as error:
        raise InputError(
            f"neither carryall nor ASE knows the suffix of {path.name} ({error}): give .extxyz, .traj, .cif, ..."
        ) from None
    except (ValueError, NotImplementedError, KeyError) as error:
        raise InputError(f"ASE cannot write {len(images)} structures to {path.name}: {error}") from error


def _results(atoms: ase.Atoms) -> dict[str, Any]:
    """Results that the calculator holds for exactly this structure."""
    if atoms.calc is None:
        return {}
    found: dict[str, Any] = {}
    for name in ("energy", "forces", "stress", "charges", "magmoms"):
        if getattr(atoms.calc, "results", {}).get(name) is None:
            continue
        value = atoms.calc.get_property(name, atoms, allow_calculation=False)
        if value is not None:
            found[name] = full_stress(value) if name == "stress" else value
    return found


def _move_mask(atoms: ase.Atoms) -> np.ndarray:
    from ase.constraints import FixAtoms, FixCartesian

    mask = np.ones((len(atoms), 3), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            mask[constraint.index] = False
        elif isinstance(constraint, FixCartesian):
            mask[constraint.index] &= ~constraint.mask
        else:
            name = type(constraint).__name__
            warnings.warn(f"constraint {name} is left out: only FixAtoms and FixCartesian are kept", stacklevel=3)
    return mask


def _constraints(mask: np.ndarray) -> list[Any]:
    from ase.constraints import FixAtoms, FixCartesian

    fixed = ~(mask if mask.ndim == 2 else np.repeat(mask[:, None], 3, axis=1)).astype(bool)
    whole = fixed.all(1)
    found: list[Any] = [FixAtoms(mask=whole)] if whole.any() else []
    partial = np.flatnonzero(fixed.any(1) & ~whole)
    return found + [FixCartesian(int(atom), mask=fixed[atom]) for atom in partial]


def _is_text_column(value: Any, n_atoms: int) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "U" and value.ndim in (1, 2) and len(value) == n_atoms


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
