"""The universal screened nuclear repulsion of Ziegler, Biersack and Littmark:

    E(r) = Z_i Z_j e^2 / (4 pi eps0 r) phi(r / a),   a = 0.8854 a0 / (Z_i^0.23 + Z_j^0.23)
    phi(x) = 0.18175 exp(-3.19980 x) + 0.50986 exp(-0.94229 x) + 0.28022 exp(-0.40290 x) + 0.02817 exp(-0.20162 x)

J. F. Ziegler, J. P. Biersack, U. Littmark, The Stopping and Range of Ions in Matter, Pergamon (1985). The digits are those of
LAMMPS's `pair_style zbl`, whose 0.46850 Å for 0.8854 a0 is used, too. LAMMPS adds a polynomial between its two radii, and a
constant below; here the energy itself is switched off, and is exactly ZBL's below `inner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carryall.data.elements import atomic_number
from carryall.data.units import Bohr, Hartree
from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.potential import PotentialSpec
from carryall.graph.segments import segment_sum
from carryall.models.pair import smooth_cutoff
from carryall.models.spline_table import write_table
from carryall.models.type_rules import TypeRules

SCREENING = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
"""Weight and decay of each term of phi."""
SCREENING_LENGTH = 0.46850  # Å
SCREENING_POWER = 0.23


class ZBL(nn.Module):
    """Repulsion of bare, screened nuclei; `type_map` holds chemical symbols.

    The energy is ZBL's below `inner` (Å), and goes to zero at `outer`, the cutoff, by a switch that is twice continuously
    differentiable.
    """

    charge: Tensor

    def __init__(self, type_map: Sequence[str], inner: float = 1.0, outer: float = 2.0) -> None:
        super().__init__()
        if not 0 < inner < outer:
            raise InputError(f"inner and outer must satisfy 0 < inner < outer (Å), got {inner} and {outer}")
        self.type_map, self.inner, self.outer = tuple(type_map), float(inner), float(outer)
        self.rules = TypeRules(type_map)
        self.register_buffer("charge", torch.tensor([atomic_number(symbol) for symbol in type_map], dtype=torch.float64))

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        return PotentialSpec(cutoff=self.outer, type_map=self.type_map, block_edges=1 << 18)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies, eV."""
        squared = torch.where(graph.edge_mask, edge_vec.square().sum(1), self.outer**2)
        energy = self.pair_energy(squared.sqrt(), self.rules.pair_types(graph))
        return segment_sum(0.5 * energy, graph.edge_center, graph.n_local, graph.edge_mask)

    def pair_energy(self, distance: Tensor, pair: Tensor) -> Tensor:
        """(n,) eV of distances (n,) Å and pairs (n,), type * n_types + other type."""
        pairs = torch.cartesian_prod(self.charge, self.charge).reshape(-1, 2)
        inverse_length = pairs.pow(SCREENING_POWER).sum(1) / SCREENING_LENGTH
        coulomb = Hartree * Bohr * pairs.prod(1)
        energy = coulomb.index_select(0, pair) / distance * screening(distance * inverse_length.index_select(0, pair))
        return energy * smooth_cutoff(distance, self.inner, self.outer)

    def to_dict(self) -> dict[str, Any]:
        """The source form of the model."""
        kind = "ziegler_biersack_littmark"  # DeePMD's "zbl" is the combination with a learned model
        return {"type": kind, "type_map": list(self.type_map), "inner": self.inner, "outer": self.outer}

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> ZBL:
        """The inverse of `to_dict`."""
        return cls(source["type_map"], source["inner"], source["outer"])


def screening(x: Tensor) -> Tensor:
    """phi of distances in units of the screening length."""
    return torch.stack([weight * torch.exp(-decay * x) for weight, decay in SCREENING]).sum(0)


def write_zbl_table(
    path: str | Path, type_map: Sequence[str], inner: float = 1.0, outer: float = 2.0, *, spacing: float = 0.001
) -> Path:
    """Write the energies of `ZBL(type_map, inner, outer)` as a table that DeePMD reads (its `use_srtab` or `tab_file`).

    Rows go from `spacing` (Å) to `outer`. DeePMD's splines have zero slope at the first row, where ZBL is steepest: they are
    good to about 1e-6 of the energy from ten rows on.
    """
    if not 0 < spacing < outer / 10:
        raise InputError(f"spacing must be positive and much smaller than outer, {outer} Å, got {spacing}")
    model = ZBL(type_map, inner, outer)
    n_types, n_rows = len(type_map), int(np.ceil(outer / spacing - 1e-9))
    distance = torch.arange(1, n_rows + 1, dtype=torch.float64) * spacing
    pairs = [a * n_types + b for a in range(n_types) for b in range(a, n_types)]
    columns = [distance, *(model.pair_energy(distance, torch.full((n_rows,), pair)) for pair in pairs)]
    note = f"ZBL of {' '.join(type_map)}, switched to zero from {inner:g} to {outer:g} Å (carryall)"
    return write_table(path, torch.stack(columns, dim=1).numpy(), type_map, note)
