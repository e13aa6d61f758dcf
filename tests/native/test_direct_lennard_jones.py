"""Lennard-Jones by machine code is the model in torch, and depends on nothing but the system."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from carryall.data import AtomicData, Batch
from carryall.graph import SkinNeighborList, Systems, UnsearchableError, graph_from_batch
from carryall.graph import skin as skin_module
from carryall.models import EagerPotential, LennardJones
from carryall.native import build, library
from carryall.native import lists as native_lists
from structures import CUTOFF, fcc, geometries, small_dpa1

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")
KEYS = ("energy", "atomic_energy", "forces", "virial")
NUMBERS = {"Ne": 10, "Ar": 18, "Kr": 36}
TRUNCATIONS = ("none", "shift", "switch")


def model_of(symbols: Sequence[str], truncation: str, cutoff: float = CUTOFF) -> LennardJones:
    n = len(symbols)
    return LennardJones(symbols, (0.02, 0.05, 0.011)[:n], (2.1, 2.4, 1.9)[:n], cutoff, truncation)


def items_of(symbols: Sequence[str]) -> list[AtomicData]:
    numbers = [NUMBERS[one] for one in symbols]
    crystal = fcc((4, 4, 4), a=3.4, jitter=0.15, seed=5)  # 256 centres and one block of sums
    bigger = fcc((5, 4, 4), a=3.4, jitter=0.15, seed=6)
    shapes = [*geometries().values(), (*crystal, None), (*bigger, None)]
    return [AtomicData(x, [numbers[(7 * i) % len(numbers)] for i in range(len(x))], cell, pbc) for x, cell, pbc in shapes]


def direct(model: LennardJones, batch: Batch, skin: float = 0.4) -> dict[str, torch.Tensor]:
    found = EagerPotential(model).evaluate_systems(SkinNeighborList(model.cutoff, model.type_map, skin), Systems.of(batch))
    assert found is not None
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key in KEYS:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("symbols", [("Ar",), ("Ne", "Ar", "Kr")])
def test_equals_the_model_in_torch(symbols: tuple[str, ...], truncation: str) -> None:
    model, batch = model_of(symbols, truncation), Batch.from_data_list(items_of(symbols))
    found = direct(model, batch)
    expected = EagerPotential(model)(graph_from_batch(batch, model.cutoff, symbols))
    assert set(found) == set(KEYS)
    for key in KEYS:
        assert found[key].dtype == torch.float64
        assert found[key].shape == expected[key].shape
        # relative to the largest of its kind, from which sums of this size come
        assert float((found[key] - expected[key]).abs().max()) <= 1e-12 * float(expected[key].abs().max()), key
        assert float(expected[key].abs().max()) > 1e-2


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_each_system_to_its_own_scale(truncation: str) -> None:
    """A dimer's small numbers are as precise as a crystal's."""
    model = model_of(("Ar",), truncation)
    for r in (1.9, 2.7, 3.59, 3.61, 3.9, 4.0):
        batch = Batch.from_data_list([AtomicData([[0.1, 0.2, 0.3], [0.1 + 0.6 * r, 0.2, 0.3 + 0.8 * r]], [18, 18])])
        found, expected = direct(model, batch), EagerPotential(model)(graph_from_batch(batch, CUTOFF, ("Ar",)))
        for key in KEYS:
            # the slope of the switch near its end is a small difference: 1e-12 of the slope without it
            scale = max(float(expected[key].abs().max()), 1e-3 * 0.02)
            assert float((found[key] - expected[key]).abs().max()) <= 1e-12 * scale, (r, key)


def test_forces_and_virial_are_derivatives_of_the_energy() -> None:
    model = model_of(("Ne", "Ar"), "switch")
    positions, cell = fcc((1, 1, 1), a=3.5, jitter=0.1)
    data = AtomicData(positions, [10, 18, 18, 10], cell)
    found = direct(model, Batch.from_data_list([data]))
    step = 1e-4

    def energy(x: np.ndarray, h: np.ndarray) -> float:
        return float(direct(model, Batch.from_data_list([AtomicData(x, data.atomic_numbers, h)]))["energy"])

    for k in range(3):
        shift = np.zeros((4, 3))
        shift[2, k] = step
        slope = (energy(positions + shift, cell) - energy(positions - shift, cell)) / (2 * step)
        assert float(found["forces"][2, k]) == pytest.approx(-slope, abs=2e-6)
        for j in range(3):
            strain = np.zeros((3, 3))
            strain[k, j] = step
            plus, minus = np.eye(3) + strain, np.eye(3) - strain
            slope = (energy(positions @ plus, cell @ plus) - energy(positions @ minus, cell @ minus)) / (2 * step)
            assert float(found["virial"][0, k, j]) == pytest.approx(-slope, abs=2e-6)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_a_system_in_a_batch_is_the_system_alone(truncation: str) -> None:
    symbols = ("Ne", "Ar")
    model, items = model_of(symbols, truncation), items_of(symbols)
    together = direct(model, Batch.from_data_list(items))
    start = 0
    for index, item in enumerate(items):
        alone = direct(model, Batch.from_data_list([item]))
        atoms = slice(start, start + item.n_atoms)
        for key, rows in (("energy", index), ("virial", index), ("atomic_energy", atoms), ("forces", atoms)):
            found = alone[key][0] if isinstance(rows, int) else alone[key]
            assert torch.equal(together[key][rows], found), (index, key)
        start += item.n_atoms


@pytest.mark.parametrize("symbols", [("Ar",), ("Ne", "Ar", "Kr")])
def test_bits_do_not_depend_on_the_list(symbols: tuple[str, ...]) -> None:
    """Neither on its skin nor on when it was searched, along a walk through the cell's boundary and back."""
    model, batch = model_of(symbols, "switch"), Batch.from_data_list(items_of(symbols))
    lists = [SkinNeighborList(model.cutoff, symbols, skin) for skin in (0.0, 0.3, 2.0)]
    generator = torch.Generator().manual_seed(3)
    potential = EagerPotential(model)
    for step in range(8):
        systems = Systems.of(batch)
        results = [potential.evaluate_systems(one, systems) for one in [*lists, SkinNeighborList(model.cutoff, symbols, 0.0)]]
        for one in results[1:]:
            assert results[0] is not None
            assert one is not None
            assert_equal(one, results[0])
        batch = batch.clone()
        noise = torch.randn(batch.n_atoms, 3, generator=generator, dtype=torch.float64)
        batch.positions = batch.positions + 0.04 * noise
        if step == 5:
            batch.cell = batch.cell * 1.001
    assert lists[2].n_searches < lists[1].n_searches < lists[0].n_searches


def test_bits_do_not_depend_on_threads() -> None:
    model = model_of(("Ar",), "switch", cutoff=6.0)
    batch = Batch.from_data_list([AtomicData(*_crystal((6, 6, 6), 1)), AtomicData(*_crystal((5, 4, 4), 2))])
    expected = direct(model, batch)
    before = torch.get_num_threads()
    try:
        for n in (2, 3, 7):
            torch.set_num_threads(n)
            assert_equal(direct(model, batch), expected)
    finally:
        torch.set_num_threads(before)


def _crystal(repeats: tuple[int, int, int], seed: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    positions, cell = fcc(repeats, a=3.4, jitter=0.1, seed=seed)
    return positions, [18] * len(positions), cell


def test_bits_do_not_depend_on_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from code that knows no instructions but the oldest."""
    compiler = build.find_compiler()
    assert compiler is not None
    flags = [flag for flag in build.FLAGS if flag not in ("-march=native", "-O3")]
    code = [str(path) for path in build.sources() if path.suffix == ".cpp"]
    target = tmp_path / "plain.so"
    subprocess.run([compiler, *flags, "-O1", *code, "-o", str(target)], check=True, capture_output=True)
    plain = build.load(target)
    for symbols, truncation in ((("Ar",), "shift"), (("Ne", "Ar", "Kr"), "switch")):
        model, batch = model_of(symbols, truncation), Batch.from_data_list(items_of(symbols))
        expected = direct(model, batch)
        graph = SkinNeighborList(CUTOFF, symbols).graph(batch)
        with monkeypatch.context() as patch:
            patch.setattr(native_lists, "library", lambda: plain)
            assert_equal(direct(model, batch), expected)
            other = SkinNeighborList(CUTOFF, symbols).graph(batch)
        for name in ("edge_center", "edge_neighbor", "edge_shift", "ptr"):
            assert torch.equal(getattr(graph, name), getattr(other, name))


def test_every_system_without_a_graph_is_named() -> None:
    model = model_of(("Ar",), "shift")
    good = AtomicData(*_crystal((2, 2, 2), 1))
    batch = Batch.from_data_list([good] * 5)
    neighbors = SkinNeighborList(CUTOFF, ("Ar",), 0.5)
    potential = EagerPotential(model)
    expected = potential.evaluate_systems(neighbors, Systems.of(batch))
    bad = batch.clone()
    bad.positions = batch.positions.clone()
    bad.positions[32 + 3, 1] = torch.nan
    bad.positions[64 + 4] = bad.positions[64 + 9] + 1e-9
    bad.cell = batch.cell.clone()
    bad.cell[4, 1] = bad.cell[4, 0]
    with pytest.raises(UnsearchableError, match="system 1: position of atom 3") as caught:
        potential.evaluate_systems(neighbors, Systems.of(bad))
    assert list(caught.value.reasons) == [1, 2, 4]
    assert caught.value.reasons[2].startswith("atoms 4 and 9 coincide")
    assert caught.value.reasons[4].startswith("cell has no volume")
    again = potential.evaluate_systems(neighbors, Systems.of(batch))
    assert expected is not None
    assert again is not None
    assert_equal(again, expected)


def test_a_pair_that_collides_within_a_valid_list_is_caught() -> None:
    model = model_of(("Ar",), "shift")
    neighbors = SkinNeighborList(CUTOFF, ("Ar",), 1.0)
    apart, together = (Batch.from_data_list([AtomicData([[0.0, 0, 0], [x, 0, 0], [3.0, 0, 0]], [18] * 3)]) for x in (0.4, 1e-8))
    EagerPotential(model).evaluate_systems(neighbors, Systems.of(apart))
    with pytest.raises(UnsearchableError, match="system 0: atoms 0 and 1 coincide"):
        EagerPotential(model).evaluate_systems(neighbors, Systems.of(together))
    assert neighbors.n_searches == 1


def test_where_only_the_graph_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(("Ar",), "shift")
    batch = Batch.from_data_list(items_of(("Ar",)))
    systems, potential = Systems.of(batch), EagerPotential(model)
    assert potential.evaluate_systems(SkinNeighborList(CUTOFF + 1, ("Ar",)), systems) is None
    assert potential.evaluate_systems(SkinNeighborList(CUTOFF, ("Ar", "Ne")), systems) is None
    assert EagerPotential(small_dpa1()).evaluate_systems(SkinNeighborList(CUTOFF, ("O", "H")), systems) is None
    wanted = batch.clone()
    wanted.positions = batch.positions.clone().requires_grad_()
    assert potential.evaluate_systems(SkinNeighborList(CUTOFF, ("Ar",)), Systems.of(wanted)) is None
    monkeypatch.setattr(skin_module, "library", lambda: None)
    assert potential.evaluate_systems(SkinNeighborList(CUTOFF, ("Ar",)), systems) is None


def test_parameters_that_change_are_seen() -> None:
    model, batch = model_of(("Ar",), "shift"), Batch.from_data_list(items_of(("Ar",)))
    before = direct(model, batch)["energy"]
    model.epsilon.mul_(2.0)
    assert torch.allclose(direct(model, batch)["energy"], 2 * before, rtol=1e-13, atol=0)


def test_results_are_fresh_tensors() -> None:
    model, batch = model_of(("Ar",), "shift"), Batch.from_data_list(items_of(("Ar",)))
    neighbors = SkinNeighborList(CUTOFF, ("Ar",))
    first = EagerPotential(model).evaluate_systems(neighbors, Systems.of(batch))
    assert first is not None
    kept = first["forces"].clone()
    batch.positions = batch.positions * 1.01
    EagerPotential(model).evaluate_systems(neighbors, Systems.of(batch))
    assert torch.equal(first["forces"], kept)
