"""The structures that engines are compared on: physical distances, every shape, the user's own or why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ase
import numpy as np
import pytest
import torch

from carryall.data import AtomicData, write_structures
from carryall.errors import InputError
from carryall.graph.neighbor_search import neighbor_edges
from carryall.graph.potential import PotentialSpec
from carryall.package.verify_structures import CLOSEST, MOST_ELEMENTS, RADII, made_structures, radius, users_structures
from structures import structure

SPECS = {
    "metals": PotentialSpec(8.0, ("Ni", "Cu", "Rh", "Pd", "Ag", "Ir", "Pt", "Au", "Pb", "Al")),
    "water": PotentialSpec(5.0, ("H", "O")),
    "argon": PotentialSpec(8.5, ("Ar",)),
    "short": PotentialSpec(2.5, ("Cs", "H")),
    "heavy": PotentialSpec(6.0, ("Cm", "Og")),
}


def shortest(one: AtomicData) -> tuple[float, float]:
    """The shortest distance, Å, and the shortest in units of the sum of two radii."""
    cell = np.zeros((3, 3)) if one.cell is None else one.cell.numpy()
    positions = one.positions.numpy()
    center, neighbor, shift = neighbor_edges(positions, cell, one.pbc.numpy(), 9.0)
    length = np.linalg.norm(positions[neighbor] + shift @ cell - positions[center], axis=1)
    radii = np.array([radius(number) for number in one.atomic_numbers.tolist()])
    return length.min(), (length / (radii[center] + radii[neighbor])).min()


@pytest.mark.parametrize("name", SPECS)
def test_made_structures_are_physical_and_of_every_shape(name: str) -> None:
    spec = SPECS[name]
    made = made_structures(spec)
    assert list(made) == ["box", "tilted box", "one atom", "slab", "cluster"]
    for kind, one in made.items():
        closest, relative = shortest(one)
        # a short cutoff needs atoms nearer than they like
        assert relative > (0.2 if name == "short" else CLOSEST - 1e-9), kind
        assert closest < spec.cutoff, f"nobody has a neighbour in {kind}"
        assert 1 <= one.n_atoms <= 160
    box, tilted, image = (made[kind].cell.numpy() for kind in ("box", "tilted box", "one atom"))
    assert np.count_nonzero(box) == 3
    assert np.abs(tilted @ tilted.T - np.diag(np.diag(tilted @ tilted.T))).max() > 1
    assert np.count_nonzero(tilted) == 9, "an engine with a rotation of its own has to use it"
    assert np.linalg.det(tilted) > 0
    heights = np.linalg.det(tilted) / np.linalg.norm(np.cross(tilted[[1, 2, 0]], tilted[[2, 0, 1]]), axis=1)
    assert heights.min() < 2 * spec.cutoff
    assert made["one atom"].n_atoms == 1
    assert np.linalg.norm(image[0]) < spec.cutoff
    assert made["slab"].pbc.tolist() == [True, True, False]
    assert made["cluster"].cell is None


def test_all_elements_come_in_turn() -> None:
    made = made_structures(SPECS["metals"])
    assert {symbol for one in made.values() for symbol in one.symbols} == set(SPECS["metals"].type_map)
    assert all(len(set(one.symbols)) == (1 if name == "one atom" else MOST_ELEMENTS) for name, one in made.items())


def test_one_seed_makes_the_same_structures() -> None:
    first, again, other = (made_structures(SPECS["water"], seed) for seed in (1, 1, 2))
    for name in first:
        assert torch.equal(first[name].positions, again[name].positions)
        assert not torch.equal(first[name].positions, other[name].positions)


def test_radii_of_the_table() -> None:
    # Cordero et al. 2008, table 2
    assert [radius(z) for z in (1, 6, 8, 29, 55, 79, 96)] == [0.31, 0.76, 0.66, 1.32, 2.44, 1.36, 1.69]
    assert len(RADII) == 96


def test_inputs_without_a_default_are_given_and_others_left_to_it() -> None:
    spec = PotentialSpec(4.0, ("Fe",), dim_fparam=2, default_fparam=(0.4, 1.0), dim_aparam=3, spin=True, dim_chg_spin=2)
    one = made_structures(spec)["cluster"]
    assert set(one.system_extras) == {"charge_spin"}
    assert one.system_extras["charge_spin"].tolist() == [0.0, 1.0]
    assert one.atom_extras["aparam"].shape == (one.n_atoms, 3)
    assert one.spins is not None
    assert one.spins.shape == (one.n_atoms, 3)
    needed = made_structures(replace(spec, default_fparam=None))["cluster"]
    assert needed.system_extras["fparam"].shape == (2,)


def test_sums_over_reciprocal_vectors_get_three_periodic_axes() -> None:
    made = made_structures(PotentialSpec(5.0, ("Na", "Cl"), message_passing=True, long_range=True, k_cutoff=2.0))
    assert list(made) == ["box", "tilted box", "one atom"]
    assert all(bool(one.pbc.all()) for one in made.values())


def test_users_structures_are_spread_stripped_and_named(tmp_path: Path) -> None:
    frames = [structure("periodic", ("O", "H")).replace(energy=float(i), info={"source": i}) for i in range(10)]
    write_structures(tmp_path / "data.extxyz", frames)
    spec = PotentialSpec(4.0, ("O", "H"))
    found = users_structures(tmp_path / "data.extxyz", spec, 3)
    assert list(found) == ["data.extxyz:0", "data.extxyz:4", "data.extxyz:9"]
    assert all(one.energy is None and not one.info for one in found.values())
    assert list(users_structures(ase.Atoms("OH", [[0, 0, 0], [1.0, 0, 0]]), spec, 8)) == ["structure 0"]
    assert len(users_structures(frames, spec, 100)) == 10


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (ase.Atoms("OCu", [[0, 0, 0], [2.0, 0, 0]]), r"structure 1: atom 1 is Cu .* knows O, H"),
        (ase.Atoms("OH", [[0, 0, 0], [0, 0, 0]]), "structure 1: atoms 0 and 1 coincide"),
    ],
)
def test_what_the_potential_cannot_take_is_refused(atoms: ase.Atoms, message: str) -> None:
    good = ase.Atoms("OH", [[0, 0, 0], [1.0, 0, 0]])
    with pytest.raises(InputError, match=message):
        users_structures([good, atoms], PotentialSpec(4.0, ("O", "H")), 8)


def test_an_input_that_is_missing_is_named() -> None:
    with pytest.raises(InputError, match="structure 0: fparam is missing"):
        users_structures(ase.Atoms("O"), PotentialSpec(4.0, ("O",), dim_fparam=1), 8)
    with pytest.raises(InputError, match="no structures"):
        users_structures([], PotentialSpec(4.0, ("O",)), 8)
