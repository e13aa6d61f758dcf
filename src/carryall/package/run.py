"""A packed program behind the Potential contract. Nothing here needs the source of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.graph.blocks import EAGER_FACTOR, evaluate_in_blocks
from carryall.graph.edge_terms import AtomicVirial, per_atom
from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors
from carryall.graph.potential import PotentialSpec, with_defaults
from carryall.package.metadata import Metadata
from carryall.package.signature import EXCHANGE, to_inputs

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""The program: tensors in the order of input_keys to tensors in the order of output_keys."""

EDGE_OUTPUTS = ("atomic_energy", "edge_gradient", "magnetic_forces")
"""What the evaluation by blocks needs."""

Prepare = Callable[[NeighborGraph], NeighborGraph]


@dataclass(frozen=True, eq=False)
class PackedPotential:
    """A `.pt2` or `.pte`."""

    path: Path
    facts: Metadata = field(repr=False)
    device: torch.device
    _run: Run = field(repr=False)
    _run_edges: Run = field(repr=False)
    """The same for EDGE_OUTPUTS alone, in their order, as far as the program has them."""

    @cached_property
    def spec(self) -> PotentialSpec:
        """Facts that an engine needs."""
        return self.facts.potential_spec

    def __call__(self, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
        """Evaluate the graph; results are on the graph's device."""
        here = self._opened(graph, self._prepared)
        with torch.no_grad():
            if self.spec.block_edges is None:
                out = self.evaluate_whole(here, atomic_virial)
            else:
                out = evaluate_in_blocks(self._edge_call, here, self._block_edges, atomic_virial=atomic_virial)
        return {name: value.to(graph.device) for name, value in out.items()}

    def evaluate_whole(self, graph: NeighborGraph, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
        """The program's own sums, in one call."""
        out = self._outputs(graph)
        gradient, by_neighbor = out.pop("edge_gradient", None), out.pop("atomic_virial")
        by_strain = out.pop("strain_gradient", None)
        if atomic_virial is True or atomic_virial == "neighbor":
            return {**out, "atomic_virial": by_neighbor}
        if atomic_virial:
            if gradient is None:
                raise InputError(
                    f"{self.path} is of carryall {self.facts.carryall_version}, whose files give per-atom virials by neighbour "
                    f"only: make it again from its source: carryall rebuild {self.path.name} new{self.path.suffix}"
                )
            edge_virial = -gradient[:, :, None] * edge_vectors(graph)[:, None, :]
            return {**out, "atomic_virial": per_atom(graph, edge_virial, atomic_virial, by_strain)}
        return out

    def _outputs(self, graph: NeighborGraph) -> dict[str, Tensor]:
        graph = self._opened(graph)
        inputs = to_inputs(graph, self.spec)
        with graph.exchange.own_errors() if self.spec.message_passing else nullcontext():
            found = self._run(inputs)
        out = dict(zip(self.facts.output_keys, found, strict=True))
        return {name: value for name, value in out.items() if name not in EXCHANGE}

    def _prepared(self, graph: NeighborGraph) -> NeighborGraph:
        _check_types(graph, self.spec)
        return with_defaults(graph.to(self.device, torch.float64), self.spec)

    def _opened(self, graph: NeighborGraph, prepare: Prepare = lambda graph: graph) -> NeighborGraph:
        """The graph, prepared; its exchange open where messages are passed, and then what fails on one rank fails on all."""
        if not self.spec.message_passing:
            return prepare(graph)
        # imported by those who exchange, only
        from carryall.exchange.context import open_exchange

        return open_exchange(graph, prepare)

    @property
    def _block_edges(self) -> int:
        assert self.spec.block_edges is not None
        return self.spec.block_edges * (EAGER_FACTOR if self.facts.kind == "pte" else 1)

    def _edge_call(self, part: NeighborGraph) -> tuple[Tensor, Tensor, Tensor | None]:
        energy, gradient, *magnetic = self._run_edges(to_inputs(part, self.spec))
        return energy, gradient, -magnetic[0] if magnetic else None


def _check_types(graph: NeighborGraph, spec: PotentialSpec) -> None:
    # compiled code ends the whole process on an index out of range
    if len(graph.atom_types) and not 0 <= int(graph.atom_types.min()) <= int(graph.atom_types.max()) < len(spec.type_map):
        raise InputError(f"atom_types must lie in 0..{len(spec.type_map) - 1}, the indices of {list(spec.type_map)}")
