"""Sutton-Chen many-body potentials of ten fcc metals.

    E_i = 1/2 sum_j epsilon_ij (a_ij / r_ij)^n_ij  -  epsilon_i c_i sqrt(rho_i),     rho_i = sum_j (a_ij / r_ij)^m_ij

A. P. Sutton and J. Chen, Philos. Mag. Lett. 61, 139 (1990), table 1. Alloys: H. Rafii-Tabar and A. P. Sutton, Philos. Mag.
Lett. 63, 217 (1991): n and m by the arithmetic, a and epsilon by the geometric mean. The published energies are lattice sums to
infinity; a finite cutoff (with a smooth end from 0.9 of it on) binds a little less, see the test for how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from carryall.errors import InputError, nearest
from carryall.graph.neighbor_graph import NeighborGraph, local_types
from carryall.graph.potential import PotentialSpec
from carryall.graph.segments import segment_sum
from carryall.models.pair import smooth_cutoff


@dataclass(frozen=True)
class Metal:
    """Parameters of one element: exponents, epsilon in eV, c, lattice constant a in Å."""

    n: int
    m: int
    epsilon: float
    c: float
    a: float


METALS: dict[str, Metal] = {
    "Ni": Metal(9, 6, 1.5707e-2, 39.432, 3.52),
    "Cu": Metal(9, 6, 1.2382e-2, 39.432, 3.61),
    "Rh": Metal(12, 6, 4.9371e-3, 144.41, 3.80),
    "Pd": Metal(12, 7, 4.1790e-3, 108.27, 3.89),
    "Ag": Metal(12, 6, 2.5415e-3, 144.41, 4.09),
    "Ir": Metal(14, 6, 2.4489e-3, 334.94, 3.84),
    "Pt": Metal(10, 8, 1.9833e-2, 34.408, 3.92),
    "Au": Metal(10, 8, 1.2793e-2, 34.408, 4.08),
    "Pb": Metal(10, 7, 5.5765e-3, 45.778, 4.95),
    "Al": Metal(7, 6, 3.3147e-2, 16.399, 4.05),
}


class SuttonChen(nn.Module):
    """Many-body metal potential for any subset of the ten elements."""

    def __init__(self, type_map: Sequence[str] = tuple(METALS), cutoff: float = 8.0, switch_from: float = 0.9) -> None:
        super().__init__()
        for symbol in type_map:
            if symbol not in METALS:
                raise InputError(
                    f"no Sutton-Chen parameters for {symbol!r}{nearest(symbol, METALS)}: known are {', '.join(METALS)}"
                )
        if not 0 < switch_from <= 1:
            raise InputError(f"switch_from is a fraction of the cutoff in (0, 1], got {switch_from}")
        self.type_map, self.cutoff, self.switch_from = tuple(type_map), float(cutoff), float(switch_from)
        metals = [METALS[symbol] for symbol in type_map]
        for name in ("n", "m", "epsilon", "c", "a"):
            values = torch.tensor([float(getattr(metal, name)) for metal in metals], dtype=torch.float64)
            self.register_buffer(name, values)

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        return PotentialSpec(cutoff=self.cutoff, type_map=self.type_map)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies, eV."""
        center = graph.atom_types.index_select(0, graph.edge_center)
        neighbor = graph.atom_types.index_select(0, graph.edge_neighbor)

        def both(name: str) -> tuple[Tensor, Tensor]:
            values = self.get_buffer(name)
            return values.index_select(0, center), values.index_select(0, neighbor)

        (n1, n2), (m1, m2), (e1, e2), (a1, a2) = both("n"), both("m"), both("epsilon"), both("a")
        squared = torch.where(graph.edge_mask, edge_vec.square().sum(1), self.cutoff**2)
        log_ratio = 0.5 * (a1 * a2 / squared).log()
        cut = smooth_cutoff(squared.sqrt(), self.switch_from * self.cutoff, self.cutoff) if self.switch_from < 1 else 1.0
        repulsion = (e1 * e2).sqrt() * (0.5 * (n1 + n2) * log_ratio).exp() * cut
        density = (0.5 * (m1 + m2) * log_ratio).exp() * cut
        n_local = graph.n_local
        inside = graph.edge_mask & (squared <= self.cutoff**2)
        rho = segment_sum(density, graph.edge_center, n_local, inside)
        types = local_types(graph)
        embedding = self.get_buffer("epsilon").index_select(0, types) * self.get_buffer("c").index_select(0, types)
        # sqrt has no derivative at 0: an atom without neighbours gets exactly 0
        root = torch.where(rho > 0, rho, 1.0).sqrt() * (rho > 0)
        return 0.5 * segment_sum(repulsion, graph.edge_center, n_local, inside) - embedding * root

    def to_dict(self) -> dict[str, Any]:
        """The source form of the model."""
        return {
            "type": "sutton_chen",
            "type_map": list(self.type_map),
            "cutoff": self.cutoff,
            "switch_from": self.switch_from,
        }

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> SuttonChen:
        """The inverse of `to_dict`."""
        return cls(source["type_map"], source["cutoff"], source["switch_from"])
