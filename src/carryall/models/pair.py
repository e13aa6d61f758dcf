"""Lennard-Jones, the smallest model: what a potential has to provide, on one page.

    E = sum over pairs of 4 epsilon ((sigma / r)^12 - (sigma / r)^6) - shift,   zero beyond the cutoff

J. E. Lennard-Jones, Proc. R. Soc. A 106, 463 (1924). Each of a pair's two edges carries half of its energy. Parameters of
argon: A. Rahman, Phys. Rev. 136, A405 (1964), epsilon / kB = 120 K, sigma = 3.4 Å.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carryall.data.units import kB
from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.potential import PotentialSpec
from carryall.graph.segments import segment_sum
from carryall.graph.skin import SkinNeighborList, arrays_of, refuse
from carryall.graph.systems import Systems

TRUNCATIONS = {"none": 0, "shift": 1, "switch": 2}
"""As native code numbers them."""
SWITCH_START = 0.9
"""Of the cutoff."""


class LennardJones(nn.Module):
    """Pair potential; one epsilon (eV) and sigma (Å) per type, mixed by Lorentz-Berthelot.

    `truncation`: "shift" subtracts the energy at the cutoff (ASE's), "switch" multiplies by 1 - u^3 (6 u^2 - 15 u + 10) from
    0.9 cutoff on, so that forces are smooth too, "none" cuts.
    """

    epsilon: Tensor
    sigma: Tensor

    def __init__(
        self,
        type_map: Sequence[str],
        epsilon: Sequence[float],
        sigma: Sequence[float],
        cutoff: float,
        truncation: str = "shift",
    ) -> None:
        super().__init__()
        if len(epsilon) != len(type_map) or len(sigma) != len(type_map):
            raise InputError(
                f"epsilon and sigma need one value for each of {list(type_map)}, got {list(epsilon)} and {list(sigma)}"
            )
        if truncation not in TRUNCATIONS:
            raise InputError(f"truncation must be 'shift', 'switch' or 'none', got {truncation!r}")
        self.type_map, self.cutoff, self.truncation = tuple(type_map), float(cutoff), truncation
        self._table: tuple[Tensor, Tensor, Tensor] | None = None
        self.register_buffer("epsilon", torch.tensor(list(epsilon), dtype=torch.float64))
        self.register_buffer("sigma", torch.tensor(list(sigma), dtype=torch.float64))

    @classmethod
    def argon(cls, cutoff: float = 8.5) -> LennardJones:
        """Rahman's argon with a smooth cutoff."""
        return cls(("Ar",), (120 * kB,), (3.4,), cutoff, "switch")

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        return PotentialSpec(cutoff=self.cutoff, type_map=self.type_map, block_edges=1 << 18)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies, eV."""
        center = graph.atom_types.index_select(0, graph.edge_center)
        neighbor = graph.atom_types.index_select(0, graph.edge_neighbor)
        epsilon = (self.epsilon.index_select(0, center) * self.epsilon.index_select(0, neighbor)).sqrt()
        sigma = 0.5 * (self.sigma.index_select(0, center) + self.sigma.index_select(0, neighbor))
        squared = torch.where(graph.edge_mask, edge_vec.square().sum(1), self.cutoff**2)
        energy = four_epsilon(epsilon, sigma, squared)
        if self.truncation == "shift":
            energy = energy - four_epsilon(epsilon, sigma, torch.full_like(squared, self.cutoff**2))
        elif self.truncation == "switch":
            energy = energy * smooth_cutoff(squared.sqrt(), SWITCH_START * self.cutoff, self.cutoff)
        energy = torch.where(squared <= self.cutoff**2, energy, 0.0)
        return segment_sum(0.5 * energy, graph.edge_center, graph.n_local, graph.edge_mask)

    def evaluate_systems(self, neighbors: SkinNeighborList, systems: Systems) -> dict[str, Tensor] | None:
        """What a Potential returns, by native code on a CPU; None where there is none, or where a gradient is wanted."""
        if systems.positions.requires_grad or systems.cell.requires_grad or neighbors.cutoff != self.cutoff:
            return None
        lists = neighbors.native(systems)
        if lists is None or neighbors.type_map != self.type_map or self.epsilon.device.type != "cpu":
            return None
        start = SWITCH_START * self.cutoff
        types = neighbors.types(systems)
        output, problems = lists.lennard_jones(
            arrays_of(systems), types, self._pair_table(), TRUNCATIONS[self.truncation], start
        )
        refuse(problems, systems)
        return output

    def _pair_table(self) -> Tensor:
        """(n_types, 3, n_types) 4 epsilon, sigma^2 and energy at the cutoff of each pair of types."""
        kept = self._table
        if kept is None or not (torch.equal(kept[0], self.epsilon) and torch.equal(kept[1], self.sigma)):
            epsilon = (self.epsilon[:, None] * self.epsilon).sqrt()
            sigma = 0.5 * (self.sigma[:, None] + self.sigma)
            at_cutoff = four_epsilon(epsilon, sigma, torch.full_like(sigma, self.cutoff**2))
            table = torch.stack([4 * epsilon, sigma.square(), at_cutoff], 1)
            self._table = kept = (self.epsilon.clone(), self.sigma.clone(), table)
        return kept[2]

    def to_dict(self) -> dict[str, Any]:
        """The source form of the model."""
        return {
            "type": "lennard_jones",
            "type_map": list(self.type_map),
            "epsilon": self.epsilon.tolist(),
            "sigma": self.sigma.tolist(),
            "cutoff": self.cutoff,
            "truncation": self.truncation,
        }

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> LennardJones:
        """The inverse of `to_dict`."""
        return cls(source["type_map"], source["epsilon"], source["sigma"], source["cutoff"], source["truncation"])


def four_epsilon(epsilon: Tensor, sigma: Tensor, squared: Tensor) -> Tensor:
    """4 epsilon ((sigma / r)^12 - (sigma / r)^6) of squared distances."""
    sixth = (sigma.square() / squared) ** 3
    return 4 * epsilon * (sixth * sixth - sixth)


def smooth_cutoff(distance: Tensor, start: float, end: float) -> Tensor:
    """1 below `start`, 0 above `end`, twice continuously differentiable between (fifth-order polynomial)."""
    u = ((distance - start) / (end - start)).clamp(0.0, 1.0)
    return 1 - u**3 * (6 * u * u - 15 * u + 10)
