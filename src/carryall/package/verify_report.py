"""What `carryall.verify` found: how far engines are from the reference, in a form for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

QUANTITIES = {
    "energy": "eV/atom",
    "forces": "eV/Å",
    "virial": "eV",
    "atomic_energy": "eV",
    "magnetic_forces": "eV/spin",
}
"""What is compared, and in which unit."""
Status = Literal["within", "deviates", "failed", "absent", "left out"]
Results = list[dict[str, np.ndarray]]
"""For each structure energy (), forces (n, 3), virial (3, 3), ..., as far as an engine has them."""


@dataclass(frozen=True)
class Deviation:
    """Of one quantity, from the reference, over all structures."""

    largest: float
    """In the unit of the quantity; infinite where a value is not finite."""
    scaled: float
    """The largest |difference| / (1 + largest value of the quantity in that structure): what the tolerance bounds."""
    structure: str
    """Where `scaled` is."""


@dataclass(frozen=True)
class VerifyRow:
    """One engine."""

    engine: str
    """Its name, as `engines` takes it."""
    title: str
    """With what it ran."""
    ranks: int
    """Processes that share a structure."""
    status: Status
    """Only "deviates" and "failed" speak against the file."""
    deviations: Mapping[str, Deviation]
    """By quantity; empty where the engine did not run."""
    note: str
    """Where it deviates, why it failed or did not run; a command that brings what is absent."""
    seconds: float
    """That it took."""


@dataclass(frozen=True)
class VerifyReport:
    """All engines on all structures."""

    path: str
    """File or built-in name."""
    reference: str
    """What engines are compared with."""
    dtype: str
    """Inside the file's program."""
    tolerance: float
    """Differences may be this times (1 + size of the value), in eV and Å."""
    why: str
    """Where the tolerance comes from."""
    structures: Mapping[str, int]
    """Names and numbers of atoms."""
    rows: tuple[VerifyRow, ...]

    @property
    def ok(self) -> bool:
        """Whether some engine was compared, and none deviates or failed."""
        statuses = {row.status for row in self.rows}
        return "within" in statuses and not statuses & {"deviates", "failed"}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON: what is not finite is None."""
        rows = [{**asdict(row), "deviations": {k: _plain(asdict(v)) for k, v in row.deviations.items()}} for row in self.rows]
        facts = {name: getattr(self, name) for name in ("path", "reference", "dtype", "tolerance", "why")}
        return {**facts, "ok": self.ok, "units": QUANTITIES, "structures": dict(self.structures), "rows": rows}


def deviations(found: Results, reference: Results, names: Sequence[str]) -> dict[str, Deviation]:
    """Of each quantity that the engine and the reference have; energies for each atom."""
    out = {}
    for quantity in QUANTITIES:
        pairs = [
            (_difference(quantity, one, other), name)
            for one, other, name in zip(found, reference, names, strict=True)
            if quantity in one and quantity in other
        ]
        if pairs:
            (_, scaled), where = max(pairs, key=lambda pair: pair[0][1])
            out[quantity] = Deviation(max(absolute for (absolute, _), _ in pairs), scaled, where)
    return out


def judged(found: Mapping[str, Deviation], tolerance: float) -> tuple[Status, str]:
    """Whether all is within the tolerance, and if not, where not."""
    beyond = {quantity: one for quantity, one in found.items() if not one.scaled <= tolerance}
    if not beyond:
        return "within", ""
    worst, one = max(beyond.items(), key=lambda item: item[1].scaled)
    size = "not finite" if math.isinf(one.scaled) else f"{one.scaled / tolerance:.3g} times the tolerance"
    more = f", beyond it also {', '.join(name for name in beyond if name != worst)}" if len(beyond) > 1 else ""
    return "deviates", f"{worst} {size} in {one.structure!r}{more}".replace("_", " ")


def not_finite(results: Results, names: Sequence[str]) -> str | None:
    """The first structure with a value that is not finite, and which; None where all are."""
    for one, name in zip(results, names, strict=True):
        for quantity, value in one.items():
            if not np.isfinite(value).all():
                return f"{quantity.replace('_', ' ')} not finite in {name!r}"
    return None


def _difference(quantity: str, found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """The largest difference, and the largest by the measure of the tolerance."""
    a, b = (np.asarray(one[quantity], dtype=np.float64) for one in (found, reference))
    if a.shape != b.shape:
        raise ValueError(f"{quantity} has shape {a.shape}, expected {b.shape}")
    if quantity == "energy":
        n_atoms = len(reference["forces"])
        a, b = a / n_atoms, b / n_atoms
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b).max(initial=0.0)
    # NaN and infinities are infinitely far from everything
    if not np.isfinite(difference):
        return math.inf, math.inf
    return float(difference), float(difference) / (1.0 + float(np.abs(b).max(initial=0.0)))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
