"""A list of structures as a data set: checked, split, summed up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from carryall.data.atomic_data import AtomicData
from carryall.data.elements import SYMBOLS
from carryall.data.fields import check_finite
from carryall.errors import InputError

_LABELS = ("energy", "forces", "stress")


def check_structures(structures: Sequence[AtomicData]) -> None:
    """InputError with the first structure that cannot be used: no atoms, a NaN, or a periodic cell without volume."""
    if not structures:
        raise InputError("no structures: give at least one")
    for number, data in enumerate(structures):
        try:
            _check(data)
        except InputError as error:
            raise InputError(f"structure {number}: {error}") from None


def _check(data: AtomicData) -> None:
    if data.n_atoms == 0:
        raise InputError("it has no atoms: remove it")
    for name in ("positions", "cell", *_LABELS):
        value = getattr(data, name)
        if value is not None:
            check_finite(name, value, "atom" if name in ("positions", "forces") else "system")
    if not bool(data.pbc.any()):
        return
    vectors = torch.zeros(3, 3) if data.cell is None else data.cell
    periodic = vectors.detach().double()[data.pbc]
    lengths = periodic.norm(dim=1)
    # Gram determinant: the square of the length, area or volume that the periodic vectors span.
    spanned = float(torch.linalg.det(periodic @ periodic.T).clamp(min=0).sqrt())
    if spanned <= 1e-8 * float(lengths.prod()):
        raise InputError(f"it is periodic but its cell has no volume ({vectors.tolist()}): give a cell or set pbc to false")


def split_structures(structures: Sequence[AtomicData], fractions: Sequence[float], seed: int = 0) -> list[list[AtomicData]]:
    """Parts by a shuffle that depends on `seed` and the number of structures only; each part keeps the input's order.

    fractions: one a part, from 0 to 1, at most 1 together. A part whose fraction is positive gets at least one structure.
    """
    wanted = np.asarray(fractions, dtype=np.float64)
    if wanted.ndim != 1 or not wanted.size or not np.isfinite(wanted).all() or (wanted < 0).any() or wanted.sum() > 1 + 1e-9:
        raise InputError(f"fractions must be from 0 to 1 and at most 1 together, got {list(fractions)}")
    if (wanted > 0).sum() > len(structures):
        raise InputError(f"{len(structures)} structures cannot make {int((wanted > 0).sum())} parts of at least one each")
    # Rounded ends of the cumulated fractions: the parts' sizes sum to the whole.
    ends = np.round(np.cumsum(wanted) * len(structures)).astype(int)
    sizes = np.diff(ends, prepend=0)
    while ((sizes == 0) & (wanted > 0)).any():
        short = int(np.flatnonzero((sizes == 0) & (wanted > 0))[0])
        sizes[short] += 1
        if sizes.sum() > len(structures):
            sizes[int(sizes.argmax())] -= 1
    order = np.random.default_rng(seed).permutation(len(structures))
    parts = np.split(order, np.cumsum(sizes))[: len(sizes)]
    return [[structures[i] for i in np.sort(part).tolist()] for part in parts]


def summary(structures: Sequence[AtomicData]) -> dict[str, Any]:
    """Facts for a table of the data.

    frames; atoms (all), atoms_min, atoms_max (a frame); elements (symbols by atomic number); energy_per_atom_mean and
    energy_per_atom_std (eV); force_rms (eV/Å, of components); with_energy, with_forces, with_stress and periodic (numbers of
    frames). Statistics over what has the label; None where nothing has it.
    """
    sizes = [data.n_atoms for data in structures]
    energies = np.array([float(data.energy) / data.n_atoms for data in structures if data.energy is not None and data.n_atoms])
    forces = [data.forces.detach().cpu().double().reshape(-1) for data in structures if data.forces is not None]
    squares = torch.cat(forces).square() if forces else torch.zeros(0)
    numbers = sorted({number for data in structures for number in data.atomic_numbers.tolist()})
    return {
        "frames": len(structures),
        "atoms": sum(sizes),
        "atoms_min": min(sizes, default=0),
        "atoms_max": max(sizes, default=0),
        "elements": [SYMBOLS[number] for number in numbers],
        "energy_per_atom_mean": float(energies.mean()) if energies.size else None,
        "energy_per_atom_std": float(energies.std()) if energies.size else None,
        "force_rms": float(squares.mean().sqrt()) if squares.numel() else None,
        "with_energy": sum(data.energy is not None for data in structures),
        "with_forces": sum(data.forces is not None for data in structures),
        "with_stress": sum(data.stress is not None for data in structures),
        "periodic": sum(bool(data.pbc.any()) for data in structures),
    }
