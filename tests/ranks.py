"""Ranks in threads of one process, and one graph spread over ranks: what a decomposed engine hands to a potential."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from carryall.exchange import Exchange, plan_from_ids, sum_to_owners
from carryall.exchange.transport import Messages, Transport
from carryall.graph import NeighborGraph, Potential, pointer

PATIENCE = 20.0  # seconds, for a message of another rank
T = TypeVar("T")


class ThreadTransport:
    """A rank whose peers are threads: messages go through queues, one for each pair."""

    def __init__(self, rank: int, queues: dict[tuple[int, int], queue.Queue[torch.Tensor]]) -> None:
        self.rank, self._queues = rank, queues
        self.size = max(pair[0] for pair in queues) + 1
        self.messages: list[tuple[int, int]] = []
        """(peer, bytes) of each message sent point to point."""

    def device(self, device: torch.device) -> torch.device:
        return device

    def send_receive(self, sends: Messages, receives: Messages) -> None:
        for peer, buffer in sends:
            assert buffer.dtype == torch.uint8
            assert buffer.is_contiguous()
            assert buffer.numel()
            self.messages.append((peer, buffer.numel()))
            self._queues[self.rank, peer].put(buffer.clone())
        for peer, buffer in receives:
            found = self._queues[peer, self.rank].get(timeout=PATIENCE)
            assert found.numel() == buffer.numel(), "ranks disagree on what is exchanged"
            buffer.copy_(found)

    def all_to_all(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        for peer, row in enumerate(rows):
            self._queues[self.rank, peer].put(row.clone())
        return [self._queues[peer, self.rank].get(timeout=PATIENCE) for peer in range(self.size)]

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        parts = self.all_to_all([values] * self.size)
        assert len({(part.dtype, part.shape) for part in parts}) == 1, "ranks disagree on what is summed"
        return torch.stack(parts).sum(0)


def run_ranks(size: int, function: Callable[[Transport], T]) -> list[T]:
    """What the function returns on each rank; raises what it raises on the first rank that fails."""
    queues: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {
        (source, target): queue.Queue() for source in range(size) for target in range(size)
    }
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, ThreadTransport(rank, queues)) for rank in range(size)]
        return [future.result() for future in futures]


@dataclass(frozen=True)
class Share:
    """One rank's part of a graph; ids are rows of the whole."""

    graph: NeighborGraph
    local_ids: torch.Tensor
    ghost_ids: torch.Tensor

    def on(self, transport: Transport, exchange: type[Exchange] = Exchange) -> NeighborGraph:
        """The graph with its exchange; collective."""
        plan = plan_from_ids(self.local_ids, self.ghost_ids, transport)
        return self.graph.replace(exchange=exchange(plan, transport))


def split(graph: NeighborGraph, rank_of: Sequence[int], rank: int, spare: Sequence[int] = ()) -> Share:
    """The part of `rank`, which owns the atoms where `rank_of` (n_atoms,) says so, in descending order.

    Neighbours that it does not own, and images, become ghosts. `spare` atoms are ghosts that no edge needs.
    """
    mine = (torch.tensor(rank_of) == rank).nonzero().squeeze(1).flip(0)
    place = torch.full((graph.n_atoms,), -1).index_put((mine,), torch.arange(len(mine)))
    keep = place[graph.edge_center] >= 0
    keep = keep.nonzero().squeeze(1)
    keep = keep[place[graph.edge_center[keep]].argsort(stable=True)]
    center, shift, atom = place[graph.edge_center[keep]], graph.edge_shift[keep].long(), graph.edge_neighbor[keep]
    away = shift.any(1) | (place[atom] < 0)
    extra = torch.tensor([[atom, 1, 0, 0] for atom in spare], dtype=torch.int64).reshape(-1, 4)
    images = torch.cat([torch.cat([atom[:, None], shift], 1)[away], extra])
    ghosts, which = torch.unique(images, dim=0, return_inverse=True)
    neighbor = place[atom]
    neighbor[away] = len(mine) + which[: int(away.sum())]
    source = torch.cat([mine, ghosts[:, 0]])
    offset = torch.einsum("gi,gij->gj", ghosts[:, 1:].to(graph.positions), graph.cell[graph.system[ghosts[:, 0]]])
    part = NeighborGraph(
        positions=graph.positions[source] + torch.cat([offset.new_zeros(len(mine), 3), offset]),
        atom_types=graph.atom_types[source],
        system=graph.system[source],
        cell=graph.cell,
        edge_center=center,
        edge_neighbor=neighbor,
        edge_shift=torch.zeros_like(graph.edge_shift[keep]),
        edge_mask=graph.edge_mask[keep],
        ptr=pointer(center, len(mine)),
    )
    return Share(part, mine, ghosts[:, 0].contiguous())


def evaluate_share(potential: Potential, share: Share, transport: Transport) -> dict[str, torch.Tensor]:
    """What a rank contributes to the results of the whole graph: sum over ranks for those; collective."""
    graph = share.on(transport)
    out = potential(graph, atomic_virial=True)
    per_atom = {name: sum_to_owners(out[name], graph) for name in ("forces", "atomic_virial")}
    return {**out, **per_atom}


def evaluate_spread(
    potential: Potential | Sequence[Potential], graph: NeighborGraph, rank_of: Sequence[int]
) -> dict[str, torch.Tensor]:
    """What the potential returns for the graph, evaluated on max(rank_of) + 1 ranks in threads.

    A compiled file runs one call at a time, so each rank needs one of its own.
    """
    size = max(rank_of) + 1
    shares = [split(graph, rank_of, rank) for rank in range(size)]
    own = list(potential) if isinstance(potential, Sequence) else [potential] * size
    parts = run_ranks(size, lambda transport: evaluate_share(own[transport.rank], shares[transport.rank], transport))
    out = {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in ("energy", "virial")}
    for name in ("atomic_energy", "forces", "atomic_virial"):
        rows = torch.zeros(graph.n_atoms, *parts[0][name].shape[1:], dtype=torch.float64)
        for share, part in zip(shares, parts, strict=True):
            rows[share.local_ids] = part[name]
        out[name] = rows
    return out
