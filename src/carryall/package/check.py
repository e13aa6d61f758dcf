"""A packed file against the model it came from, on graphs that the trace never saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carryall.errors import CarryallError
from carryall.graph.edge_terms import AtomicVirial
from carryall.graph.neighbor_graph import NeighborGraph, concatenate
from carryall.graph.neighbor_search import build_graph
from carryall.graph.padded import graph_from_padded, padded_from_graph
from carryall.graph.potential import Potential, PotentialSpec
from carryall.models.eager import EagerPotential
from carryall.package.run import PackedPotential
from carryall.package.signature import AXES, extra_width

TOLERANCE = {"float64": 1e-10, "float32": 2e-4}


class PackError(CarryallError):
    """The packed program does not reproduce the model; nothing was written."""


def check_against_eager(packed: PackedPotential, model: nn.Module) -> float:
    """The largest relative deviation over a set of graphs; PackError when it is beyond the tolerance of the dtype.

    The program is called as engines call it, and for whole graphs at once, where its own sums over edges count.
    """
    eager, graphs = EagerPotential(model, str(packed.device)), check_graphs(packed.spec)  # type: ignore[arg-type]
    worst, where = max(deviation(packed, eager, graphs), deviation(_Whole(packed), eager, graphs))
    tolerance = TOLERANCE[packed.spec.dtype]
    if not worst <= tolerance:
        raise PackError(
            f"the program differs from the model by {worst:.1e} in {where}, more than {tolerance:.0e} ({packed.spec.dtype})"
        )
    return worst


@dataclass(frozen=True)
class _Whole:
    packed: PackedPotential

    @property
    def spec(self) -> PotentialSpec:
        return self.packed.spec

    def __call__(self, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
        return self.packed.evaluate_whole(graph, atomic_virial)


def deviation(first: Potential, second: Potential, graphs: list[NeighborGraph]) -> tuple[float, str]:
    """The largest deviation, relative to max(1, size of the value), over all outputs and graphs, and where it is."""
    worst, where = 0.0, "nothing"
    for index, graph in enumerate(graphs):
        a, b = first(graph, atomic_virial=True), second(graph, atomic_virial=True)
        for key in b:
            if b[key].numel():
                error = float(((a[key] - b[key]).abs() / b[key].abs().clamp_min(1.0)).nan_to_num(torch.inf).max())
                if error > worst:
                    worst, where = error, f"{key} of graph {index}"
    return worst, where


def check_graphs(spec: PotentialSpec) -> list[NeighborGraph]:
    """Periodic, open, one-atom and empty cases, alone and together, and one with ghosts."""
    generator = torch.Generator().manual_seed(0)

    def system(n_atoms: int, length: float, periodic: bool) -> NeighborGraph:
        per_side = max(1, round(n_atoms ** (1 / 3) + 0.499))
        grid = torch.cartesian_prod(*[torch.arange(per_side, dtype=torch.float64)] * 3).reshape(-1, 3)[:n_atoms]
        jitter = 0.15 * torch.rand(grid.shape, generator=generator, dtype=torch.float64)
        types = torch.randint(len(spec.type_map), (n_atoms,), generator=generator)
        positions = (grid + jitter) * length / per_side
        cell = torch.eye(3, dtype=torch.float64)[None] * (length if periodic else 0.0)
        pbc = torch.full((1, 3), periodic)
        return build_graph(positions, types, torch.zeros(n_atoms, dtype=torch.int64), cell, pbc, spec.cutoff)

    spacing = 0.45 * spec.cutoff
    sizes = [(27, 3 * spacing, True), (7, 2 * spacing, False), (1, spacing, True), (1, spacing, False)]
    # what is long-range is for periodic systems only
    alone = [system(n_atoms, length, periodic or spec.long_range) for n_atoms, length, periodic in sizes]
    halo = graph_from_padded(*padded_from_graph(alone[0])).replace(cell=alone[0].cell)
    graphs = [*alone, concatenate([*alone, alone[0]]), halo]
    return [with_parameters(graph, spec, generator) for graph in graphs]


def with_parameters(graph: NeighborGraph, spec: PotentialSpec, generator: torch.Generator) -> NeighborGraph:
    """The graph with random values of the inputs that the potential takes."""
    rows = {"systems": graph.n_systems, "atoms": graph.n_atoms}
    values = {
        name: torch.rand(rows[AXES[name]], extra_width(spec, name), generator=generator, dtype=torch.float64)
        for name in spec.extra_inputs
    }
    return graph.replace(**values)
