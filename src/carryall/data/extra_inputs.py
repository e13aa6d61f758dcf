"""What some potentials take beside the geometry, by DeePMD's names: `fparam` and `charge_spin` of a whole structure, `aparam`
and `spin` of each atom.

A structure carries them as `system_extras["fparam"]`, `system_extras["charge_spin"]`, `atom_extras["aparam"]` and `spins`, an
`ase.Atoms` in `info`, in `arrays` and as initial magnetic moments, a DeePMD folder as fparam.npy and so on, extended XYZ in
the comment line and in columns. Spins are vectors here: one number for each atom, a collinear moment, is no input of a
potential.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carryall.data.atomic_data import AtomicData
from carryall.errors import InputError

LEVELS = {"fparam": "system", "aparam": "atom", "spin": "atom", "charge_spin": "system"}
FIELD = {"spin": "spins"}
"""Where a structure or a batch has an input under another name."""
OF_SYSTEM = tuple(name for name, level in LEVELS.items() if level == "system")
HOW = {
    "fparam": "system_extras['fparam'] of AtomicData, info['fparam'] of ase.Atoms",
    "aparam": "atom_extras['aparam'] of AtomicData, arrays['aparam'] of ase.Atoms",
    "spin": "spins of AtomicData, initial magnetic moments or arrays['spin'] of ase.Atoms, as vectors, (n_atoms, 3)",
    "charge_spin": "system_extras['charge_spin'] of AtomicData, info['charge_spin'] of ase.Atoms",
}


def extra_inputs(batch: Any) -> dict[str, Tensor]:
    """fparam and charge_spin (n_systems, width), aparam (n_atoms, width) and spin (n_atoms, 3) of a batch, as far as it has
    them; float64.

    `batch`: a Batch, or anything else with `cell`, `positions` and attributes of these names (`spins` for spin). A row of NaN
    stands for a system or an atom that has none.
    """
    found = {}
    for name, level in LEVELS.items():
        value = getattr(batch, FIELD.get(name, name), None)
        if value is not None and not _is_collinear(name, value):
            found[name] = _rows(name, value, len(batch.cell if level == "system" else batch.positions))
    return found


def structure_inputs(data: AtomicData) -> dict[str, Tensor]:
    """fparam and charge_spin (1, width), aparam (n_atoms, width) and spin (n_atoms, 3) of one structure, float64 and finite, as
    far as it has them."""
    found = {}
    for name, level in LEVELS.items():
        extras = data.system_extras if level == "system" else data.atom_extras
        value = data.spins if name == "spin" else extras.get(name)
        if value is None or _is_collinear(name, value):
            continue
        found[name] = _rows(name, value, 1 if level == "system" else data.n_atoms)
        bad = (~torch.isfinite(found[name])).any(1).nonzero()
        if len(bad):
            where = "" if level == "system" else f" of atom {int(bad[0])}"
            raise InputError(f"{name}{where} is {found[name][int(bad[0])].tolist()}: expected finite numbers")
    return found


def input_extras(data: AtomicData) -> dict[str, Any]:
    """The keywords of AtomicData that carry the inputs of another structure, and none of its other extras."""
    found = structure_inputs(data)
    return {
        "system_extras": {name: found[name][0] for name in OF_SYSTEM if name in found},
        "atom_extras": {name: found[name] for name in ("aparam",) if name in found},
        **({"spins": found["spin"]} if "spin" in found else {}),
    }


def missing_inputs(structures: Sequence[AtomicData]) -> dict[str, float]:
    """What `Batch.from_data_list` has to fill in for structures of which some have an input and others have none."""
    having = {name: sum(name in one.system_extras for one in structures) for name in OF_SYSTEM}
    having["aparam"] = sum("aparam" in one.atom_extras for one in structures)
    having["spins"] = sum(one.spins is not None for one in structures)
    return {name: float("nan") for name, count in having.items() if 0 < count < len(structures)}


def complete_input(name: str, value: Tensor | None, n_rows: int, width: int, default: Sequence[float] | None = None) -> Tensor:
    """(n_rows, width) values of an input for a potential that needs them, with `default` where there are none.

    Rows are missing where `value` is None or NaN. InputError names the first rows that are missing without a default, and a
    width that does not fit.
    """
    owner = LEVELS[name]
    if value is None:
        value = torch.full((n_rows, width), torch.nan, dtype=torch.float64)
    if value.shape[1] != width:
        raise InputError(f"{name} has {value.shape[1]} values for each {owner}, the potential needs {width}: {HOW[name]}")
    absent = torch.isnan(value).any(1)
    if default is not None:
        return torch.where(absent[:, None], torch.tensor(default, dtype=value.dtype, device=value.device), value)
    rows = absent.nonzero().reshape(-1).tolist()
    if rows:
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        needed = f"{width} value{'s' if width > 1 else ''} for each {owner}"
        raise InputError(f"{name} is missing for {owner} {shown}: the potential needs {needed} ({HOW[name]})")
    return value


def take_system_inputs(info: dict[str, Any]) -> dict[str, np.ndarray]:
    """`fparam` and `charge_spin` as system extras, taken out of free-form `info`, where files and ASE keep them."""
    found = {}
    for name in OF_SYSTEM:
        if name not in info:
            continue
        array = np.asarray(info[name])
        if array.dtype.kind not in "fiub":
            raise InputError(f"{name} is {info[name]!r}: expected numbers")
        del info[name]
        found[name] = array.astype(np.float64).reshape(-1)
    return found


def take_spins(columns: dict[str, np.ndarray]) -> np.ndarray | None:
    """(n_atoms, 3) of a column "spin", which is taken out of `columns`; None where there is none of that shape."""
    column = columns.get("spin")
    if column is None or column.dtype.kind not in "fiu" or column.shape[1:] != (3,):
        return None
    return columns.pop("spin")


def ase_extras(info: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The keywords of AtomicData that carry the inputs in an `ase.Atoms`' `info` and `arrays`.

    Spins are arrays["spin"], and initial magnetic moments where there are none.
    """
    atom = {"aparam": np.array(arrays["aparam"], dtype=np.float64)} if "aparam" in arrays else {}
    spins = next((arrays[name] for name in ("spin", "initial_magmoms") if name in arrays and arrays[name].ndim == 2), None)
    found: dict[str, Any] = {"system_extras": take_system_inputs(dict(info)), "atom_extras": atom}
    return found if spins is None else {**found, "spins": np.array(spins, dtype=np.float64)}


def _is_collinear(name: str, value: Tensor) -> bool:
    return name == "spin" and value.dim() == 1


def _rows(name: str, value: Tensor, n_rows: int) -> Tensor:
    if value.dtype == torch.bool or value.is_complex():
        raise InputError(f"{name} must be numbers, got {str(value.dtype).removeprefix('torch.')}")
    # explicit width: a batch may hold no rows at all
    width = value.numel() // n_rows if n_rows else int(np.prod(value.shape[1:]))
    return value.to(torch.float64).reshape(n_rows, width)
