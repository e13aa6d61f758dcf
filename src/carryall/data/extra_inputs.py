"""What some potentials take beside the geometry: `fparam` of a whole structure and `aparam` of each atom (DeePMD's names).

A structure carries them as `system_extras["fparam"]` and `atom_extras["aparam"]`, an `ase.Atoms` as `info["fparam"]` and
`arrays["aparam"]`, a DeePMD folder as fparam.npy and aparam.npy, extended XYZ in the comment line and in a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carryall.data.atomic_data import AtomicData
from carryall.errors import InputError

LEVELS = {"fparam": "system", "aparam": "atom"}
HOW = {
    "fparam": "system_extras['fparam'] of AtomicData, info['fparam'] of ase.Atoms",
    "aparam": "atom_extras['aparam'] of AtomicData, arrays['aparam'] of ase.Atoms",
}


def extra_inputs(batch: Any) -> dict[str, Tensor]:
    """fparam (n_systems, width) and aparam (n_atoms, width) of a batch, float64, as far as it has them.

    `batch`: a Batch, or anything else with `cell`, `positions` and attributes of these names. A row of NaN stands for a system
    or an atom that has none.
    """
    found = {}
    for name, level in LEVELS.items():
        value = getattr(batch, name, None)
        if value is not None:
            n_rows = len(batch.cell if level == "system" else batch.positions)
            found[name] = _rows(name, value, n_rows)
    return found


def structure_inputs(data: AtomicData) -> dict[str, Tensor]:
    """fparam (1, width) and aparam (n_atoms, width) of one structure, float64 and finite, as far as it has them."""
    found = {}
    for name, level in LEVELS.items():
        value = (data.system_extras if level == "system" else data.atom_extras).get(name)
        if value is None:
            continue
        found[name] = _rows(name, value, 1 if level == "system" else data.n_atoms)
        bad = (~torch.isfinite(found[name])).any(1).nonzero()
        if len(bad):
            where = "" if level == "system" else f" of atom {int(bad[0])}"
            raise InputError(f"{name}{where} is {found[name][int(bad[0])].tolist()}: expected finite numbers")
    return found


def input_extras(data: AtomicData) -> dict[str, Any]:
    """The keywords of AtomicData that carry fparam and aparam of another structure, and none of its other extras."""
    found = structure_inputs(data)
    return {
        "system_extras": {name: found[name][0] for name in ("fparam",) if name in found},
        "atom_extras": {name: found[name] for name in ("aparam",) if name in found},
    }


def missing_inputs(structures: Sequence[AtomicData]) -> dict[str, float]:
    """What `Batch.from_data_list` has to fill in for structures of which some have fparam or aparam and others have none."""
    names = {"fparam": [one.system_extras for one in structures], "aparam": [one.atom_extras for one in structures]}
    having = {name: sum(name in extras for extras in several) for name, several in names.items()}
    return {name: float("nan") for name, count in having.items() if 0 < count < len(structures)}


def complete_input(name: str, value: Tensor | None, n_rows: int, width: int, default: Sequence[float] | None = None) -> Tensor:
    """(n_rows, width) values of `fparam` or `aparam` for a potential that needs them, with `default` where there are none.

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


def take_fparam(info: dict[str, Any]) -> dict[str, np.ndarray]:
    """`fparam` as a system extra, taken out of free-form `info`, where files and ASE keep it."""
    if "fparam" not in info:
        return {}
    array = np.asarray(info["fparam"])
    if array.dtype.kind not in "fiub":
        raise InputError(f"fparam is {info['fparam']!r}: expected numbers")
    del info["fparam"]
    return {"fparam": array.astype(np.float64).reshape(-1)}


def ase_extras(info: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The keywords of AtomicData that carry fparam and aparam of an `ase.Atoms`' `info` and `arrays`."""
    atom = {"aparam": np.array(arrays["aparam"], dtype=np.float64)} if "aparam" in arrays else {}
    return {"system_extras": take_fparam(dict(info)), "atom_extras": atom}


def _rows(name: str, value: Tensor, n_rows: int) -> Tensor:
    if value.dtype == torch.bool or value.is_complex():
        raise InputError(f"{name} must be numbers, got {str(value.dtype).removeprefix('torch.')}")
    # explicit width: a batch may hold no rows at all
    width = value.numel() // n_rows if n_rows else int(np.prod(value.shape[1:]))
    return value.to(torch.float64).reshape(n_rows, width)
