# SPDX-License-Identifier: GPL-2.0-only
"""`pair_style carryall`: packed potentials in LAMMPS, compiled on the machine where they run."""

__version__ = "0.1.0"
