"""Blocks of centres give what one call gives."""

import pytest
import torch

from carryall.graph.blocks import center_block, evaluate_in_blocks
from carryall.graph.neighbor_graph import concatenate, edge_vectors, validate
from carryall.graph.neighbor_search import build_graph
from carryall.models import evaluate_model
from carryall.models.sutton_chen import SuttonChen

MODEL = SuttonChen(("Cu", "Au"), cutoff=5.0)


def box(n_atoms, length, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(*[torch.arange(3, dtype=torch.float64)] * 3)[:n_atoms] * length / 3
    positions = grid + 0.2 * torch.rand(grid.shape, generator=generator, dtype=torch.float64)
    types = torch.randint(2, (n_atoms,), generator=generator)
    cell = torch.eye(3, dtype=torch.float64)[None] * length
    return build_graph(positions, types, torch.zeros(n_atoms, dtype=torch.int64), cell, torch.tensor([[True] * 3]), 5.0)


def call(graph):
    return evaluate_model(MODEL, graph, atomic_virial=True)


@pytest.mark.parametrize("block_size", [1, 4, 26, 27, 1000, None])
def test_blocks_equal_one_call(block_size):
    graph = concatenate([box(27, 7.8, 0), box(1, 30.0, 1), box(20, 9.0, 2)])
    whole, parts = call(graph), evaluate_in_blocks(call, graph, block_size)
    assert set(parts) == set(whole)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-11)


def test_a_block_is_a_valid_graph_with_the_same_edges():
    graph = box(27, 7.8, 3)
    part, atoms = center_block(graph, 5, 14)
    validate(part)
    assert part.n_local == 9
    begin, end = int(graph.ptr[5]), int(graph.ptr[14])
    assert torch.equal(edge_vectors(part), edge_vectors(graph)[begin:end])
    assert torch.equal(atoms[part.edge_neighbor], graph.edge_neighbor[begin:end])


def test_never_more_centres_than_asked_for():
    seen = []

    def spy(graph):
        seen.append(graph.n_local)
        return call(graph)

    evaluate_in_blocks(spy, box(27, 7.8, 4), 10)
    assert sum(seen) == 27
    assert max(seen) <= 10
