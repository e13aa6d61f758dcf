"""The search of nvalchemi-toolkit-ops finds the edges of vesin's, in the same order; skipped where it is not installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import random_structure
from hypothesis import given, settings
from hypothesis import strategies as st

from carryall.data import AtomicData, Batch
from carryall.errors import InputError, MissingDependencyError
from carryall.graph import NeighborGraph, build_graph, graph_from_batch, nvalchemi, validate
from carryall.graph import neighbor_search as search
from structures import CUTOFF, fcc, geometries

needs_package = [
    pytest.mark.peer,
    pytest.mark.skipif(not nvalchemi.is_installed(), reason="pip install 'carryall[gpu]'"),
    # warp compiles its kernels at the first call
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def arguments(items: list[AtomicData], device: str = "cpu") -> tuple[torch.Tensor, ...]:
    batch = Batch.from_data_list(items)
    fields = (batch.positions, batch.atomic_numbers, batch.system, batch.cell, batch.pbc)
    return tuple(value.to(device) for value in fields)


def both(items: list[AtomicData], cutoff: float, device: str, monkeypatch: pytest.MonkeyPatch) -> tuple[NeighborGraph, ...]:
    """vesin's graph and the other one, which on the CPU only a test asks for."""
    expected = build_graph(*arguments(items), cutoff)
    with monkeypatch.context() as patch:
        patch.setattr(search, "_search_each", search.search_on_gpu)
        return expected, build_graph(*arguments(items, device), cutoff).to("cpu")


def assert_same(expected: NeighborGraph, found: NeighborGraph) -> None:
    validate(found)
    for name in ("edge_center", "edge_neighbor", "edge_shift", "edge_mask", "ptr"):
        assert torch.equal(getattr(expected, name), getattr(found, name)), name
        assert getattr(expected, name).dtype == getattr(found, name).dtype


class TestWithThePackage:
    pytestmark = needs_package

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("cutoff", [2.0, CUTOFF, 7.5])
    def test_equals_vesin(self, cutoff: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        items = [AtomicData(xyz, [1] * len(xyz), cell, pbc) for xyz, cell, pbc in geometries().values()]
        expected, found = both(items, cutoff, device, monkeypatch)
        assert expected.n_edges > (0 if cutoff < 3 else 100)
        assert_same(expected, found)

    @pytest.mark.parametrize("device", DEVICES)
    def test_many_neighbours_and_a_shell_on_the_cutoff(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        positions, cell = fcc((5, 5, 5), a=3.0, jitter=0.0)
        dense = AtomicData(positions, [1] * len(positions), cell, True)
        expected, found = both([dense], 6.0, device, monkeypatch)
        assert int((expected.ptr[1:] - expected.ptr[:-1]).min()) > 100
        assert_same(expected, found)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.builds(random_structure, st.integers(0, 2**32 - 1)), min_size=1, max_size=4), st.floats(0.8, 5.0))
    def test_random_systems(self, items: list[AtomicData], cutoff: float) -> None:
        with pytest.MonkeyPatch.context() as patch:
            assert_same(*both(items, cutoff, "cpu", patch))

    @pytest.mark.parametrize("method", ["naive", "cell_list"])
    def test_each_method(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        original = nvalchemi.neighbor_edges
        monkeypatch.setattr(nvalchemi, "neighbor_edges", lambda *args: original(*args, method=method))
        items = [AtomicData(xyz, [1] * len(xyz), cell, pbc) for xyz, cell, pbc in geometries().values()]
        assert_same(*both(items, CUTOFF, "cpu", monkeypatch))

    @pytest.mark.parametrize(
        ("positions", "cell", "message"),
        [
            ([[0.0, 0, 0], [np.nan, 0, 0]], np.eye(3) * 4, "system 1: position of atom 1"),
            ([[0.0, 0, 0], [1, 1, 1], [4, 0, 0]], np.eye(3) * 4, "system 1: atoms 0 and 2 coincide"),
            ([[0.0, 0, 0]], [[1.0, 0, 0], [2, 0, 0], [0, 0, 1]], "system 1: cell has no volume"),
        ],
    )
    def test_bad_geometry_is_named(
        self, positions: list[list[float]], cell: np.ndarray, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good = AtomicData([[0.0, 0, 0], [1, 1, 1]], [1, 1], np.eye(3) * 5.0)
        monkeypatch.setattr(search, "_search_each", search.search_on_gpu)
        xyz, _, _, cells, pbc = arguments([good, good])
        xyz = torch.cat([xyz[:2], torch.tensor(positions, dtype=torch.float64)])
        system = torch.tensor([0, 0] + [1] * len(positions))
        cells = torch.stack([cells[0], torch.as_tensor(np.asarray(cell, dtype=float))])
        with pytest.raises(InputError, match=message):
            build_graph(xyz, torch.zeros(len(xyz), dtype=torch.int64), system, cells, pbc, 3.0)

    def test_no_systems(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(search, "_search_each", search.search_on_gpu)
        empty = Batch.from_data_list([AtomicData([[0.0, 0, 0]], [1])]).index_select([])
        assert graph_from_batch(empty, CUTOFF, ["H"]).n_edges == 0


@pytest.mark.skipif(nvalchemi.is_installed(), reason="it is installed")
def test_what_is_missing_is_named_with_the_command() -> None:
    none = torch.zeros(0, 3, dtype=torch.float64)
    with pytest.raises(MissingDependencyError, match=r"pip install 'carryall\[gpu\]'"):
        nvalchemi.neighbor_edges(none, torch.zeros(0, dtype=torch.int64), none[None], none.bool(), 3.0)
