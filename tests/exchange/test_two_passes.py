"""Embedded atoms in two passes with an exchange between them, as EAM codes do: forces by hand, an oracle of Sutton-Chen's.

    pass 1:  rho_i of every owned atom, then F'(rho_i) to the ghosts (`communicate`)
    pass 2:  f_i = sum_j (phi'_ij + (F'_i + F'_j) rho'_ij) r_ij / |r_ij|,  edges of owned atoms only

carryall's Sutton-Chen needs no exchange inside: an owned atom's energy depends on its own edges, and what its neighbours feel
goes back to their owners with the forces. What both forms send is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from carryall.exchange import Exchange, Transport, communicate, sum_to_owners
from carryall.graph import NeighborGraph, edge_vectors, graph_from_structures, segment_sum
from carryall.models import EagerPotential, SuttonChen
from carryall.models.sutton_chen import METALS
from message_passing import SwitchedOff
from ranks import Share, run_ranks, split
from structures import CUTOFF, structure

SYMBOLS = ("Cu", "Au", "Ni")
START = 0.9 * CUTOFF
SPREADS = {
    "one": [0] * 8,
    "two": [0, 1] * 4,
    "three, uneven": [0, 1, 2, 2, 0, 1, 2, 2],
    "three, first has none": [1, 2, 2, 1, 1, 2, 1, 2],
}


def table(name: str, mean: str) -> torch.Tensor:
    """(3, 3) parameters of pairs, from those of the elements."""
    values = torch.tensor([float(getattr(METALS[symbol], name)) for symbol in SYMBOLS], dtype=torch.float64)
    return (values[:, None] + values) / 2 if mean == "arithmetic" else (values[:, None] * values).sqrt()


def power_and_slope(power: torch.Tensor, a: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(a / r)^power with its smooth end, and its derivative by r, both by hand."""
    u = ((r - START) / (CUTOFF - START)).clamp(0, 1)
    switch = 1 - 10 * u**3 + 15 * u**4 - 6 * u**5
    slope = -30 * (u * (1 - u)) ** 2 / (CUTOFF - START)
    value = (a / r) ** power
    return value * switch, value * (slope - power / r * switch)


def two_passes(graph: NeighborGraph) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_local,) energies and (n_local, 3) whole forces of the owned atoms."""
    vectors = edge_vectors(graph)
    r = vectors.norm(dim=1)
    center, neighbor = graph.edge_center, graph.edge_neighbor
    pair = graph.atom_types[center], graph.atom_types[neighbor]
    a, epsilon = table("a", "geometric")[pair], table("epsilon", "geometric")[pair]
    phi, phi_slope = power_and_slope(table("n", "arithmetic")[pair], a, r)
    density, density_slope = power_and_slope(table("m", "arithmetic")[pair], a, r)

    rho = segment_sum(density, center, graph.n_local)
    own = graph.atom_types[: graph.n_local]
    depth = torch.tensor([METALS[s].epsilon * METALS[s].c for s in SYMBOLS], dtype=torch.float64)[own]
    embedding_slope = communicate(-0.5 * depth / rho.sqrt(), graph)  # (n_local,) -> (n_atoms,)

    both = embedding_slope[center] + embedding_slope[neighbor]
    along = (epsilon * phi_slope + both * density_slope) / r
    forces = segment_sum(along[:, None] * vectors, center, graph.n_local)
    return 0.5 * segment_sum(epsilon * phi, center, graph.n_local) - depth * rho.sqrt(), forces


@dataclass(frozen=True)
class Part:
    """What a rank found, and what it sent for it."""

    share: Share
    energies: torch.Tensor
    forces: torch.Tensor
    messages: list[tuple[int, int]]


def whole() -> NeighborGraph:
    return graph_from_structures([structure("tilted", SYMBOLS)], CUTOFF, SYMBOLS)


def by_hand(rank_of: list[int], exchange: type[Exchange] = Exchange) -> list[Part]:
    def rank(transport: Transport) -> Part:
        share = split(whole(), rank_of, transport.rank)
        graph = share.on(transport, exchange)
        transport.messages.clear()  # type: ignore[attr-defined]
        energies, forces = two_passes(graph)
        return Part(share, energies, forces, list(transport.messages))  # type: ignore[attr-defined]

    return run_ranks(max(rank_of) + 1, rank)


def by_autograd(rank_of: list[int]) -> list[Part]:
    potential = EagerPotential(SuttonChen(SYMBOLS, CUTOFF))

    def rank(transport: Transport) -> Part:
        share = split(whole(), rank_of, transport.rank)
        graph = share.on(transport)
        transport.messages.clear()  # type: ignore[attr-defined]
        out = potential(graph)
        inside = len(transport.messages)  # type: ignore[attr-defined]
        assert inside == 0, "Sutton-Chen exchanges nothing inside"
        forces = sum_to_owners(out["forces"], graph)
        return Part(share, out["atomic_energy"], forces, list(transport.messages))  # type: ignore[attr-defined]

    return run_ranks(max(rank_of) + 1, rank)


def together(parts: list[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    energies, forces = torch.full((8,), torch.nan).double(), torch.full((8, 3), torch.nan).double()
    for part in parts:
        energies[part.share.local_ids], forces[part.share.local_ids] = part.energies, part.forces
    return energies, forces


@pytest.mark.parametrize("spread", SPREADS)
def test_forces_by_hand_are_those_of_autograd(spread: str) -> None:
    out = EagerPotential(SuttonChen(SYMBOLS, CUTOFF))(whole())
    assert float(out["forces"].abs().max()) > 0.1
    for parts in (by_hand(SPREADS[spread]), by_autograd(SPREADS[spread])):
        energies, forces = together(parts)
        assert torch.allclose(energies, out["atomic_energy"], rtol=0, atol=1e-10)
        assert torch.allclose(forces, out["forces"], rtol=0, atol=1e-10)


def test_without_the_exchange_forces_are_wrong() -> None:
    _, forces = together(by_hand(SPREADS["two"], SwitchedOff))
    expected = EagerPotential(SuttonChen(SYMBOLS, CUTOFF))(whole())["forces"]
    assert float((forces - expected).abs().max()) > 1e-2


def test_what_both_forms_send() -> None:
    """As many messages; one number for each atom that is needed elsewhere by hand, three by autograd."""
    for rank_of in (SPREADS["two"], SPREADS["three, uneven"]):
        hand, auto = by_hand(rank_of), by_autograd(rank_of)
        sent = [[sum(size for _, size in part.messages) for part in parts] for parts in (hand, auto)]
        needed = [len(set(part.share.ghost_ids.tolist()) - set(part.share.local_ids.tolist())) for part in hand]
        assert sum(sent[0]) == 8 * sum(needed)
        # rows of forces go back where those of slopes came from
        assert sum(sent[1]) == 24 * sum(needed)
        assert sent[1] == [24 * count for count in needed]
        assert [len(part.messages) for part in hand] == [len(part.messages) for part in auto]
        assert math.prod(needed) > 0
    assert all(not part.messages for part in by_hand(SPREADS["one"]) + by_autograd(SPREADS["one"]))
