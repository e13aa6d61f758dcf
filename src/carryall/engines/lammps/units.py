"""Units of LAMMPS in those of carryall (eV, Å), by the constants of `carryall.data.units` (CODATA 2014, as ASE has them).

LAMMPS' own constants for `real` differ in the eighth digit (23.060549 kcal/mol per eV there, 23.060548 here).
"""

from __future__ import annotations

from dataclasses import dataclass

from carryall.data import units as u
from carryall.errors import InputError, nearest


@dataclass(frozen=True)
class LammpsUnits:
    """One unit style: its length in Å and its energy in eV. Forces are energy by length, virials are energies."""

    name: str
    length: float
    energy: float

    @property
    def force(self) -> float:
        """One unit of force, eV/Å."""
        return self.energy / self.length


_JOULE = 1 / u.ELEMENTARY_CHARGE

UNITS = {
    one.name: one
    for one in (
        LammpsUnits("metal", 1.0, 1.0),
        LammpsUnits("real", 1.0, u.kcal / u.mol),
        LammpsUnits("electron", u.Bohr, u.Hartree),
        LammpsUnits("si", 1e10, _JOULE),
        LammpsUnits("cgs", 1e8, 1e-7 * _JOULE),
        # picogram micrometer^2 / microsecond^2, attogram nanometer^2 / nanosecond^2
        LammpsUnits("micro", 1e4, 1e-15 * _JOULE),
        LammpsUnits("nano", 10.0, 1e-21 * _JOULE),
    )
}
"""By the name in LAMMPS' command `units`."""


def lammps_units(name: str) -> LammpsUnits:
    """The style of that name; InputError for `lj`, which has no unit of length, and for unknown ones."""
    if name == "lj":
        raise InputError("units lj have no length in Å and no energy in eV, which a potential needs: use units metal")
    if name not in UNITS:
        raise InputError(f"unknown LAMMPS units {name!r}{nearest(name, UNITS)}: known are {', '.join(UNITS)}")
    return UNITS[name]
