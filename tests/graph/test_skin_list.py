"""The list that lives for many steps always equals a fresh search."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carryall.data import AtomicData, Batch
from carryall.errors import InputError
from carryall.graph import SkinNeighborList, edge_vectors, graph_from_batch, validate
from structures import CUTOFF, edge_set, fcc, structure

TYPES = ["O", "H"]


def batch_of(*names: str) -> Batch:
    return Batch.from_data_list([structure(name, TYPES) for name in names])


def assert_fresh(skin: SkinNeighborList, batch: Batch) -> None:
    kept, fresh = skin.graph(batch), graph_from_batch(batch, CUTOFF, TYPES)
    assert edge_set(kept) == edge_set(fresh)
    validate(kept)
    assert torch.equal(kept.positions, batch.positions)
    assert torch.equal(kept.cell, batch.cell)
    assert torch.allclose(edge_vectors(kept), edge_vectors(fresh), rtol=0, atol=1e-12)


def moved(batch: Batch, displacement: torch.Tensor) -> Batch:
    new = batch.clone()
    new.positions = batch.positions + displacement
    return new


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 0.2), st.floats(0.0, 0.03))
def test_equals_a_fresh_search_on_any_road(seed: int, step: float, strain: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch = batch_of("periodic", "slab", "tilted")
    skin = SkinNeighborList(CUTOFF, TYPES, skin=0.7)
    for _ in range(6):
        assert_fresh(skin, batch)
        deformation = torch.eye(3, dtype=torch.float64) + strain * random(3, 3, 3)
        batch = moved(batch, step * random(batch.n_atoms, 3))
        batch.cell = torch.einsum("sij,sjk->sik", batch.cell, deformation)
        if float(random(1)) > 0:
            batch.positions = torch.einsum("ni,nij->nj", batch.positions, deformation[batch.system])


def test_small_moves_and_small_strains_reuse_the_list() -> None:
    batch = batch_of("periodic", "open")
    skin = SkinNeighborList(CUTOFF, TYPES, skin=0.5)
    skin.graph(batch)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.nn.functional.normalize(
            torch.randn(batch.n_atoms, 3, generator=generator, dtype=torch.float64), dim=1
        )
        assert_fresh(skin, moved(batch, 0.24 * direction))
    assert skin.n_searches == 2
    assert_fresh(skin, moved(batch, torch.full((batch.n_atoms, 3), 0.5)))  # together, but the list does not know
    assert skin.n_searches == 4


def test_two_atoms_that_approach_each_other_use_the_skin_twice() -> None:
    apart = AtomicData([[0, 0, 0], [CUTOFF + 0.55, 0, 0]], [8, 1])
    batch = Batch.from_data_list([apart])
    skin = SkinNeighborList(CUTOFF, TYPES, skin=0.5)
    assert skin.graph(batch).n_edges == 0
    closer = moved(batch, torch.tensor([[0.3, 0.0, 0.0], [-0.3, 0.0, 0.0]], dtype=torch.float64))
    assert_fresh(skin, closer)
    assert skin.graph(closer).n_edges == 2


def test_a_strained_crystal_reuses_the_list_while_the_strain_is_small() -> None:
    batch = batch_of("periodic")
    skin = SkinNeighborList(CUTOFF, TYPES, skin=0.5)
    skin.graph(batch)
    for strain, searches in ((0.02, 1), (0.05, 1), (0.2, 2)):
        strained = batch.clone()
        strained.cell, strained.positions = batch.cell * (1 - strain), batch.positions * (1 - strain)
        assert_fresh(skin, strained)
        assert skin.n_searches == searches


def wrap(batch: Batch) -> Batch:
    fractional = torch.linalg.solve(batch.cell[0].T, batch.positions.T).T + 0.37
    return moved(batch, (fractional - fractional.floor()) @ batch.cell[0] - batch.positions)


def swap_elements(batch: Batch) -> Batch:
    new = batch.clone()
    new.atomic_numbers = batch.atomic_numbers.flip(0)
    return new


def open_an_axis(batch: Batch) -> Batch:
    new = batch.clone()
    new.pbc = torch.tensor([[True, True, False]])
    return new


def one_atom_less(batch: Batch) -> Batch:
    data = batch.get_data(0)
    return Batch.from_data_list([AtomicData(data.positions[:-1], data.atomic_numbers[:-1], data.cell, data.pbc)])


def two_copies(batch: Batch) -> Batch:
    return Batch.from_data_list([batch.get_data(0)] * 2)


@pytest.mark.parametrize("change", [wrap, swap_elements, open_an_axis, one_atom_less, two_copies])
def test_what_must_be_searched_again_is(change: Callable[[Batch], Batch]) -> None:
    batch = batch_of("tilted")
    skin = SkinNeighborList(CUTOFF, TYPES, skin=0.5)
    skin.graph(batch)
    changed = change(batch)
    assert_fresh(skin, changed)
    assert skin.n_searches == 2
    assert torch.equal(skin.graph(changed).atom_types, graph_from_batch(changed, CUTOFF, TYPES).atom_types)


def test_systems_of_the_same_sizes_with_atoms_shifted_between_them() -> None:
    one, two = structure("open", TYPES), structure("open_with_cell", TYPES)
    skin = SkinNeighborList(CUTOFF, TYPES)
    skin.graph(Batch.from_data_list([one.replace(cell=two.cell, pbc=two.pbc), two]))
    assert_fresh(skin, Batch.from_data_list([two, one.replace(cell=two.cell, pbc=two.pbc)]))


def test_a_cell_that_appears_is_noticed() -> None:
    skin = SkinNeighborList(CUTOFF, TYPES)
    batch = batch_of("wire")
    skin.graph(batch)
    longer = batch.clone()
    longer.cell = batch.cell * 1.3
    assert_fresh(skin, longer)


@pytest.mark.parametrize("cutoff", [3.6, 3.6 / 2**0.5, 3.6 * 1.5**0.5])
def test_a_shell_of_neighbours_on_the_cutoff_is_the_same_in_both(cutoff: float) -> None:
    positions, cell = fcc((2, 2, 2), jitter=0.0)
    batch = Batch.from_data_list([AtomicData(positions + 0.1234567, [8] * len(positions), cell, True)])
    fresh = graph_from_batch(batch, cutoff, TYPES)
    inside = graph_from_batch(batch, cutoff - 1e-6, TYPES)
    assert fresh.n_edges > inside.n_edges  # rounding decides for each edge of the shell, but once
    kept = SkinNeighborList(cutoff, TYPES, skin=0.4).graph(batch)
    for name in ("edge_center", "edge_neighbor", "edge_shift", "ptr"):
        assert torch.equal(getattr(kept, name), getattr(fresh, name))
    assert float(edge_vectors(fresh).square().sum(1).max()) <= cutoff**2


def test_positions_that_became_nan_are_an_error_not_an_empty_list() -> None:
    batch = batch_of("periodic")
    skin = SkinNeighborList(CUTOFF, TYPES)
    skin.graph(batch)
    with pytest.raises(InputError, match="position of atom 3"):
        skin.graph(moved(batch, torch.tensor([[0.0], [0], [0], [float("nan")], [0], [0], [0], [0]])))


def test_the_callers_tensors_are_not_kept() -> None:
    batch = batch_of("periodic")
    skin = SkinNeighborList(CUTOFF, TYPES, skin=0.5)
    graph = skin.graph(batch)
    before = graph.positions.clone()
    batch.positions += 3 * torch.arange(batch.n_atoms)[:, None]
    assert torch.equal(graph.positions, before)
    assert_fresh(skin, batch)


def test_a_list_without_skin_is_searched_at_every_move() -> None:
    batch = batch_of("periodic")
    skin = SkinNeighborList(CUTOFF, TYPES, skin=0.0)
    for step in range(3):
        assert_fresh(skin, moved(batch, 1e-3 * step * torch.eye(8, 3, dtype=torch.float64)))
    assert skin.n_searches == 3
    with pytest.raises(InputError, match="skin must not be negative"):
        SkinNeighborList(CUTOFF, TYPES, skin=-0.1)
