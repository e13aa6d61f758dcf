"""A model as a program with deepmd-kit's inputs and outputs, the graph form of its 3.2 (`lower_input_kind` "graph").

Nodes of all frames lie one after another, the owned ones of a frame first, ghosts after them. An edge goes from its neighbour
(`edge_index[0]`) to its centre (`edge_index[1]`), edges are sorted by centre, two or more masked ones at the end point at node
0, and `edge_vec`, neighbour minus centre, is all there is of geometry. Energies count for owned nodes only.

No input's shape says how many edges a centre has at most, so that number is read from data. Models that lay out the edges of
each centre side by side are run on a fixed number of centres after another, in a loop inside the program: memory does not grow
with the system but for the edges themselves, and ghosts cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map_impl
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion

from carryall.errors import InputError
from carryall.graph.edge_terms import reduce_edges
from carryall.graph.neighbor_graph import NeighborGraph, local_index
from carryall.graph.potential import PotentialSpec
from carryall.graph.segments import segment_sum
from carryall.models.derivatives import EnergyModel, energy_and_gradient
from carryall.package.load import quiet_torch
from carryall.package.trace import LARGEST, Sizes, own_sizes, sample_sizes, without_gradients

GRAPH_INPUTS = (
    "atype",
    "n_node",
    "n_local",
    "edge_index",
    "edge_vec",
    "edge_mask",
    "destination_order",
    "destination_row_ptr",
    "source_order",
    "source_row_ptr",
)
"""Inputs that every program has; `fparam`, `aparam` and `charge_spin` follow where their width is not 0."""
OUTPUTS = ("atom_energy", "energy", "force", "virial", "atom_virial", "mask")
TYPICAL_DEGREE = 80  # neighbours of an atom, to choose how many centres go through the loop together
LOOPS_SINCE = "2.13"  # version of torch whose compiler knows a loop with sizes of its own; older ones take all centres at once
SMALL_BLOCK = 1 << 16  # edge slots: potentials that want larger blocks than this need none
PARAMETERS = ("fparam", "aparam", "charge_spin")


def input_names(spec: PotentialSpec) -> tuple[str, ...]:
    """Names of the program's inputs, in order."""
    return (*GRAPH_INPUTS, *(name for name in PARAMETERS if name in spec.extra_inputs))


def chunk_size(spec: PotentialSpec) -> int | None:
    """Centres that go through the loop together; None for a potential that is evaluated whole."""
    if spec.block_edges is None or spec.block_edges > SMALL_BLOCK:
        return None
    return max(1, spec.block_edges // TYPICAL_DEGREE)


def deepmd_inputs(graph: NeighborGraph, edge_vec: Tensor, spec: PotentialSpec) -> tuple[Tensor, ...]:
    """The tensors that deepmd-kit would pass for a graph of ours; its systems are in order, or it has ghosts and one system."""
    n_atoms, n_systems, n_edges = graph.n_atoms, graph.n_systems, graph.n_edges
    if graph.n_local != n_atoms and n_systems > 1:
        raise InputError("ghosts are at the end of the atoms of each system for deepmd-kit: give one system")
    count = torch.bincount(graph.system, minlength=n_systems)
    guard = graph.edge_center.new_zeros(2)
    source, destination = torch.cat([graph.edge_neighbor, guard]), torch.cat([graph.edge_center, guard])
    last = graph.ptr[-1:].expand(n_atoms - graph.n_local)
    order = torch.cat([graph.edge_neighbor.argsort(stable=True), n_edges + torch.arange(2)])
    found = {
        "atype": graph.atom_types,
        "n_node": count,
        "n_local": torch.bincount(graph.system.index_select(0, local_index(graph)), minlength=n_systems),
        "edge_index": torch.stack([source, destination]),
        "edge_vec": torch.cat([edge_vec, edge_vec.new_zeros(2, 3)]),
        "edge_mask": torch.cat([graph.edge_mask, graph.edge_mask.new_zeros(2)]),
        "destination_order": torch.arange(n_edges + 2),
        "destination_row_ptr": torch.cat([graph.ptr, last]),
        "source_order": order,
        "source_row_ptr": torch.cat([count.new_zeros(1), torch.bincount(graph.edge_neighbor, minlength=n_atoms).cumsum(0)]),
        "fparam": graph.fparam,
        "aparam": graph.aparam,
        "charge_spin": graph.charge_spin,
    }
    return tuple(cast(Tensor, found[name]) for name in input_names(spec))


class GraphProgram(nn.Module):
    """What is traced: deepmd-kit's tensors in, its outputs out, derivatives inside."""

    def __init__(self, model: EnergyModel, chunk: Chunk | None) -> None:
        super().__init__()
        # some models look at their tensors to make their spec, which must not be traced
        self.model, self.spec, self.chunk = model, model.spec, chunk

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name, in the order of OUTPUTS: (N, 1), (nf, 1), (N, 3), (nf, 9), (N, 9) and (N,)."""
        given = dict(zip(input_names(self.spec), inputs, strict=True))
        graph, owned = to_graph(given)
        vectors = given["edge_vec"].detach()
        if self.chunk is None:
            atomic_energy, gradient, _ = energy_and_gradient(_Bound(cast(nn.Module, self.model), self.spec), graph, vectors)
        else:
            atomic_energy, gradient = self.chunk.evaluate(graph, owned, vectors)
        atomic_energy = torch.where(owned, atomic_energy, 0.0)
        out = reduce_edges(graph, atomic_energy, vectors, gradient, atomic_virial=True)
        n_nodes, n_frames = graph.atom_types.shape[0], given["n_node"].shape[0]
        values = (
            atomic_energy.view(n_nodes, 1),
            out["energy"].view(n_frames, 1),
            out["forces"],
            out["virial"].view(n_frames, 9),
            out["atomic_virial"].view(n_nodes, 9),
            owned.to(torch.int32),
        )
        # a dict, since deepmd-kit's Python asks for names
        return {name: value.detach() for name, value in zip(OUTPUTS, values, strict=True)}


def to_graph(given: dict[str, Tensor]) -> tuple[NeighborGraph, Tensor]:
    """The graph of all nodes, each a centre, and which are owned: (N,) bool.

    Ghosts have no edges towards them, and their energies are dropped. A node of negative type is not there.
    """
    atype, vectors, (source, destination) = given["atype"], given["edge_vec"], given["edge_index"].unbind(0)
    end, row = given["n_node"].cumsum(0), given["destination_row_ptr"]
    node = torch.arange(atype.shape[0], device=atype.device)
    frame = torch.searchsorted(end, node, right=True).clamp_max(end.shape[0] - 1)
    first = (end - given["n_node"]).index_select(0, frame)
    real = atype >= 0
    owned = (node - first < given["n_local"].index_select(0, frame)) & (node < end.index_select(0, frame)) & real
    mask = given["edge_mask"] & owned.index_select(0, destination) & real.index_select(0, source)
    degree = row.index_select(0, node + 1) - row.index_select(0, node)
    # 2 or more, since the compiler would ask whether it is 1
    widest = read_size(degree.max().clamp_min(2), 2)
    graph = NeighborGraph(
        positions=vectors.new_zeros(atype.shape[0], 3),
        atom_types=atype.clamp_min(0),
        system=frame,
        cell=vectors.new_zeros(end.shape[0], 3, 3),
        edge_center=destination,
        edge_neighbor=source,
        edge_shift=torch.zeros_like(vectors, dtype=torch.int32),
        edge_mask=mask,
        ptr=row,
        local=node,
        rank=torch.arange(widest, device=atype.device),
        **{name: given.get(name) for name in PARAMETERS},
    )
    return graph, owned


def read_size(value: Tensor, least: int) -> int:
    """A size that depends on data, `least` or more."""
    size = cast(int, value.item())
    torch.ops.aten.sym_constrain_range_for_size.default(size, min=least, max=LARGEST)
    torch._check(size >= least)
    return size


@dataclass(frozen=True)
class Chunk:
    """The model on a fixed number of centres, traced by itself, and the tensors of the model that it takes."""

    size: int
    body: Callable[..., tuple[Tensor, Tensor]]
    weights: tuple[Tensor, ...]

    def evaluate(self, graph: NeighborGraph, owned: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Energies of all nodes (N,), 0 unless `owned`, and dE/d(edge vector) (E, 3)."""
        n_nodes, n_edges, device = graph.n_atoms, graph.n_edges, vectors.device
        rank = cast(Tensor, graph.rank)
        n_owned = owned.sum()
        n_chunks = read_size(((n_owned + self.size - 1) // self.size).clamp_min(1), 1)
        order = torch.where(owned, 0, 1).argsort(stable=True)
        place = torch.arange(n_chunks * self.size, device=device)
        center = torch.where(place < n_owned, order.index_select(0, place.clamp_max(n_nodes - 1)), n_nodes)
        # the width itself goes in, too: the compiler looks for every size of a result among the inputs
        others = (rank.shape[0], rank, *body_inputs(graph, vectors), *self.weights)
        energy, gradient = map_impl(self.body, (center.view(n_chunks, self.size),), others)
        edge, _ = edge_slots(center, rank, graph.ptr, n_nodes, beyond=n_edges)
        return (
            segment_sum(energy.reshape(-1), center, n_nodes + 1)[:n_nodes],
            segment_sum(gradient.reshape(-1, 3), edge.reshape(-1), n_edges + 1)[:n_edges],
        )


def body_inputs(graph: NeighborGraph, vectors: Tensor) -> tuple[Tensor, ...]:
    """What the body takes of the whole graph."""
    fields = ("atom_types", "system", "cell", "edge_neighbor", "edge_mask", "ptr", *PARAMETERS)
    values = [getattr(graph, name) for name in fields]
    return (vectors, *(value for value in values if value is not None))


def edge_slots(center: Tensor, rank: Tensor, ptr: Tensor, n_nodes: int, beyond: int = 0) -> tuple[Tensor, Tensor]:
    """(n, degree) edges of the centres (n,), `beyond` in empty slots, and which slots are taken; node `n_nodes` has none."""
    there = center < n_nodes
    safe = torch.where(there, center, 0)
    edge = ptr.index_select(0, safe)[:, None] + rank
    taken = (edge < ptr.index_select(0, safe + 1)[:, None]) & there[:, None]
    return torch.where(taken, edge, beyond), taken


def trace_chunk(model: EnergyModel, size: int, sizes: Sizes, device: str) -> Chunk:
    """The model on `size` centres, for every degree and for graphs of all sizes."""
    spec = model.spec
    module = cast(nn.Module, model)
    named = {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}
    optional = tuple(name for name in PARAMETERS if name in spec.extra_inputs)

    def body(center: Tensor, degree: int, rank: Tensor, vectors: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        names = ("atom_types", "system", "cell", "edge_neighbor", "edge_mask", "ptr", *optional)
        whole = dict(zip(names, rest, strict=False))
        star = star_graph(center, rank, whole)
        edge, taken = edge_slots(center, rank, whole["ptr"], whole["atom_types"].shape[0])
        own = _Bound(module, spec, dict(zip(named, rest[len(names) :], strict=True)))
        energy, gradient, _ = energy_and_gradient(own, star, vectors.index_select(0, edge.reshape(-1)))
        return energy, torch.where(taken[..., None], gradient.view(*taken.shape, 3), 0.0)

    atoms, edges = sizes.atoms, sizes.edges
    real, whole = torch.zeros(edges, 3, dtype=torch.float64), torch.zeros(atoms, dtype=torch.int64)
    widths = {"fparam": (sizes.systems, spec.dim_fparam), "aparam": (atoms, spec.dim_aparam)}
    widths["charge_spin"] = (sizes.systems, spec.dim_chg_spin)
    sample = (
        torch.zeros(size, dtype=torch.int64),
        sizes.degree,
        torch.arange(sizes.degree),
        real,
        whole,
        whole.clone(),
        torch.zeros(sizes.systems, 3, 3, dtype=torch.float64),
        torch.zeros(edges, dtype=torch.int64),
        torch.zeros(edges, dtype=torch.bool),
        torch.zeros(atoms + 1, dtype=torch.int64),
        *(torch.zeros(*widths[name], dtype=torch.float64) for name in optional),
    )
    placed = [one.to(device) if isinstance(one, Tensor) else one for one in sample]
    weights = tuple(named.values())
    traced = make_fx(body, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*placed, *weights)
    return Chunk(size, traced, weights)


@dataclass(frozen=True)
class _Bound:
    """The model with its spec as it is outside of the trace, and with other tensors in the places of its own."""

    module: nn.Module
    spec: PotentialSpec
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        if not self.tensors:
            return cast(Tensor, self.module(graph, edge_vec))
        return cast(Tensor, functional_call(self.module, self.tensors, (graph, edge_vec)))


def star_graph(center: Tensor, rank: Tensor, whole: dict[str, Tensor]) -> NeighborGraph:
    """Each centre with `degree` edges to neighbours of their own, masked where it has fewer."""
    edge, taken = edge_slots(center, rank, whole["ptr"], whole["atom_types"].shape[0])
    flat = edge.reshape(-1)
    neighbor = whole["edge_neighbor"].index_select(0, flat)
    atom = torch.cat([torch.where(center < whole["atom_types"].shape[0], center, 0), neighbor])
    n, degree, device = center.shape[0], rank.shape[0], center.device
    local = torch.arange(n, device=device)
    cell = whole["cell"]
    aparam = whole.get("aparam")
    return NeighborGraph(
        positions=cell.new_zeros(atom.shape[0], 3),
        atom_types=whole["atom_types"].index_select(0, atom),
        system=whole["system"].index_select(0, atom),
        cell=cell,
        edge_center=local[:, None].expand(n, degree).reshape(-1),
        edge_neighbor=torch.arange(n * degree, device=device) + n,
        edge_shift=torch.zeros((n * degree, 3), dtype=torch.int32, device=device),
        edge_mask=taken.reshape(-1) & whole["edge_mask"].index_select(0, flat),
        ptr=torch.arange(n + 1, device=device) * degree,
        local=local,
        rank=rank,
        fparam=whole.get("fparam"),
        aparam=None if aparam is None else aparam.index_select(0, atom),
        charge_spin=whole.get("charge_spin"),
    )


def trace_for_deepmd(model: nn.Module, device: str = "cpu") -> ExportedProgram:
    """The program of a model, for any number of frames, nodes and edges; its parameters are constants of it."""
    potential = cast(EnergyModel, model)
    spec = potential.spec
    size = chunk_size(spec) if TorchVersion(torch.__version__) >= LOOPS_SINCE else None
    taken = own_sizes(model) | {2, 3, 9, len(spec.type_map), spec.dim_fparam, spec.dim_aparam, spec.dim_chg_spin, size or 1}
    sizes = sample_sizes(taken)
    with without_gradients(model), quiet_torch():
        chunk = None if size is None else trace_chunk(potential, size, sizes, device)
        sample = tuple(one.to(device) for one in sample_inputs(spec, sizes))
        program = GraphProgram(potential, chunk)
        flat = make_fx(program, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*sample)
        return torch.export.export(flat, sample, dynamic_shapes=dynamic_shapes(spec), strict=False)


def sample_inputs(spec: PotentialSpec, sizes: Sizes) -> tuple[Tensor, ...]:
    """What to trace with: only its shapes play a part."""
    nodes, frames, edges = sizes.atoms, sizes.systems, sizes.edges
    count = torch.full((frames,), nodes // frames, dtype=torch.int64)
    found = {
        "atype": torch.zeros(nodes, dtype=torch.int64),
        "n_node": count,
        "n_local": count - 1,
        "edge_index": torch.zeros(2, edges, dtype=torch.int64),
        "edge_vec": torch.ones(edges, 3, dtype=torch.float64),
        "edge_mask": torch.ones(edges, dtype=torch.bool),
        "destination_row_ptr": torch.zeros(nodes + 1, dtype=torch.int64),
        "fparam": torch.zeros(frames, spec.dim_fparam, dtype=torch.float64),
        "aparam": torch.zeros(nodes, spec.dim_aparam, dtype=torch.float64),
        "charge_spin": torch.zeros(frames, spec.dim_chg_spin, dtype=torch.float64),
    }
    found |= {"destination_order": torch.arange(edges), "source_order": torch.arange(edges)}
    found["source_row_ptr"] = torch.zeros(nodes + 1, dtype=torch.int64)
    return tuple(found[name] for name in input_names(spec))


def dynamic_shapes(spec: PotentialSpec) -> tuple[dict[int, object], ...]:
    """Which dimensions are free; deepmd-kit passes two edges, one node and one frame at least."""
    nodes, frames = Dim("nodes_size", min=1, max=LARGEST), Dim("frames_size", min=1, max=LARGEST)
    edges = Dim("edges_size", min=2, max=LARGEST)
    rows = {name: Dim(f"{name}_size", min=2, max=LARGEST) for name in ("destination_row_ptr", "source_row_ptr")}
    of = {"atype": nodes, "aparam": nodes, "n_node": frames, "n_local": frames, "fparam": frames, "charge_spin": frames}
    return tuple({1: edges} if name == "edge_index" else {0: of.get(name, rows.get(name, edges))} for name in input_names(spec))
