"""What goes by atom type in any of DeePMD's models, whatever its formula: biases, and pairs and types that are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, local_index

COMMON_KEYS = {
    "@class", "@version", "@variables", "type", "type_map", "atom_exclude_types", "pair_exclude_types", "rcond",
    "preset_out_bias",
}  # fmt: skip
"""Fields of every DeePMD model dict; `rcond` and `preset_out_bias` matter in training only."""


class TypeRules(nn.Module):
    """`out_bias` (n_types,) eV added to each atom, pairs of types that do not see each other, types that have no energy."""

    out_bias: Tensor

    def __init__(
        self,
        type_map: Sequence[str],
        pair_exclude_types: Sequence[Sequence[int]] = (),
        atom_exclude_types: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.type_map, n_types = tuple(type_map), len(type_map)
        self.pair_exclude_types = tuple((int(a), int(b)) for a, b in pair_exclude_types)
        self.atom_exclude_types = tuple(int(one) for one in atom_exclude_types)
        for one in (*(index for pair in self.pair_exclude_types for index in pair), *self.atom_exclude_types):
            if not 0 <= one < n_types:
                raise InputError(f"type {one} to exclude is not there: types are 0 to {n_types - 1}, of {list(type_map)}")
        allowed = torch.ones(n_types, n_types, dtype=torch.bool)
        for a, b in self.pair_exclude_types:
            allowed[a, b] = allowed[b, a] = False
        counted = torch.ones(n_types, dtype=torch.float64)
        counted[list(self.atom_exclude_types)] = 0
        self.register_buffer("out_bias", torch.zeros(n_types, dtype=torch.float64))
        self.register_buffer("index", torch.arange(n_types), persistent=False)
        self.register_buffer("allowed", allowed, persistent=False)
        self.register_buffer("counted", counted, persistent=False)

    def without_excluded(self, graph: NeighborGraph) -> NeighborGraph:
        """The graph with the edges of excluded pairs masked."""
        if not self.pair_exclude_types:
            return graph
        allowed = self.get_buffer("allowed").reshape(-1).index_select(0, self.pair_types(graph))
        return graph.replace(edge_mask=graph.edge_mask & allowed)

    def pair_types(self, graph: NeighborGraph) -> Tensor:
        """(n_edges,) type of the centre * n_types + type of the neighbour; an error for types beyond the type map."""
        known = self.get_buffer("index").index_select(0, graph.atom_types)
        center, neighbor = known.index_select(0, graph.edge_center), known.index_select(0, graph.edge_neighbor)
        return center * len(self.type_map) + neighbor

    def finish(self, graph: NeighborGraph, energy: Tensor) -> Tensor:
        """(n_local,) energies with the biases, zero for excluded types."""
        types = graph.atom_types.index_select(0, local_index(graph))
        energy = energy + self.out_bias.index_select(0, types)
        return energy * self.get_buffer("counted").index_select(0, types) if self.atom_exclude_types else energy

    def to_source(self) -> dict[str, Any]:
        """The fields that all of DeePMD's model dicts have."""
        n_types = len(self.type_map)
        return {
            "type_map": list(self.type_map),
            "atom_exclude_types": list(self.atom_exclude_types),
            "pair_exclude_types": [list(pair) for pair in self.pair_exclude_types],
            "rcond": None,
            "preset_out_bias": None,
            "@variables": {
                "out_bias": self.out_bias.detach().cpu().numpy().reshape(1, n_types, 1),
                "out_std": np.ones((1, n_types, 1)),
            },
        }

    def load_bias(self, source: dict[str, Any]) -> None:
        """`out_bias` of a model dict."""
        values = torch.from_numpy(np.array(source["@variables"]["out_bias"], dtype=np.float64))
        if values.numel() != len(self.type_map):
            raise InputError(f"out_bias has shape {tuple(values.shape)}, expected (1, {len(self.type_map)}, 1)")
        self.out_bias.copy_(values.reshape(-1))


def check_dict(source: dict[str, Any], own_keys: set[str], versions: tuple[int, int]) -> None:
    """InputError for fields or versions of a model dict that are unknown."""
    kind, version = source["type"], source.get("@version", 1)
    unknown = sorted(source.keys() - COMMON_KEYS - own_keys)
    if unknown:
        raise InputError(f"the model dict of type {kind!r} has {unknown[0]!r}, which carryall does not know")
    if not versions[0] <= version <= versions[1]:
        raise InputError(
            f"the model dict of type {kind!r} is of version {version}, carryall reads {versions[0]} to {versions[1]}: "
            "write it again with deepmd-kit 3.2"
        )
