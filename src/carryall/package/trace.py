"""One program for graphs of all sizes: energy and derivatives traced once, exported with every dimension free, down to zero.

The derivatives are traced into the graph, so a file needs no autograd. Sizes that depend on data arrive as the shapes of inputs
(`local`, `rank`), and no size of the sample equals another, or one of the model's own, since the tracer would take equal ones
for the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors, local_index, pointer
from carryall.graph.potential import PotentialSpec
from carryall.models.derivatives import EnergyModel, energy_and_gradients, reduced
from carryall.package.load import quiet_torch
from carryall.package.signature import AXES, extra_width, input_names, output_names, to_graph, to_inputs

LARGEST = 2**40  # of any dimension
ORIGINS = ("from_node", "stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")


class Program(nn.Module):
    """The function that is traced: tensors in, tensors out, derivatives inside."""

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model, self.spec = model, model.spec  # read now, since some facts depend on values of weights

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of `output_names`."""
        spec = self.spec
        graph = to_graph(inputs, spec)
        vectors = edge_vectors(graph).detach()
        found = energy_and_gradients(self.model, graph, vectors, long_range=spec.long_range)
        out = reduced(graph, vectors, found, atomic_virial=True)
        out["edge_gradient"] = found.by_edge
        if found.by_spin is not None:
            out["magnetic_forces"] = -found.by_spin
        if found.by_strain is not None:
            out["strain_gradient"] = found.by_strain
        if spec.message_passing:
            out["exchange_token"] = graph.exchange.token
        return tuple(out[name].detach() for name in output_names(spec))


def trace(model: nn.Module, device: str = "cpu") -> ExportedProgram:
    """The program of a model; its parameters are constants of it."""
    spec = cast(EnergyModel, model).spec
    sample = to_inputs(sample_graph(spec, own_sizes(model), device), spec)
    dims = {axis: Dim(f"{axis}_size", min=0, max=LARGEST) for axis in dict.fromkeys(AXES.values())}
    shapes = tuple({0: dims[AXES[name]]} if name in AXES else {} for name in input_names(spec))
    with without_gradients(model), quiet_torch():
        flat = make_fx(Program(cast(EnergyModel, model)), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*sample)
        return without_origins(torch.export.export(flat, sample, dynamic_shapes=shapes, strict=False))


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """No gradient for parameters while this lasts."""
    wanted = [p.requires_grad for p in model.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)


def without_origins(program: ExportedProgram) -> ExportedProgram:
    """The program without notes of where in whose source its operations came from: they differ from run to run."""
    for node in program.graph.nodes:
        for key in ORIGINS:
            node.meta.pop(key, None)
    return program


def own_sizes(model: nn.Module) -> set[int]:
    """Every size that a tensor of the model has."""
    return {size for tensors in (model.parameters(), model.buffers()) for tensor in tensors for size in tensor.shape}


@dataclass(frozen=True)
class Sizes:
    """Of the sample, all different."""

    systems: int
    degree: int
    local: int
    atoms: int
    edges: int
    ghost: int
    k: int
    places: int


def sample_sizes(taken: set[int]) -> Sizes:
    """Eight primes in ascending order, none `taken`; `local + 1`, the length of `ptr`, and differences are not either."""
    found: list[int] = []
    candidate = 5
    while len(found) < 8:
        used = taken | set(found) | {size + 1 for size in found}
        prime = all(candidate % divisor for divisor in range(2, int(candidate**0.5) + 1))
        if prime and not {candidate, candidate + 1} & used:
            found.append(candidate)
        candidate += 1
    return Sizes(*found)


def sample_graph(spec: PotentialSpec, taken: set[int], device: str = "cpu") -> NeighborGraph:
    """What to trace with: only its shapes play a part."""
    size = sample_sizes(taken | {2, 3, len(spec.type_map), spec.dim_fparam, spec.dim_aparam})
    center = (torch.arange(size.edges) % size.local).sort().values
    graph = NeighborGraph(
        positions=torch.zeros(size.atoms, 3, dtype=torch.float64),
        atom_types=torch.zeros(size.atoms, dtype=torch.int64),
        system=torch.arange(size.atoms).clamp_max(size.systems - 1),
        cell=torch.zeros(size.systems, 3, 3, dtype=torch.float64),
        edge_center=center,
        edge_neighbor=center.flip(0),
        edge_shift=torch.zeros(size.edges, 3, dtype=torch.int32),
        edge_mask=torch.ones(size.edges, dtype=torch.bool),
        ptr=pointer(center, size.local),
        local=torch.arange(size.local),
        rank=torch.arange(size.degree),
        **_extra_values(spec, size),
    ).to(device)
    if spec.long_range:
        k_index, place = torch.ones(size.k, 3, dtype=torch.int64), torch.arange(size.local) % size.places
        graph = graph.replace(k_index=k_index, place=place, places=torch.arange(size.places)).to(device)
    return with_sample_exchange(graph, size.ghost) if spec.message_passing else graph


def with_sample_exchange(graph: NeighborGraph, n_ghost: int) -> NeighborGraph:
    """Inputs of exchanges to trace with: tracing calls none."""
    from carryall.exchange.context import ExchangeContext

    ghost, handle, token = torch.arange(n_ghost, device=graph.device), torch.zeros(1).long(), torch.zeros(1).double()
    return graph.replace(exchange=ExchangeContext(local_index(graph), ghost, handle, token))


def _extra_values(spec: PotentialSpec, size: Sizes) -> dict[str, Tensor]:
    rows = {"systems": size.systems, "atoms": size.atoms}
    return {name: torch.zeros(rows[AXES[name]], extra_width(spec, name), dtype=torch.float64) for name in spec.extra_inputs}
