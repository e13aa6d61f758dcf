"""What goes into a packed program and what comes out, in order: the contract between export and load."""

from __future__ import annotations

import torch
from torch import Tensor

from carryall.graph.neighbor_graph import NeighborGraph, local_index, rank_axis

INPUTS = (
    "positions",
    "atom_types",
    "system",
    "cell",
    "edge_center",
    "edge_neighbor",
    "edge_shift",
    "edge_mask",
    "ptr",
    "local",
    "rank",
)
OUTPUTS = ("energy", "atomic_energy", "forces", "virial", "atomic_virial", "edge_gradient")


def to_inputs(graph: NeighborGraph, extra: tuple[str, ...] = ()) -> tuple[Tensor, ...]:
    """The tensors of a graph in the order of INPUTS, then of `extra` (`spec.extra_inputs`); floating-point ones as float64."""
    full = graph.replace(local=local_index(graph), rank=rank_axis(graph))
    values = [getattr(full, name) for name in (*INPUTS, *extra)]
    return tuple(v.to(torch.float64).contiguous() if v.is_floating_point() else v.contiguous() for v in values)


def to_graph(inputs: tuple[Tensor, ...], extra: tuple[str, ...] = ()) -> NeighborGraph:
    """The inverse of `to_inputs`."""
    return NeighborGraph(**dict(zip((*INPUTS, *extra), inputs, strict=True)))
