"""DPA-1 in all its forms over random graphs: blocked, in blocks of any size, on the pair axis, and padded slot by slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dpa1_forms import flat_energy, padded_energy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carryall.graph import NeighborGraph, edge_vectors, pointer
from carryall.graph.blocks import evaluate_in_blocks
from carryall.graph.neighbor_graph import select_edges
from carryall.models import DPA1, FittingConfig, evaluate_model
from carryall.models.derivatives import energy_and_gradient
from structures import CUTOFF, small_dpa1

TYPES = ("O", "H")
VARIANTS: dict[str, dict[str, Any]] = {
    "smooth": {},
    "not smooth": {"smooth_type_embedding": False},
    "no attention": {"attn_layer": 0},
    "strip": {"tebd_input_mode": "strip", "attn_layer": 1},
    "excluded types": {"exclude_types": ((0, 1),)},
}


def model_of(name: str, method: str = "graph") -> DPA1:
    base = small_dpa1()
    config = base.descriptor.config.model_copy(update={"sel": (9,), **VARIANTS[name]})
    model = DPA1(TYPES, config, FittingConfig(neuron=(6, 6)), seed=9, neighbor_graph_method=method)  # type: ignore[arg-type]
    with torch.no_grad():
        model.descriptor.davg[:, 0] = 0.02
        model.descriptor.dstd.copy_(base.descriptor.dstd)
        for layer in model.descriptor.attention:
            layer.norm.b.copy_(torch.linspace(-0.2, 0.3, len(layer.norm.b)))
    return model.eval()


def graph_of(degrees: list[int], seed: int, keep: float, duplicates: bool) -> NeighborGraph:
    """Edges to ghosts anywhere inside the cutoff and a little beyond; masked ones, and the same ones twice."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    n_local, n_edges = len(degrees), sum(degrees)
    center = torch.repeat_interleave(torch.arange(n_local), torch.tensor(degrees, dtype=torch.int64))
    direction = torch.nn.functional.normalize(uniform(n_edges, 3) - 0.5, dim=1)
    places = uniform(n_local, 3) * 3
    ghosts = places[center] + direction * (0.9 + (CUTOFF - 0.8) * uniform(n_edges, 1))
    neighbor = n_local + torch.arange(n_edges)
    if duplicates:
        neighbor[1:] = torch.where((uniform(n_edges - 1) < 0.3) & (center[1:] == center[:-1]), neighbor[:-1], neighbor[1:])
    return NeighborGraph(
        positions=torch.cat([places, ghosts]),
        atom_types=torch.randint(2, (n_local + n_edges,), generator=generator),
        system=torch.zeros(n_local + n_edges, dtype=torch.int64),
        cell=torch.zeros(1, 3, 3, dtype=torch.float64),
        edge_center=center,
        edge_neighbor=neighbor,
        edge_shift=torch.zeros(n_edges, 3, dtype=torch.int32),
        edge_mask=uniform(n_edges) < keep,
        ptr=pointer(center, n_local),
    )


def assert_same(model: DPA1, graph: NeighborGraph, reference: Any, limit: int) -> None:
    vectors = edge_vectors(graph)
    energy, gradient, _ = energy_and_gradient(model, graph, vectors)
    leaf = vectors.clone().requires_grad_()
    expected = reference(model, graph, leaf)
    (slope,) = torch.autograd.grad([expected.sum()], [leaf], allow_unused=True, materialize_grads=True)
    scale = max(1.0, float(slope.abs().max()) if slope.numel() else 0.0)
    torch.testing.assert_close(energy, expected.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=1e-11 * scale)
    if model.spec.block_edges is None:
        return  # an atom outside the block counts
    whole = evaluate_model(model, graph, atomic_virial=True)
    blocks = evaluate_in_blocks(
        lambda part: energy_and_gradient(model, part, edge_vectors(part)), graph, limit, atomic_virial=True
    )
    for key, value in whole.items():
        torch.testing.assert_close(blocks[key], value, rtol=0, atol=1e-11 * scale)


DEGREES = st.lists(st.one_of(st.just(0), st.just(1), st.integers(0, 14)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    DEGREES,
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.7, 1.0]),
    st.booleans(),
    st.integers(1, 40),
    st.sampled_from(list(VARIANTS)),
)
def test_blocked_equals_the_pair_axis(degrees: list[int], seed: int, keep: float, twice: bool, limit: int, name: str) -> None:
    graph = graph_of(degrees, seed, keep, twice and sum(degrees) > 1)
    model = model_of(name)
    if model.descriptor.config.exclude_types:
        like = graph.atom_types[graph.edge_center] == graph.atom_types[graph.edge_neighbor]

        def without(model: DPA1, graph: NeighborGraph, vectors: Tensor) -> Tensor:
            return flat_energy(model, graph.replace(edge_mask=graph.edge_mask & like), vectors)

        assert_same(model, graph, without, limit)
        return
    assert_same(model, graph, flat_energy, limit)


@settings(max_examples=25, deadline=None)
@given(
    DEGREES,
    st.integers(0, 2**31),
    st.sampled_from([0.7, 1.0]),
    st.integers(1, 40),
    st.sampled_from(["smooth", "not smooth", "strip"]),
)
def test_legacy_equals_padding(degrees: list[int], seed: int, keep: float, limit: int, name: str) -> None:
    assert_same(model_of(name, "legacy"), graph_of(degrees, seed, keep, False), padded_energy, limit)


@pytest.mark.parametrize("name", ["smooth", "not smooth", "no attention"])
def test_degree_500_beside_0_and_1(name: str) -> None:
    graph = graph_of([0, 500, 1, 3], 1, 0.95, True)
    assert_same(model_of(name), graph, flat_energy, 64)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_masked_edge_is_no_edge(name: str) -> None:
    graph = graph_of([4, 0, 9, 2], 3, 0.6, False)
    model, dropped = model_of(name), select_edges(graph, graph.edge_mask)
    a, b = evaluate_model(model, graph), evaluate_model(model, dropped)
    for key in b:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["smooth", "not smooth", "no attention"])
def test_two_runs_are_equal_bit_by_bit(name: str) -> None:
    graph, model = graph_of([30, 0, 41, 7, 25, 33], 5, 0.9, True), model_of(name)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        runs = [
            evaluate_in_blocks(lambda part: energy_and_gradient(model, part, edge_vectors(part)), graph, 80) for _ in range(5)
        ]
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(run[key], runs[0][key]) for key in run)
