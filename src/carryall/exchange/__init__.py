"""What makes a model parallel: features of ghosts from the atoms that own them, and sums over all owners.

This module is the whole public surface for model code. One process that owns all atoms needs no transport: a ghost is an
image of a local atom, and an exchange is a gather whose derivative (a sum into the owners) autograd knows to any order.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class ExchangeGraph(Protocol):
    """What an exchange needs to know of a graph."""

    @property
    def n_atoms(self) -> int:
        """Local and ghost atoms."""
        ...

    @property
    def n_local(self) -> int:
        """Owned atoms, which come first."""
        ...

    @property
    def ghost_owner(self) -> Tensor | None:
        """(n_ghost,) local atom that each ghost is an image of."""
        ...


def communicate(features: Tensor, graph: ExchangeGraph) -> Tensor:
    """(n_local, ...) features of owned atoms to (n_atoms, ...): ghost rows get the row of their owner.

    Raises ValueError when the rows are not the owned atoms', or when a ghost's owner is not in this process.
    """
    if features.shape[0] != graph.n_local:
        raise ValueError(f"features have {features.shape[0]} rows, expected one for each of the {graph.n_local} local atoms")
    if graph.n_atoms == graph.n_local:
        return features
    if graph.ghost_owner is None:
        raise ValueError(
            f"the graph has {graph.n_atoms - graph.n_local} ghosts but no ghost_owner: their owners are not in this process"
        )
    return torch.cat([features, features.index_select(0, graph.ghost_owner)])


def all_reduce(values: Tensor, graph: ExchangeGraph) -> Tensor:
    """The sum of `values` over all processes that share the graph; one process owns all of a graph without foreign ghosts."""
    if graph.n_atoms != graph.n_local and graph.ghost_owner is None:
        raise ValueError("the graph has ghosts but no ghost_owner: their owners are not in this process")
    return values
