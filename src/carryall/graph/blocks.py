"""Evaluation by blocks of centres: for a potential without message passing the energy is a sum over centres.

A centre and its edges are all that its energy depends on, so blocks of centres are evaluated one after another, each small
enough that what it allocates stays in cache; memory is that of one block, and of what a chunk of centres needs to be
summed up, whatever the size of the system. Centres of a block have nearly the same number of edges, so that layouts which
give every centre the same number of slots waste none. Results are those of one call up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from carryall.graph.edge_terms import AtomicVirial, reduce_edges
from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors, local_index
from carryall.graph.potential import MAGNETIC
from carryall.graph.segments import segment_sum

CHUNK = 4096  # centres whose edge terms are summed together, at least
CHUNKS = 64  # that a system has at most, since each adds into all atoms
EAGER_FACTOR = 2  # larger blocks where operations run one by one, since each takes its time to start
GPU_FACTOR = 512  # a GPU holds and wants more than a CPU's cache

EdgeCall = Callable[[NeighborGraph], tuple[Tensor, Tensor, Tensor | None]]
"""From a graph to its atomic energies (n_local,), dE/d(edge vector) (n_edges, 3) and dE/d(spin) (n_atoms, 3) or None."""


def evaluate_in_blocks(
    call: EdgeCall, graph: NeighborGraph, block_edges: int, *, atomic_virial: AtomicVirial = False
) -> dict[str, Tensor]:
    """What a Potential returns for `graph`, from `call` on blocks of at most `block_edges` edge slots (times 512 on a GPU).

    A block has at least one centre. `call` gets star graphs: each edge has a neighbour of its own, centres lie at the
    origin and neighbours at the edge vectors.
    """
    keep_freed_memory()
    limit = block_edges * (1 if graph.device.type == "cpu" else GPU_FACTOR)
    atomic_energy = graph.positions.new_zeros(graph.n_local)
    out: dict[str, Tensor] = {}
    for begin, end in chunks(graph.n_local):
        part, order = by_degree(graph, begin, end)
        vectors = edge_vectors(part).detach()
        gradient = torch.zeros_like(vectors)
        energies, of_centers, of_neighbors = [atomic_energy.new_zeros(0)], [], []
        for star, edges in star_graphs(part, order, vectors, limit):
            energy, found, by_spin = call(star)
            energies.append(energy)
            gradient[edges] = found
            if by_spin is not None:
                of_centers.append(by_spin[: star.n_local])
                of_neighbors.append(by_spin[star.n_local :])
        atomic_energy[order] = torch.cat(energies)
        if of_centers:
            rows = torch.cat([*of_centers, *of_neighbors])
            by_atom = segment_sum(rows, torch.cat([order, part.edge_neighbor]), graph.n_atoms)
            out[MAGNETIC] = out[MAGNETIC].sub_(by_atom) if MAGNETIC in out else -by_atom
        sums = reduce_edges(part, atomic_energy, vectors, gradient, atomic_virial=atomic_virial)
        for name in sums.keys() - {"energy", "atomic_energy"}:
            out[name] = out[name].add_(sums[name]) if name in out else sums[name]
    local_system = graph.system.index_select(0, local_index(graph))
    return {"energy": segment_sum(atomic_energy, local_system, graph.n_systems), "atomic_energy": atomic_energy, **out}


def keep_freed_memory() -> None:
    """Let the next block have what a block frees.

    glibc gives large pieces back to the system, and every block would fault them in again (twice the time, measured), until it
    has seen a larger one freed, of up to 32 MB.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def chunks(n_local: int) -> Iterator[tuple[int, int]]:
    """Ranges of centres; one even when there is none."""
    size = max(CHUNK, -(-n_local // CHUNKS))
    for begin in range(0, max(n_local, 1), size):
        yield begin, min(begin + size, n_local)


def by_degree(graph: NeighborGraph, begin: int, end: int) -> tuple[NeighborGraph, Tensor]:
    """The edges of the centres begin:end, centre by centre in the order of their degrees, which is the second result.

    The graph is for sums over edges only: its edges are not sorted by centre, and its `ptr` is that of the ordered centres.
    """
    start = graph.ptr[begin:end]
    degree = graph.ptr[begin + 1 : end + 1] - start
    order = degree.argsort(stable=True)
    degree, start = degree[order], start[order]
    ptr = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    n_edges = int(ptr[-1])
    edge = torch.arange(n_edges, device=graph.device) + torch.repeat_interleave(start - ptr[:-1], degree, output_size=n_edges)
    fields = {name: getattr(graph, name)[edge] for name in ("edge_center", "edge_neighbor", "edge_shift", "edge_mask")}
    return graph.replace(**fields, ptr=ptr, local=local_index(graph), rank=None), order + begin


def star_graphs(part: NeighborGraph, order: Tensor, vectors: Tensor, limit: int) -> Iterator[tuple[NeighborGraph, slice]]:
    """Star graphs of the centres `order`, whose edges `part` has in that order, and which edges each holds."""
    center, neighbor = order, part.edge_neighbor
    center_type, neighbor_type = part.atom_types[center], part.atom_types[neighbor]
    first, last = (int(part.system[center].min()), int(part.system[center].max())) if len(center) else (0, 0)
    center_system, edge_system = part.system[center] - first, part.system[part.edge_center] - first
    ptr: list[int] = part.ptr.tolist()
    widest = max(limit, ptr[-1] - ptr[-2]) if len(ptr) > 1 else limit
    count = torch.arange(max(widest, len(order)) + len(order) + 1, device=part.device)
    origin, no_shift = vectors.new_zeros(len(order), 3), part.edge_shift.new_zeros(1, 3)
    cell = part.cell.new_zeros(last - first + 1, 3, 3)
    place = torch.repeat_interleave(count[: len(order)], part.ptr.diff(), output_size=ptr[-1])
    fparam, charge_spin = (None if value is None else value[first : last + 1] for value in (part.fparam, part.charge_spin))
    has_rows = part.aparam is not None or part.spin is not None
    for c0, c1 in cuts(ptr, limit):
        e0, e1 = ptr[c0], ptr[c1]
        n_centers, n_edges = c1 - c0, e1 - e0
        atoms = torch.cat([center[c0:c1], neighbor[e0:e1]]) if has_rows else None
        aparam, spin = (None if value is None else value[atoms] for value in (part.aparam, part.spin))
        yield (
            NeighborGraph(
                positions=torch.cat([origin[c0:c1], vectors[e0:e1]]),
                atom_types=torch.cat([center_type[c0:c1], neighbor_type[e0:e1]]),
                system=torch.cat([center_system[c0:c1], edge_system[e0:e1]]),
                cell=cell,
                edge_center=place[e0:e1] - c0,
                edge_neighbor=count[n_centers : n_centers + n_edges],
                edge_shift=no_shift.expand(n_edges, 3),
                edge_mask=part.edge_mask[e0:e1],
                ptr=part.ptr[c0 : c1 + 1] - e0,
                local=count[:n_centers],
                rank=count[: ptr[c1] - ptr[c1 - 1] if c1 else 0],
                fparam=fparam,
                aparam=aparam,
                spin=spin,
                charge_spin=charge_spin,
            ),
            slice(e0, e1),
        )


def cuts(ptr: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Ranges of centres, in ascending order of degree, of at most `limit` slots of the range's largest degree."""
    ranges, begin = [], 0
    for k in range(1, len(ptr) - 1):
        if (k + 1 - begin) * (ptr[k + 1] - ptr[k]) > limit:
            ranges.append((begin, k))
            begin = k
    return [*ranges, (begin, len(ptr) - 1)]
