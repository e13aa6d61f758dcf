"""DeePMD's tabulated pair potential (`pairtab`):

    E_i = 1/2 sum over neighbours j of E_table(types of i and j, r_ij),   zero at the cutoff and beyond

with cubic splines between rows. The spline's slope at the first row is zero, and below it a table says nothing: energies and
forces there are NaN, since a program that is packed cannot raise an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.potential import PotentialSpec
from carryall.graph.segments import segment_sum
from carryall.models.spline_table import SplineTable, count_types, read_table, tabulate
from carryall.models.type_rules import TypeRules, check_dict


class PairTable(nn.Module):
    """Pair energies (eV) from a table, by type.

    `sel` is DeePMD's limit on neighbours: it is kept for its files, and limits nothing but the padded lists of
    `neighbor_graph_method="legacy"`, in a combination of models.
    """

    coefficients: Tensor

    def __init__(
        self,
        type_map: Sequence[str],
        table: SplineTable,
        cutoff: float,
        sel: int | Sequence[int] = 120,
        *,
        pair_exclude_types: Sequence[Sequence[int]] = (),
        atom_exclude_types: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if table.n_types != len(type_map):
            raise InputError(f"the pair table is for {table.n_types} types, type_map has {len(type_map)}: {list(type_map)}")
        self.type_map, self.table, self.cutoff = tuple(type_map), table, float(cutoff)
        self.sel = int(sel) if isinstance(sel, int | np.integer) else sum(int(one) for one in sel)
        self.rules = TypeRules(type_map, pair_exclude_types, atom_exclude_types)
        flat = np.ascontiguousarray(table.coefficients).reshape(-1, 4)
        self.register_buffer("coefficients", torch.from_numpy(flat.copy()))

    @classmethod
    def from_file(
        cls, path: str | Path, type_map: Sequence[str], cutoff: float | None = None, sel: int | Sequence[int] = 120
    ) -> PairTable:
        """The table of a text file, up to `cutoff` (Å; None: the last row). InputError says what is wrong with the file."""
        rows = read_table(path)
        cutoff = float(rows[-1, 0]) if cutoff is None else float(cutoff)
        n_types = count_types(rows.shape[1] - 1, str(path))
        if n_types != len(type_map):
            raise InputError(
                f"{path} has {rows.shape[1] - 1} columns of energies, the pairs of {n_types} types; type_map has "
                f"{len(type_map)}, {list(type_map)}, which make {len(type_map) * (len(type_map) + 1) // 2}"
            )
        return cls(type_map, tabulate(rows, cutoff, str(path)), cutoff, sel)

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        return PotentialSpec(cutoff=self.cutoff, type_map=self.type_map, block_edges=1 << 18)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies, eV."""
        seen = self.rules.without_excluded(graph)
        squared = torch.where(seen.edge_mask, edge_vec.square().sum(1), self.cutoff**2)
        energy = self.pair_energy(squared.sqrt(), self.rules.pair_types(seen))
        return self.rules.finish(seen, segment_sum(0.5 * energy, seen.edge_center, seen.n_local, seen.edge_mask))

    def pair_energy(self, distance: Tensor, pair: Tensor) -> Tensor:
        """(n,) eV of distances (n,) Å and pairs (n,), type * n_types + other type."""
        n_splines, spacing = self.table.n_splines, self.table.spacing
        place = (distance - self.table.rmin) * (1 / spacing)
        known = place.detach()
        row = torch.where(known > 0, known, 0.0).floor().clamp_max(n_splines - 1)  # NaN is no index
        u = place - row
        cubic, square, slope, value = self.coefficients.index_select(0, pair * n_splines + row.to(torch.int64)).unbind(1)
        energy = ((cubic * u + square) * u + slope) * u + value
        end = min(self.cutoff, self.table.rmin + n_splines * spacing)
        energy = torch.where(distance < end, energy, 0.0)
        # a factor, so that the derivative is NaN, too
        return energy * torch.where(known < 0, torch.nan, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """DeePMD's model dict of type `pairtab`."""
        table = self.table
        return {
            "@class": "Model",
            "type": "pairtab",
            "@version": 2,
            **self.rules.to_source(),
            "rcut": self.cutoff,
            "sel": self.sel,
            "tab": {
                "@class": "PairTab",
                "@version": 1,
                "rmin": table.rmin,
                "rmax": table.rmax,
                "hh": table.spacing,
                "ntypes": table.n_types,
                "rcut": self.cutoff,
                "nspline": table.n_splines,
                "@variables": {
                    "vdata": table.rows,
                    "tab_info": np.array([table.rmin, table.spacing, table.n_splines, table.n_types]),
                    "tab_data": self.coefficients.detach().cpu().numpy().reshape(-1),
                },
            },
        }

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> PairTable:
        """The inverse of `to_dict`; splines are taken as they are."""
        check_dict(source, {"tab", "rcut", "sel"}, (1, 2))
        tab, variables = source["tab"], source["tab"]["@variables"]
        rows = np.array(variables["vdata"], dtype=np.float64)
        flat = np.array(variables["tab_data"], dtype=np.float64)
        n_types, n_splines = int(tab["ntypes"]), int(tab["nspline"])
        if rows.shape != (n_splines + 1, 1 + n_types * (n_types + 1) // 2) or flat.size != n_types**2 * n_splines * 4:
            raise InputError(
                f"tab of the model dict has {rows.shape[0]} rows of {rows.shape[1]} columns and {flat.size} coefficients, not "
                f"those of {n_types} types and {n_splines} splines: it is damaged"
            )
        table = SplineTable(rows, float(tab["rmax"]), flat.reshape(n_types, n_types, n_splines, 4))
        excluded = {name: source.get(name, []) for name in ("pair_exclude_types", "atom_exclude_types")}
        model = cls(source["type_map"], table, source["rcut"], source["sel"], **excluded)
        model.rules.load_bias(source)
        return model
