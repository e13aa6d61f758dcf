"""DeePMD's tabulated pair energies: the text file, its continuation to a cutoff, and cubic splines of its columns.

A file has one row for each distance, equally spaced: r (Å), then the energies (eV) of the pairs 0-0, 0-1, ..., 0-n, 1-1, ...,
n-n. Lines that begin with # are comments. What is done with it is what deepmd-kit does (its `PairTab`), to the last row.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np

from carryall.errors import InputError

UNEVEN = 1e-3  # rows may be off by this part of the spacing
NEGLIGIBLE = 1e-10  # eV


@dataclass(frozen=True, eq=False)
class SplineTable:
    """Rows that reach to the cutoff, and a cubic in (r - r_k) / spacing, highest power first, for each interval and pair."""

    rows: np.ndarray
    """(n_splines + 1, 1 + n_types (n_types + 1) / 2) Å, eV."""
    rmax: float
    """Å, where the rows of the file end; what follows was added."""
    coefficients: np.ndarray
    """(n_types, n_types, n_splines, 4) eV."""

    @property
    def rmin(self) -> float:
        """Å, first row."""
        return float(self.rows[0, 0])

    @property
    def spacing(self) -> float:
        """Å, between the first two rows."""
        return float(self.rows[1, 0] - self.rows[0, 0])

    @property
    def n_types(self) -> int:
        """Types."""
        return self.coefficients.shape[0]

    @property
    def n_splines(self) -> int:
        """Intervals."""
        return self.coefficients.shape[2]


def read_table(path: str | Path) -> np.ndarray:
    """(n_rows, 1 + n_pairs) of a table file; InputError names the row or column that cannot be used."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path} (a pair table has rows of r in Å and the energies in eV of each pair of types)")
    try:
        rows = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a table of numbers: {error}") from None
    return check_rows(rows, str(path))


def check_rows(rows: np.ndarray, name: str) -> np.ndarray:
    """The rows, if they are equally spaced, finite, and have a column for each pair of types; InputError otherwise."""
    if len(rows) < 2 or rows.shape[1] < 2:
        raise InputError(f"{name} has {len(rows)} rows and {rows.shape[1]} columns: a table needs two of each at least")
    if not np.isfinite(rows).all():
        row, column = (int(axis[0]) for axis in np.nonzero(~np.isfinite(rows)))
        raise InputError(f"{name}: row {row}, column {column} is {rows[row, column]}: begin where all energies are finite")
    count_types(rows.shape[1] - 1, name)
    first, spacing = rows[0, 0], rows[1, 0] - rows[0, 0]
    if first < 0 or spacing <= 0:
        raise InputError(f"{name}: the first two distances are {first:g} and {rows[1, 0]:g} Å: they must ascend, none negative")
    expected = first + spacing * np.arange(len(rows))
    off = np.abs(rows[:, 0] - expected) > UNEVEN * spacing
    if off.any():
        row = int(np.nonzero(off)[0][0])
        raise InputError(
            f"{name}: row {row} is at {rows[row, 0]:.10g} Å, expected {expected[row]:.10g}: rows must be equally spaced, by "
            f"the {spacing:.10g} Å between the first two; if they are meant to be, write distances with more digits"
        )
    return rows


def count_types(n_pairs: int, name: str) -> int:
    """n of n (n + 1) / 2 columns."""
    n_types = (isqrt(8 * n_pairs + 1) - 1) // 2
    if n_types * (n_types + 1) // 2 != n_pairs:
        raise InputError(
            f"{name} has {n_pairs} columns of energies, which is no number of pairs: 1 for one type, 3 for two "
            "(0-0, 0-1, 1-1), 6 for three, n (n + 1) / 2 for n"
        )
    return n_types


def write_table(path: str | Path, rows: np.ndarray, type_map: Sequence[str], note: str = "") -> Path:
    """Write rows (n_rows, 1 + n_pairs) as a table file, with a comment that names the columns."""
    path = Path(path)
    check_rows(rows, "the table to write")
    if count_types(rows.shape[1] - 1, "the table to write") != len(type_map):
        raise InputError(f"the table to write has {rows.shape[1] - 1} columns of energies, not the pairs of {list(type_map)}")
    pairs = [f"{a}-{b}" for index, a in enumerate(type_map) for b in type_map[index:]]
    header = "\n".join([*([note] if note else []), f"r (Å), energies (eV) of {' '.join(pairs)}"])
    part = path.with_name(f".{path.name}.part")
    np.savetxt(part, rows, fmt="%.17g", header=header, encoding="utf-8")
    part.replace(path)
    return path


def tabulate(rows: np.ndarray, cutoff: float, name: str = "the pair table") -> SplineTable:
    """Splines of the rows of a file, continued to `cutoff` (Å) where they end before it; warns where energies end in a step."""
    rmax = float(rows[-1, 0])
    if not cutoff > rows[0, 0]:
        raise InputError(f"the cutoff, {cutoff:g} Å, is not beyond the first row of {name}, at {rows[0, 0]:g} Å")
    longer = continued(rows, cutoff)
    table = SplineTable(longer, rmax, spline_coefficients(longer))
    if cutoff > rmax and rows[-1, 1:].any():
        warnings.warn(
            f"{name} ends at {rmax:g} Å with energies up to {np.abs(rows[-1, 1:]).max():.1e} eV: they are continued to zero at "
            f"the cutoff, {cutoff:g} Å, by a cubic, as deepmd-kit does; give rows up to there",
            stacklevel=2,
        )
    if cutoff <= rmax and (step := np.abs(energies_at(table, cutoff)).max()) > NEGLIGIBLE:
        warnings.warn(
            f"{name} does not vanish at the cutoff: energies jump by {step:.1e} eV at {cutoff:g} Å; choose a longer cutoff, or "
            "a table that is switched to zero",
            stacklevel=2,
        )
    return table


def continued(rows: np.ndarray, cutoff: float) -> np.ndarray:
    """Rows up to the cutoff or just beyond: zeros after a row of zeros, else a cubic to zero."""
    rmin, rmax, spacing = rows[0, 0], rows[-1, 0], rows[1, 0] - rows[0, 0]
    missing = int(np.ceil(cutoff / spacing - rmin / spacing)) - (len(rows) - 1)
    if cutoff <= rmax or missing <= 0:
        return rows
    more = np.zeros((missing, rows.shape[1]))
    more[:, 0] = np.linspace(rmax + spacing, rmax + spacing * missing, missing)
    if not rows[-1, 1:].any():
        return np.concatenate([rows, more])
    # zero one row before the cutoff where there is one; deepmd-kit compares these floats
    if more[-1, 0] / spacing - rmax / spacing >= 2:
        more = more[:-1]
    length = more[-1, 0] - rmax
    u = ((more[:, 0] - rmax) / length)[:, None]
    # the slope is a difference per row where one per Å is meant: deepmd-kit's own, and part of what it computes
    slope = (rows[-1, 1:] - rows[-2, 1:]) * length
    more[:, 1:] = (1 - u) ** 2 * ((1 + 2 * u) * rows[-1, 1:] + u * slope)
    return np.concatenate([rows, more])


def spline_coefficients(rows: np.ndarray) -> np.ndarray:
    """(n_types, n_types, n_rows - 1, 4) coefficients: twice continuously differentiable, with zero slope at both ends."""
    values, spacing = rows[:, 1:], rows[1, 0] - rows[0, 0]
    slope = clamped_slopes(rows[:, 0], values) * spacing
    change = values[1:] - values[:-1]
    cubic = -2 * change + slope[:-1] + slope[1:]
    square = 3 * change - 2 * slope[:-1] - slope[1:]
    columns = np.stack([cubic, square, slope[:-1], values[:-1]], axis=-1)  # (n_splines, n_pairs, 4)
    n_types = count_types(values.shape[1], "the pair table")
    coefficients = np.empty((n_types, n_types, len(rows) - 1, 4))
    for column, (a, b) in enumerate(zip(*np.triu_indices(n_types), strict=True)):
        coefficients[a, b] = coefficients[b, a] = columns[:, column]
    return coefficients


def clamped_slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, m) first derivatives at x (n,) of the cubic splines through y (n, m) whose slopes at both ends are zero."""
    step = np.diff(x)
    secant = np.diff(y, axis=0) / step[:, None]
    slope = np.zeros_like(y)
    if len(x) < 3:
        return slope
    # tridiagonal: step[k] s[k-1] + 2 (step[k-1] + step[k]) s[k] + step[k-1] s[k+1] = right[k], solved by elimination
    right = 3 * (step[1:, None] * secant[:-1] + step[:-1, None] * secant[1:])
    diagonal = 2 * (step[:-1] + step[1:])
    for k in range(1, len(right)):
        factor = step[k + 1] / diagonal[k - 1]
        diagonal[k] -= factor * step[k - 1]
        right[k] -= factor * right[k - 1]
    slope[-2] = right[-1] / diagonal[-1]
    for k in range(len(right) - 2, -1, -1):
        slope[k + 1] = (right[k] - step[k] * slope[k + 2]) / diagonal[k]
    return slope


def energies_at(table: SplineTable, distance: float) -> np.ndarray:
    """(n_types, n_types) eV just below a distance within the rows."""
    place = (distance - table.rmin) / table.spacing
    row = min(int(np.ceil(place)) - 1, table.n_splines - 1)
    return np.polyval(np.moveaxis(table.coefficients[:, :, row], -1, 0), place - row)
