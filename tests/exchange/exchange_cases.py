"""Whole systems and how they are spread over ranks, for every transport alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carryall.data import AtomicData
from carryall.exchange import Exchange, Transport, plan_from_ids, sum_to_owners
from carryall.exchange.context import open_exchange
from carryall.graph import NeighborGraph, Potential, graph_from_structures
from carryall.models import EagerPotential
from carryall.models.derivatives import evaluate_model
from message_passing import Recorded, SwitchedOff, Tangled, small_message_passing
from ranks import Share, evaluate_share, split
from structures import CUTOFF, structure

MODELS = {"example": small_message_passing, "tangled": Tangled}
PERIODIC = ("tilted", "slab", "one_atom_periodic", "tiny_triclinic")
"""Boxes smaller than two cutoffs; in the last two an atom sees its own images; all but the slab are triclinic."""


@dataclass(frozen=True)
class Case:
    """A structure, the rank of each of its atoms, and for each rank atoms that are its ghosts though no edge needs them."""

    name: str
    structure: str
    rank_of: tuple[int, ...]
    size: int
    spare: tuple[tuple[int, ...], ...] = ()

    def share(self, rank: int) -> Share:
        """The part of a rank."""
        return split(graph_of(self.structure), self.rank_of, rank, self.spare[rank] if self.spare else ())


def graph_of(name: str) -> NeighborGraph:
    """The whole, periodic without ghosts, of copper and gold in turn."""
    there = two_clusters() if name == "two_clusters" else structure(name, ("Cu", "Au"))
    return graph_from_structures([there], CUTOFF, ("Cu", "Au"))


def two_clusters() -> AtomicData:
    """Five atoms and, far away, four."""
    cluster = structure("open", ("Cu",)).positions.numpy()
    positions = np.concatenate([cluster[:5], cluster[:4] + np.array([0.0, 0.0, 40.0])])
    return AtomicData(positions, [29, 79, 29, 79, 79, 29, 29, 79, 29])


def cases() -> list[Case]:
    """Every periodic structure on one to four ranks, and ranks that have no atoms, only ghosts, or no ghosts."""
    out = []
    for name in PERIODIC:
        n_atoms = graph_of(name).n_atoms
        out += [Case(f"{name} on {p}", name, tuple(i % p for i in range(n_atoms)), p) for p in (1, 2, 3, 4)]
    out += [
        Case("first has none", "tilted", (1,) * 8, 2),
        Case("two in the middle have none", "tilted", (0, 3) * 4, 4),
        Case("only ghosts", "open", (0, 0, 2, 2, 0, 2, 0), 3, ((0, 3, 5), (2, 2, 4), (1,))),
        Case("no ghosts", "two_clusters", (0, 1, 1, 0, 1, 2, 2, 2, 2), 3),
        Case("no ghosts, nothing", "two_clusters", (1, 1, 1, 0, 0, 2, 2, 2, 2), 4),
    ]
    return out


def kinds(case: Case) -> list[str]:
    """What each rank has."""
    graphs = [case.share(rank).graph for rank in range(case.size)]
    names = {(True, True): "both", (True, False): "local", (False, True): "ghosts", (False, False): "nothing"}
    return [names[bool(graph.n_local), graph.n_atoms > graph.n_local] for graph in graphs]


def evaluate_case(case: Case, potential: Potential, transport: Transport) -> dict[str, Any]:
    """What this rank finds: its part of the results, the exchanges that it made, and the energy with these switched off."""
    share = case.share(transport.rank)
    out = evaluate_share(potential, share, transport)
    here = share.on(transport, Recorded)
    potential(here)
    off = potential(share.on(transport, SwitchedOff))["energy"]
    found = {name: value.numpy() for name, value in out.items()}
    return {"ids": share.local_ids.numpy(), "out": found, "calls": here.exchange.calls, "off": float(off)}


def whole(case: Case, parts: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The results of all ranks put together."""
    out = {}
    for name in parts[0]["out"]:
        values = [torch.as_tensor(part["out"][name]) for part in parts]
        if name in ("energy", "virial"):
            out[name] = torch.stack(values).sum(0)
            continue
        out[name] = torch.full((len(case.rank_of), *values[0].shape[1:]), torch.nan, dtype=torch.float64)
        for part, rows in zip(parts, values, strict=True):
            out[name][torch.as_tensor(part["ids"])] = rows
    return out


def expected(case: Case, model: str) -> dict[str, Tensor]:
    """The same from plain periodic torch on one process, which exchanges nothing."""
    return EagerPotential(MODELS[model]())(graph_of(case.structure), atomic_virial=True)


def parameter_gradients(graph: NeighborGraph) -> list[Tensor]:
    """Of a loss of forces and energies of the example, this rank's part; differentiates through exchanges twice."""
    model: nn.Module = small_message_passing()
    graph = graph if graph.exchange is None else open_exchange(graph)
    out = evaluate_model(model, graph, create_graph=True)  # type: ignore[arg-type]
    loss = sum_to_owners(out["forces"], graph).square().sum() + out["atomic_energy"].square().sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


DTYPES = (torch.float64, torch.float32, torch.int64, torch.int32, torch.int8, torch.bool)
SHAPES: tuple[tuple[int, ...], ...] = ((), (3,), (2, 0), (2, 1, 3))
ATOMS = 40


def spread_ids(size: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Ids of owned atoms and of ghosts of every rank, at random; from the second seed on one rank misses something.

    Ghosts are of any rank, one's own too, and some of them the same atom.
    """
    rng = np.random.default_rng(seed)
    names, poor = torch.from_numpy(rng.choice(1000, ATOMS, replace=False)), seed % size
    owner = rng.integers(0, size, ATOMS)
    if seed in (1, 2):  # no atoms
        owner[owner == poor] = (poor + 1) % size
    local = [names[owner == rank] for rank in range(size)]
    ghosts = [names[rng.integers(0, ATOMS, 25)] for _ in range(size)]
    if seed in (2, 3):  # no ghosts
        ghosts[poor] = ghosts[poor][:0]
    return local, ghosts


def rows_of(ids: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A row for each id, small whole numbers, which every dtype holds."""
    width = int(np.prod(shape, dtype=int))
    return ((ids[:, None] * torch.arange(1, width + 1)) % 7).to(dtype).reshape(len(ids), *shape)


def check_rows(transport: Transport, seed: int) -> None:
    """Rows of every dtype and shape go where they belong, and their adjoint back."""
    local, ghosts = spread_ids(transport.size, seed)
    mine, foreign = local[transport.rank], ghosts[transport.rank]
    exchange = Exchange(plan_from_ids(mine, foreign, transport), transport)
    for dtype in DTYPES:
        for shape in SHAPES:
            found = exchange.forward(rows_of(mine, dtype, shape))
            assert torch.equal(found, rows_of(foreign, dtype, shape)), (dtype, shape)
            assert found.dtype == dtype
            if dtype == torch.bool:
                continue
            back = exchange.reverse(rows_of(foreign, dtype, shape))
            counts = torch.bincount(torch.cat(ghosts), minlength=1000)[mine]
            assert torch.equal(back, (rows_of(mine, torch.int64, shape) * counts.reshape(-1, *[1] * len(shape))).to(dtype))
            assert back.dtype == dtype


def check_sums(transport: Transport) -> list[bytes]:
    """Sums of every dtype are right; the bits of those that rounding could make differ between ranks."""
    kinds = (*DTYPES[:-1], torch.uint8, torch.float16, torch.bfloat16)
    for dtype in kinds:
        for shape in ((), (0,), (2, 3)):
            values = torch.full(shape, transport.rank + 1, dtype=dtype)
            total = transport.all_reduce(values)
            assert torch.equal(total, torch.full(shape, sum(range(1, transport.size + 1)), dtype=dtype)), (dtype, shape)
            assert total.dtype == dtype
            assert (values == transport.rank + 1).all()
    found = []
    for dtype in (torch.float64, torch.float32):
        parts = [
            torch.randn(1001, generator=torch.Generator().manual_seed(rank), dtype=dtype) for rank in range(transport.size)
        ]
        total = transport.all_reduce(parts[transport.rank])
        assert torch.allclose(total, torch.stack(parts).sum(0), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)
        found.append(total.numpy().tobytes())
    return found


def check_vectors(transport: Transport) -> None:
    """int64 vectors of every length, none too, from each to each."""
    rank, size = transport.rank, transport.size
    found = transport.all_to_all([torch.arange(rank + peer) * 10 + rank for peer in range(size)])
    assert [row.tolist() for row in found] == [(torch.arange(rank + peer) * 10 + peer).tolist() for peer in range(size)]


def check_large(transport: Transport, megabytes: int) -> None:
    """Each rank sends so much to the next, in one message, and gets as much."""
    size, rank = transport.size, transport.rank
    plan = plan_from_ids(torch.tensor([rank]), torch.tensor([(rank + 1) % size]), transport)
    rows = torch.arange(megabytes << 17, dtype=torch.float64)[None] + rank
    found = Exchange(plan, transport).forward(rows)
    assert torch.equal(found - rows, torch.full_like(rows, (rank + 1) % size - rank))
