"""Models that pass messages: the one of the examples, and one whose exchanges a compiler would like to reorder or drop."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carryall.exchange import Exchange, all_reduce, communicate, sum_to_owners
from carryall.graph import NeighborGraph, PotentialSpec, segment_sum
from carryall.graph.neighbor_graph import local_types
from carryall.models.registry import register
from structures import CUTOFF


def _example() -> Any:
    """The module of examples/message_passing_model.py."""
    path = Path(__file__).parents[1] / "examples" / "message_passing_model.py"
    if (module := sys.modules.get(path.stem)) is None:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def small_message_passing() -> nn.Module:
    """The example's, for two metals."""
    return _example().MessagePassing(("Cu", "Au"), CUTOFF)


class Tangled(nn.Module):
    """Every kind of exchange, many of them independent, one unused, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("charge", torch.tensor([0.3, -0.7], dtype=torch.float64))

    @property
    def spec(self) -> PotentialSpec:
        return PotentialSpec(cutoff=CUTOFF, type_map=("Cu", "Au"), message_passing=True)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        n_local = graph.n_local
        r = torch.where(graph.edge_mask, edge_vec.square().sum(1), CUTOFF**2).sqrt()
        near = (1 - (r / CUTOFF).clamp_max(1.0)) ** 3
        center, neighbor = graph.edge_center, graph.edge_neighbor
        h = segment_sum(near, center, n_local, graph.edge_mask)
        types = local_types(graph)
        count = all_reduce(torch.ones_like(types).sum(), graph)
        communicate(h[:, None].expand(-1, 5), graph)  # of no use
        everyones_types = communicate(types, graph)
        one = communicate(h.sin(), graph)
        two = communicate(torch.stack([h, 2 * h, h * h, h.cos()], 1).reshape(-1, 2, 2), graph)
        # without gradient, which would be summed in float32
        three = communicate((h + 1).detach().to(torch.float32), graph).to(torch.float64)
        charge = self.charge.index_select(0, types) * h
        mean = all_reduce(charge.sum(), graph) / count
        returned = sum_to_owners(segment_sum(near * three.index_select(0, neighbor), neighbor, graph.n_atoms), graph)
        # n_atoms is n_local + n_ghost: what is communicated goes together with what all atoms have
        weight = 1.0 + 0.1 * (everyones_types + graph.atom_types).to(torch.float64)
        message = near * (weight * one).index_select(0, neighbor) * two.index_select(0, neighbor).sum((1, 2))
        communicate(h[:, None].expand(-1, 7), graph)  # of no use either, and nothing follows
        return segment_sum(message, center, n_local, graph.edge_mask) + 0.1 * returned + (charge - mean) ** 2

    def to_dict(self) -> dict[str, Any]:
        return {"type": "tangled"}

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> Tangled:
        return cls()


register("tangled", Tangled)


class Recorded(Exchange):
    """Notes what is exchanged: the op, the dtype and the trailing shape."""

    def __init__(self, plan: Any, transport: Any) -> None:
        super().__init__(plan, transport)
        self.calls: list[str] = []

    def _note(self, name: str, rows: Tensor) -> None:
        self.calls.append(f"{name} {rows.dtype} {list(rows.shape[1:])}")

    def forward(self, rows: Tensor) -> Tensor:
        self._note("forward", rows)
        return super().forward(rows)

    def reverse(self, rows: Tensor) -> Tensor:
        self._note("reverse", rows)
        return super().reverse(rows)

    def all_reduce(self, values: Tensor) -> Tensor:
        self._note("all_reduce", values)
        return super().all_reduce(values)


class SwitchedOff(Exchange):
    """Ghosts get zeros: what a test has to notice."""

    def forward(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(super().forward(rows))

    def reverse(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(super().reverse(rows))
