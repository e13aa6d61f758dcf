"""What barostats share: which strains a mode allows, cells and atoms under a constant rate of strain, systems that do not fit.

A strain (or its rate) is a symmetric matrix g: rows, be they positions or cell vectors, go from x to x exp(g). A symmetric one
does not turn the cell. Numbers of systems are numpy arrays on the host, float64; numbers of atoms are tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import system_sums
from carryall.dynamics.constraints import Constraint, FixSymmetry
from carryall.dynamics.thermo import SQUARE, kinetic_components, mobile
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics

Array = NDArray[np.float64]

CELL_DEGREES = {"isotropic": 1, "anisotropic": 3, "triclinic": 6}
"""Numbers of a strain that vary by themselves, by mode."""
EYE = np.eye(3)
LARGEST_STRAIN = 0.25
"""Of one step, root of the sum of squares: a barostat that strains more does not follow its equations any longer."""
ORDER = 11
"""Of the series in `flow`: the first term left out is below 2e-16 at the largest strain."""
FLAT = 1e-8
"""Volume over the product of the lengths, below which a cell has none; and relative size of what counts as a zero."""


def check_mode(mode: str, constraints: Sequence[Constraint] = ()) -> str:
    """One of the keys of `CELL_DEGREES`; only isotropic with constraints that forbid strains."""
    if mode not in CELL_DEGREES:
        raise InputError(f"mode must be one of {', '.join(CELL_DEGREES)}, got {mode!r}")
    if mode != "isotropic" and any(isinstance(one, FixSymmetry) for one in constraints):
        raise InputError(
            f"mode {mode!r} with FixSymmetry: the barostat would excite strains that the symmetry forbids; "
            "use mode='isotropic', or no FixSymmetry"
        )
    return mode


def allowed(tensor: Array, mode: str) -> Array:
    """Part of (n, 3, 3) that a mode lets vary: a third of the trace, the diagonal, or the symmetric part."""
    if mode == "isotropic":
        return trace(tensor)[:, None, None] * (EYE / 3.0)
    if mode == "anisotropic":
        return tensor * EYE
    return 0.5 * (tensor + tensor.transpose(0, 2, 1))


def trace(tensor: Array) -> Array:
    """(n,) of (n, 3, 3)."""
    return tensor[:, 0, 0] + tensor[:, 1, 1] + tensor[:, 2, 2]


def squared(tensor: Array) -> Array:
    """(n,) sums of the squares of (n, 3, 3), term by term."""
    rows = (tensor * tensor).reshape(-1, 9)
    total = rows[:, 0]
    for k in range(1, 9):
        total = total + rows[:, k]
    return total


def volumes(cell: Array) -> Array:
    """(n,) Å³ of cells (n, 3, 3)."""
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = cell.transpose(1, 2, 0)
    return np.abs(ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx))


def logarithm(x: Array) -> Array:
    """ln x, each by Python's, NaN where there is none: a vectorised one may differ with the place in the array."""
    return np.array([math.log(one) if one > 0.0 else math.nan for one in x.tolist()])


def host(value: Tensor) -> Array:
    """A tensor's numbers on the host; on the CPU its own memory, not to be written to."""
    return value.cpu().numpy()


def onto(value: Array, batch: Batch) -> Tensor:
    """Numbers of the host as a tensor beside the batch."""
    return torch.from_numpy(np.ascontiguousarray(value)).to(batch.device)


def kinetic_array(batch: Batch, velocities: Tensor) -> Array:
    """(n, 3, 3) eV, sum of m v ⊗ v, for velocities (n_atoms, 3)."""
    return host(kinetic_components(batch, velocities))[:, SQUARE].reshape(-1, 3, 3)


def flow(*generators: Array) -> list[tuple[Array, Array]]:
    """For each A (n, 3, 3): exp(A), and its mean over time, the integral of exp(s A) over s from 0 to 1.

    The mean is exp(A / 2) sinh(A / 2) / (A / 2), by its power series: exact to rounding up to `LARGEST_STRAIN`.
    """
    a, eye = torch.from_numpy(np.concatenate(generators)), torch.from_numpy(EYE)
    mean = eye.expand_as(a)
    for k in range(ORDER + 1, 1, -1):
        mean = torch.baddbmm(eye, a, mean, alpha=1.0 / k)
    both = torch.baddbmm(eye, a, mean).numpy(), mean.numpy()
    return list(zip(*(np.split(one, len(generators)) for one in both), strict=True))


def combined(first: Tensor, a: Array, second: Tensor, b: Array, batch: Batch) -> Tensor:
    """first A + second B: rows (n_atoms, 3), and a matrix (n_systems, 3, 3) for each system.

    One small product for each atom, so that the bits do not depend on the batch.
    """
    matrices = onto(np.concatenate([a, b], 1), batch).index_select(0, batch.system)
    return torch.bmm(torch.cat([first, second], 1)[:, None], matrices)[:, 0]


@np.errstate(all="ignore")
def without_wild(dynamics: BaseDynamics, batch: Batch, strain: Array, mask: Tensor | None) -> Tensor | None:
    """`mask` without the systems whose strain (n, 3, 3) of one step is too large or no number; these are set aside."""
    size = np.sqrt(squared(strain))
    wild = ~(size <= LARGEST_STRAIN)
    if mask is not None:
        wild &= mask.cpu().numpy()
    if not wild.any():
        return mask
    for index in np.flatnonzero(wild).tolist():
        dynamics.set_aside(
            batch,
            index,
            f"the barostat would strain the cell by {size[index]:.3g} in one step (at most {LARGEST_STRAIN}): relax the cell "
            "first, or take a larger barostat_tau or a smaller timestep",
        )
    calm = torch.from_numpy(~wild).to(batch.device)
    return calm if mask is None else mask & calm


@np.errstate(all="ignore")
def unfit_cells(batch: Batch, mode: str) -> dict[int, str]:
    """Systems that a barostat cannot work on, with the reason."""
    found: dict[int, str] = {}
    cell, periodic = host(batch.cell.double()), batch.pbc.all(1).tolist()
    lengths = np.sqrt((cell * cell).sum(2))
    has_volume = volumes(cell) > FLAT * lengths.prod(1)
    zero = np.abs(cell) <= FLAT * lengths[:, :, None]
    along_axes = (zero.sum(2) == 2).all(1)
    free = mobile(batch)
    held = torch.zeros_like(batch.system) if free is None else (~free).any(1).long()
    fixed = system_sums(batch, held).tolist()
    for i in range(batch.n_systems):
        if not periodic[i]:
            found[i] = "a barostat needs a system that is periodic along all three cell vectors"
        elif not has_volume[i]:
            found[i] = "a barostat needs a cell with volume"
        elif fixed[i]:
            found[i] = f"{fixed[i]} of its atoms may not move: a barostat scales all positions with the cell"
        elif mode == "anisotropic" and not along_axes[i]:
            found[i] = "the anisotropic mode needs a rectangular cell along x, y and z: use triclinic or isotropic"
    return found
