"""`check_parallel` finds what goes wrong on ranks, and says it; ranks in threads end when one of them does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carryall.engines.check_parallel import check_parallel, split_graph
from carryall.errors import InputError
from carryall.exchange import Exchange, Transport, communicate, plan_from_ids
from carryall.exchange.threads import run_ranks
from carryall.graph import NeighborGraph, PotentialSpec, edge_vectors, graph_from_structures, segment_sum
from carryall.models import EagerPotential
from message_passing import small_message_passing
from structures import CUTOFF, add_ghosts, small_alloy, structure

SYMBOLS = ("Cu", "Au")


class Model(torch.nn.Module):
    """Messages once, with a place for every mistake."""

    mistake = ""

    def __init__(self, mistake: str = "") -> None:
        super().__init__()
        self.mistake = mistake

    @property
    def spec(self) -> PotentialSpec:
        return PotentialSpec(cutoff=CUTOFF, type_map=SYMBOLS, message_passing=self.mistake != "no message passing")

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        if self.mistake == "positions":
            neighbor = graph.positions[graph.edge_neighbor]
            shift = torch.einsum("ei,ij->ej", graph.edge_shift.double(), graph.cell[0])
            edge_vec = 0.5 * (edge_vec + neighbor + shift - graph.positions[graph.edge_center])
        if self.mistake == "early return" and graph.n_local == 0:
            return (0 * edge_vec.sum()).expand(0)
        r = torch.where(graph.edge_mask, edge_vec.square().sum(1), CUTOFF**2).sqrt()
        near = (1 - (r / CUTOFF).clamp_max(1.0)) ** 4
        h = segment_sum(near, graph.edge_center, graph.n_local, graph.edge_mask)
        if self.mistake == "two orders" and graph.n_local % 2:
            communicate(torch.stack([h, h], 1), graph)
        everyone = h if self.mistake == "no exchange" else communicate(h, graph)
        if self.mistake == "zeros":
            everyone = torch.cat([h, h.new_zeros(graph.n_atoms - graph.n_local)])
        energy = segment_sum(near * everyone[graph.edge_neighbor] ** 2, graph.edge_center, graph.n_local, graph.edge_mask)
        if self.mistake == "ghosts count":
            return energy + everyone.sum() / max(graph.n_local, 1)
        return energy


@pytest.mark.parametrize("name", ["tilted", "one_atom_periodic", "open"])
def test_right_models_pass(name: str) -> None:
    data = structure(name, SYMBOLS)
    for model in (Model(), small_message_passing(), small_alloy()):
        report = check_parallel(EagerPotential(model), data, n_ranks=[1, 3])
        assert report.ok, str(report)
        assert [case.name for case in report.cases] == ["1, all", "3, slabs", "3, at random", "3, first has no atoms"]
        assert report.cases[-1].owned[0] == 0
        assert report.cases[-1].ghosts[0] > 0
        assert str(report).endswith("all equal to the whole structure; tolerance 1e-10")
    calls = check_parallel(EagerPotential(Model()), data, n_ranks=[2]).cases[0].exchanges
    assert calls == ("forward torch.float64 []", "reverse torch.float64 []")


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("no exchange", "index"),
        ("early return", "ranks have to make the same exchanges in the same order"),
        ("two orders", "ranks have to make the same exchanges in the same order"),
        ("no message passing", "derivative only inside a call"),
        ("zeros", "WRONG"),
        ("ghosts count", "WRONG"),
        ("positions", "forces are not the energy's slope"),
    ],
)
def test_mistakes_are_found_and_named(mistake: str, said: str) -> None:
    report = check_parallel(EagerPotential(Model(mistake)), structure("tilted", SYMBOLS), n_ranks=[2, 3])
    assert not report.ok
    assert said in str(report)
    assert str(report).endswith("NOT EQUAL to the whole structure; tolerance 1e-10")


def test_what_is_no_potential_is_refused() -> None:
    data = structure("tilted", SYMBOLS)
    with pytest.raises(InputError, match=r"give carryall\.models\.EagerPotential\(model\)"):
        check_parallel(small_message_passing(), data)  # type: ignore[arg-type]
    potential = EagerPotential(small_message_passing())
    with pytest.raises(InputError, match="2 potentials for 4 ranks: give one for each"):
        check_parallel([potential] * 2, data)
    assert check_parallel([potential] * 2, data, n_ranks=[2]).ok


def test_split_graph_is_the_graph_in_parts() -> None:
    graph = graph_from_structures([structure("tilted", SYMBOLS)], CUTOFF, SYMBOLS)
    aparam = torch.arange(8.0, dtype=torch.float64)[:, None]
    shares = [split_graph(graph.replace(aparam=aparam), [0, 2] * 4, rank) for rank in range(3)]
    assert [len(share.local_ids) for share in shares] == [4, 0, 4]
    assert sum(share.graph.n_edges for share in shares) == graph.n_edges
    found = torch.cat([edge_vectors(share.graph).norm(dim=1) for share in shares]).sort().values
    assert torch.allclose(found, edge_vectors(graph).norm(dim=1).sort().values, rtol=0, atol=1e-12)
    for share in shares:
        ids = torch.cat([share.local_ids, share.ghost_ids])
        assert torch.equal(share.graph.atom_types, graph.atom_types[ids])
        assert torch.equal(share.graph.aparam, aparam[ids])
    # images as ghosts, of one rank, are what add_ghosts makes
    assert split_graph(graph, [0] * 8, 0).graph.n_atoms == add_ghosts(graph).n_atoms


# -- ranks in threads


def test_a_rank_that_fails_is_the_one_that_is_told() -> None:
    def rank(transport: Transport) -> None:
        if transport.rank == 2:
            raise ValueError("two is broken")
        transport.all_reduce(torch.ones(1))

    with pytest.raises(ValueError, match="two is broken"):
        run_ranks(3, rank)

    def told(transport: Transport) -> str:
        if transport.rank == 2:
            raise_on = ValueError("two is broken")
            raise raise_on
        with pytest.raises(InputError) as caught:
            transport.all_reduce(torch.ones(1))
        messages.append(str(caught.value))
        return ""

    messages: list[str] = []
    with pytest.raises(ValueError, match="two is broken"):
        run_ranks(3, told)
    assert any("which has failed (ValueError: two is broken)" in message for message in messages)


def test_ranks_that_wait_for_each_other_are_told() -> None:
    ids = [torch.tensor([0, 1]), torch.tensor([2, 3])]

    def rank(transport: Transport) -> None:
        plan = plan_from_ids(ids[transport.rank], ids[1 - transport.rank], transport)
        exchange = Exchange(plan, transport)
        buffers = [(1 - transport.rank, torch.zeros(8, dtype=torch.uint8))]
        transport.send_receive([], buffers)
        exchange.forward(torch.zeros(2, 1))

    with pytest.raises(InputError, match="and so do all others"):
        run_ranks(2, rank)


def test_ranks_that_exchange_different_things_are_told() -> None:
    ids = [torch.tensor([0, 1]), torch.tensor([2, 3])]

    def rank(transport: Transport) -> None:
        exchange = Exchange(plan_from_ids(ids[transport.rank], ids[1 - transport.rank], transport), transport)
        exchange.forward(torch.zeros(2, 1 + transport.rank))

    with pytest.raises(InputError, match=r"rank \d sent \d+ bytes, rank \d expects \d+"):
        run_ranks(2, rank)
    with pytest.raises(InputError, match=r"disagree on what is summed, rank by rank: torch.float32 \[1\], torch.float32 \[2\]"):
        run_ranks(2, lambda transport: transport.all_reduce(torch.zeros(1 + transport.rank)))
