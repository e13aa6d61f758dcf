"""Blocks of centres give what one call gives, whatever the degrees, the block's size and the number of systems."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import carryall.graph.blocks as blocks
from carryall.graph.blocks import by_degree, chunks, cuts, evaluate_in_blocks, star_graphs
from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors, pointer, validate
from carryall.graph.potential import PotentialSpec
from carryall.graph.segments import segment_sum
from carryall.models import LennardJones
from carryall.models.derivatives import energy_and_gradient, evaluate_model

MODEL = LennardJones(("Cu", "Au"), (0.1, 0.2), (2.0, 2.3), cutoff=5.0)


def random_graph(
    degrees: list[int], seed: int = 0, *, n_systems: int = 1, n_ghosts: int = 0, masked: bool = False
) -> NeighborGraph:
    """Any edges at all: a graph need not come from a structure. Systems are contiguous; edges stay inside their system."""
    generator = torch.Generator().manual_seed(seed)
    n_local = len(degrees)
    system = torch.arange(n_local) * n_systems // max(n_local, 1)
    ghost_system = torch.randint(0, n_systems, (n_ghosts,), generator=generator) if n_local else torch.zeros(n_ghosts).long()
    system = torch.cat([system, ghost_system])
    center = torch.repeat_interleave(torch.arange(n_local), torch.tensor(degrees, dtype=torch.int64))
    members = [(system == k).nonzero()[:, 0] for k in range(n_systems)]
    neighbor = torch.tensor(
        [int(members[s][int(torch.randint(len(members[s]), (1,), generator=generator))]) for s in system[center].tolist()],
        dtype=torch.int64,
    )
    shift = torch.randint(1, 3, (len(center), 3), generator=generator).int()
    return NeighborGraph(
        positions=torch.rand(n_local + n_ghosts, 3, generator=generator, dtype=torch.float64),
        atom_types=torch.randint(2, (n_local + n_ghosts,), generator=generator),
        system=system,
        cell=1.5 * torch.eye(3, dtype=torch.float64)
        + 0.1 * torch.rand(n_systems, 3, 3, generator=generator, dtype=torch.float64),
        edge_center=center,
        edge_neighbor=neighbor,
        edge_shift=shift,
        edge_mask=torch.rand(len(center), generator=generator) < (0.7 if masked else 1.1),
        ptr=pointer(center, n_local),
    )


def call(part: NeighborGraph) -> tuple[Tensor, Tensor, Tensor | None]:
    return energy_and_gradient(MODEL, part, edge_vectors(part))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 12), max_size=20),
    st.integers(1, 60),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([True, "half"]),
)
def test_blocks_equal_one_call(
    degrees: list[int], limit: int, n_systems: int, n_ghosts: int, masked: bool, atomic_virial: bool
) -> None:
    graph = random_graph(degrees, n_systems=min(n_systems, max(len(degrees), 1)), n_ghosts=n_ghosts, masked=masked)
    whole = evaluate_model(MODEL, graph, atomic_virial=atomic_virial)
    parts = evaluate_in_blocks(call, graph, limit, atomic_virial=atomic_virial)
    assert set(parts) == set(whole)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


def test_many_chunks_equal_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK", 3)
    monkeypatch.setattr(blocks, "CHUNKS", 5)
    assert list(chunks(11)) == [(0, 3), (3, 6), (6, 9), (9, 11)]
    assert list(chunks(40))[-1] == (32, 40)
    graph = random_graph([5, 0, 2, 9, 1, 1, 0, 7, 3, 3, 4], n_systems=3, n_ghosts=2)
    whole, parts = evaluate_model(MODEL, graph, atomic_virial=True), evaluate_in_blocks(call, graph, 8, atomic_virial=True)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


def test_a_center_of_500_edges_beside_empty_ones() -> None:
    graph = random_graph([0, 500, 1, 0, 3])
    whole, parts = evaluate_model(MODEL, graph), evaluate_in_blocks(call, graph, 64)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=20), st.integers(1, 60))
def test_star_graphs_are_valid_small_and_hold_each_edge_once(degrees: list[int], limit: int) -> None:
    graph = random_graph(degrees)
    part, order = by_degree(graph, 0, graph.n_local)
    vectors = edge_vectors(part)
    seen: list[int] = []
    centers = 0
    for star, edges in star_graphs(part, order, vectors, limit):
        validate(star)
        assert star.rank is not None
        largest = max(star.ptr.diff().tolist(), default=0)
        assert star.rank.tolist() == list(range(largest))
        assert star.n_local <= 1 or star.n_local * largest <= limit
        assert torch.equal(edge_vectors(star), vectors[edges])
        seen += range(edges.start, edges.stop)
        centers += star.n_local
    assert seen == list(range(graph.n_edges))
    assert centers == graph.n_local


def test_centers_of_one_block_have_like_degrees() -> None:
    assert cuts([0, 0, 0, 1, 2, 12, 24], 12) == [(0, 4), (4, 5), (5, 6)]
    assert cuts([0], 12) == [(0, 0)]
    assert cuts([0, 99], 12) == [(0, 1)]


def test_each_system_keeps_its_own_parameters() -> None:
    graph = random_graph([2, 3, 1, 2], n_systems=4).replace(
        fparam=torch.arange(4.0, dtype=torch.float64)[:, None], aparam=torch.arange(4.0, dtype=torch.float64)[:, None]
    )
    part, order = by_degree(graph, 1, 4)
    for star, _ in star_graphs(part, order, edge_vectors(part), 3):
        assert star.fparam is not None
        assert star.aparam is not None
        of_centers = star.fparam[star.system[: star.n_local], 0]
        assert torch.equal(of_centers, star.aparam[: star.n_local, 0])  # system k holds atom k


class SpinPairs(nn.Module):
    """E_i = |s_i|^2 + sum over edges of (s_i . r)(s_j . r): what a spin model is to blocks."""

    spec = PotentialSpec(5.0, ("Cu", "Au"), spin=True)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        assert graph.spin is not None
        own, other = graph.spin[graph.edge_center], graph.spin[graph.edge_neighbor]
        terms = (own * edge_vec).sum(1) * (other * edge_vec).sum(1) * graph.edge_mask
        local = torch.arange(graph.n_local)
        return segment_sum(terms, graph.edge_center, graph.n_local) + graph.spin[local].square().sum(1)


def spin_call(part: NeighborGraph) -> tuple[Tensor, Tensor, Tensor | None]:
    return energy_and_gradient(SpinPairs(), part, edge_vectors(part))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=14), st.integers(1, 40), st.integers(0, 3), st.integers(1, 3))
def test_spin_gradients_of_blocks_equal_one_call(degrees: list[int], limit: int, n_ghosts: int, n_systems: int) -> None:
    graph = random_graph(degrees, n_systems=min(n_systems, max(len(degrees), 1)), n_ghosts=n_ghosts, masked=True)
    graph = graph.replace(spin=torch.randn(graph.n_atoms, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    whole, parts = evaluate_model(SpinPairs(), graph), evaluate_in_blocks(spin_call, graph, limit)
    assert set(parts) == set(whole)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)
    assert graph.spin is not None
    alone = torch.tensor([0] * n_ghosts + [1], dtype=torch.float64)  # atoms without edges feel themselves, ghosts nothing
    if graph.n_edges == 0 and graph.n_local:
        expected = -2 * graph.spin[: graph.n_local] * alone[-1]
        torch.testing.assert_close(parts["magnetic_forces"][: graph.n_local], expected)
        assert not parts["magnetic_forces"][graph.n_local :].any()


def test_spin_gradients_of_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK", 3)
    monkeypatch.setattr(blocks, "CHUNKS", 5)
    graph = random_graph([5, 0, 2, 9, 1, 1, 0, 7, 3, 3, 4], n_systems=3, n_ghosts=2)
    graph = graph.replace(spin=torch.randn(graph.n_atoms, 3, dtype=torch.float64))
    whole, parts = evaluate_model(SpinPairs(), graph), evaluate_in_blocks(spin_call, graph, 8)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


def test_each_system_keeps_its_own_spins_and_state() -> None:
    numbers = torch.arange(4.0, dtype=torch.float64)[:, None]
    graph = random_graph([2, 3, 1, 2], n_systems=4).replace(charge_spin=numbers.expand(4, 2), spin=numbers.expand(4, 3))
    part, order = by_degree(graph, 1, 4)
    for star, _ in star_graphs(part, order, edge_vectors(part), 3):
        assert star.charge_spin is not None
        assert star.spin is not None
        assert star.spin.shape == (star.n_atoms, 3)
        assert torch.equal(star.charge_spin[star.system, 0], star.spin[:, 0])  # system k holds atom k
