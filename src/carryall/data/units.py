"""Physical constants in the package's units: eV, Å, amu, and the time that follows from them, Å sqrt(amu / eV).

The values are CODATA 2014 (Mohr, Newell, Taylor, Rev. Mod. Phys. 88, 035009 (2016)), evaluated as ASE's `ase.units` does, so
that both give the same numbers to the last bit. Multiply to come in (`2 * fs`), divide to go out (`time / fs`).
"""

from __future__ import annotations

from math import pi, sqrt

# SI values, CODATA 2014
SPEED_OF_LIGHT = 299792458.0  # m/s
VACUUM_PERMEABILITY = 4.0e-7 * pi  # N/A²
PLANCK = 6.626070040e-34  # J s
ELEMENTARY_CHARGE = 1.6021766208e-19  # C
ELECTRON_MASS = 9.10938356e-31  # kg
AVOGADRO = 6.022140857e23  # 1/mol
BOLTZMANN = 1.38064852e-23  # J/K
ATOMIC_MASS = 1.660539040e-27  # kg

VACUUM_PERMITTIVITY = 1 / VACUUM_PERMEABILITY / SPEED_OF_LIGHT**2  # F/m
HBAR = PLANCK / (2 * pi)  # J s

eV = 1.0
Ang = 1.0
amu = 1.0

second = 1e10 * sqrt(ELEMENTARY_CHARGE / ATOMIC_MASS)
fs = 1e-15 * second
"""Femtosecond in units of Å sqrt(amu / eV)."""
ps = 1e-12 * second

kB = BOLTZMANN / ELEMENTARY_CHARGE
"""Boltzmann constant, eV/K."""

Pascal = (1 / ELEMENTARY_CHARGE) / 1e30
GPa = 1e9 * Pascal
"""Gigapascal in eV/Å³; 1 eV/Å³ is 160.21766208 GPa."""
bar = 1e5 * Pascal

Bohr = 4e10 * pi * VACUUM_PERMITTIVITY * HBAR**2 / ELECTRON_MASS / ELEMENTARY_CHARGE**2
"""Bohr radius, Å."""
Hartree = ELECTRON_MASS * ELEMENTARY_CHARGE**3 / 16 / pi**2 / VACUUM_PERMITTIVITY**2 / HBAR**2
"""Hartree energy, eV."""
Rydberg = 0.5 * Hartree
kJ = 1000.0 / ELEMENTARY_CHARGE
kcal = 4.184 * kJ
mol = AVOGADRO
Debye = 1.0 / 1e11 / ELEMENTARY_CHARGE / SPEED_OF_LIGHT
"""Debye in e Å."""
invcm = 100 * SPEED_OF_LIGHT * PLANCK / ELEMENTARY_CHARGE
"""Energy of one inverse centimetre, eV."""
