"""One graph spread over ranks in threads of one process: what a decomposed engine hands to a potential."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from carryall.engines.check_parallel import Share
from carryall.engines.check_parallel import split_graph as split
from carryall.engines.rank_part import evaluate_part
from carryall.exchange import Transport
from carryall.exchange.threads import ThreadTransport as ThreadTransport
from carryall.exchange.threads import run_ranks as run_ranks
from carryall.graph import NeighborGraph, Potential


def evaluate_share(potential: Potential, share: Share, transport: Transport) -> dict[str, torch.Tensor]:
    """What a rank contributes to the results of the whole graph: sum over ranks for those; collective."""
    return evaluate_part(potential, share.on(transport), atomic_virial=True)


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
