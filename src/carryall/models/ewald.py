"""Ewald electrostatics of fixed charges, one for each type; `LearnedEwald` has charges from a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.potential import PotentialSpec
from carryall.models.ewald_sums import EwaldSettings, ewald_energy, ewald_settings


class Ewald(nn.Module):
    """Point charges (e), one for each type, in 3-D periodic systems; a cell that is charged has a uniform background.

    `cutoff` (Å) of the sum over neighbours and relative `accuracy` (see `ewald_settings`) say all else. For a whole
    potential sum it with one of the short range: `LinearEnergyModel([short, Ewald(...)], weights="sum")`.
    """

    charges: Tensor

    def __init__(self, type_map: Sequence[str], charges: Sequence[float], cutoff: float = 8.0, accuracy: float = 1e-6) -> None:
        super().__init__()
        if len(charges) != len(type_map):
            raise InputError(f"charges has {len(charges)} numbers for {len(type_map)} types: give one for each")
        self.type_map, self.accuracy = tuple(type_map), float(accuracy)
        self.settings = ewald_settings(cutoff, accuracy)
        self.register_buffer("charges", torch.tensor([float(one) for one in charges], dtype=torch.float64))

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        return long_range_spec(self.type_map, self.settings)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies, eV."""
        return ewald_energy(graph, edge_vec, self.charges.index_select(0, graph.atom_types), self.settings)

    def to_dict(self) -> dict[str, Any]:
        """The source form of the model."""
        return {
            "type": "ewald",
            "type_map": list(self.type_map),
            "charges": self.charges.tolist(),
            "cutoff": self.settings.cutoff,
            "accuracy": self.accuracy,
        }

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> Ewald:
        """The inverse of `to_dict`."""
        return cls(source["type_map"], source["charges"], source["cutoff"], source["accuracy"])


def long_range_spec(type_map: Sequence[str], settings: EwaldSettings) -> PotentialSpec:
    """Facts about a model whose energies are `ewald_energy` with these settings."""
    return PotentialSpec(
        cutoff=settings.cutoff,
        type_map=tuple(type_map),
        message_passing=True,
        long_range=True,
        k_cutoff=settings.k_cutoff,
    )
