from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from structure_samples import assert_same, random_structure

from carryall.data import AtomicData
from carryall.errors import InputError

WATER = {"positions": [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]], "atomic_numbers": [8, 1, 1]}


def test_defaults_are_float64_and_open() -> None:
    data = AtomicData(**WATER, energy=-3)
    assert data.positions.dtype == data.energy.dtype == torch.float64
    assert data.atomic_numbers.dtype == torch.int64
    assert data.cell is None
    assert data.pbc.tolist() == [False] * 3
    assert data.energy.shape == ()
    assert (data.n_atoms, data.n_edges, data.symbols, data.volume) == (3, 0, ["O", "H", "H"], 0.0)


def test_a_cell_makes_it_periodic_unless_said_otherwise() -> None:
    assert AtomicData(**WATER, cell=np.eye(3) * 4).pbc.tolist() == [True] * 3
    assert AtomicData(**WATER, cell=np.eye(3) * 4).volume == pytest.approx(64)
    assert AtomicData(**WATER, cell=np.eye(3), pbc=[True, True, False]).pbc.tolist() == [True, True, False]
    assert AtomicData(**WATER, cell=np.eye(3), pbc=False).pbc.tolist() == [False] * 3
    assert AtomicData(**WATER, cell=np.zeros((3, 3))).cell is None
    assert AtomicData(**WATER, cell=np.zeros((3, 3))).pbc.tolist() == [False] * 3


def test_dtypes_given_are_kept() -> None:
    x = torch.zeros(3, 3, dtype=torch.float32)
    data = AtomicData(x, torch.tensor([8, 1, 1], dtype=torch.int32), forces=np.zeros((3, 3), dtype=np.float32))
    assert data.positions is x
    assert data.forces.dtype == torch.float32
    assert data.atomic_numbers.dtype == torch.int64


def test_arrays_are_copied_and_big_endian_is_understood() -> None:
    x = np.zeros((3, 3))
    data = AtomicData(x, np.array([8, 1, 1], dtype=">i4"), forces=np.arange(9.0).reshape(3, 3).astype(">f8"))
    x += 1
    assert data.positions.abs().max() == 0
    assert data.forces.tolist() == np.arange(9.0).reshape(3, 3).tolist()
    assert data.atomic_numbers.tolist() == [8, 1, 1]


def test_is_frozen_and_replace_checks_again() -> None:
    data = AtomicData(**WATER, info={"a": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.energy = torch.tensor(1.0)  # type: ignore[misc]
    changed = data.replace(energy=2.0)
    assert (float(changed.energy), changed.info, data.energy) == (2.0, {"a": 1}, None)
    with pytest.raises(InputError, match="energy is nan"):
        data.replace(energy=float("nan"))
    with pytest.raises(InputError, match="no field 'force'"):
        data.replace(force=1)


def test_pickle_and_deepcopy_keep_everything() -> None:
    data = random_structure(np.random.default_rng(0), 4, 5)
    assert_same(data, pickle.loads(pickle.dumps(data)))
    assert_same(data, copy.deepcopy(data))


def test_to_converts_floating_tensors_only() -> None:
    data = random_structure(np.random.default_rng(0), 4, 5).to(dtype=torch.float32)
    assert data.positions.dtype == data.energy.dtype == data.atom_extras["a_0"].dtype == torch.float32
    assert data.atomic_numbers.dtype == data.atom_extras["a_2"].dtype == torch.int64
    assert data.system_extras["s_6"].dtype == torch.bool


def test_repr_is_short() -> None:
    assert repr(AtomicData(**WATER, cell=np.eye(3), energy=1.0)) == "AtomicData(OH2, 3 atoms, periodic: abc, labels: energy)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": [[0, 0, 0], [0, 0, np.nan], [0, 1, 0]]}, r"positions of atom 1 is \[0.0, 0.0, nan\]"),
        ({"forces": [[0, 0, 0], [0, 0, 0], [0, np.inf, 0]]}, "forces of atom 2 is"),
        ({"energy": np.nan}, "energy is nan"),
        ({"stress": np.full((3, 3), np.nan)}, "stress is"),
        ({"cell": [[np.nan] * 3] * 3}, "cell is"),
        ({"positions": np.zeros((3, 2))}, r"positions has shape \(3, 2\), expected \(n_atoms, 3\)"),
        ({"forces": np.zeros((2, 3))}, r"forces has shape \(2, 3\), expected \(3, 3\) for 3 atoms"),
        ({"atomic_numbers": [8, 1]}, r"atomic_numbers has shape \(2,\), expected \(3,\)"),
        ({"atomic_numbers": [8, 1, 0]}, "atomic number of atom 2 is 0, expected 1 to 118"),
        ({"atomic_numbers": [8.0, 1.0, 1.0]}, "atomic_numbers must be integers"),
        ({"energy": [1.0, 2.0]}, r"energy has shape \(2,\), expected \(\)"),
        ({"energy": "low"}, "energy must be numbers"),
        ({"stress": np.zeros(6)}, r"stress has shape \(6,\), expected \(3, 3\)"),
        ({"cell": np.zeros(3)}, r"cell has shape \(3,\)"),
        ({"pbc": [2, 0, 0]}, "pbc must be true or false"),
        ({"spins": np.zeros((3, 2))}, r"spins has shape \(3, 2\), expected \(3,\) or \(3, 3\)"),
        ({"masses": [16, 1, 0]}, "mass of atom 2 is 0.0 amu"),
        ({"positions": [[0, 0, 0], [1]]}, "positions is not an array"),
        ({"edge_index": [[0, 3]]}, r"edge_index\[0\] is \[0, 3\], expected atoms 0 to 2"),
        ({"edge_index": [[0, 1]], "edge_extras": {"w": [1.0, 2.0]}}, "one row per edge"),
        ({"atom_extras": {"tag": [1, 2]}}, r"atom_extras\['tag'\] has 2 rows, expected 3"),
        ({"atom_extras": {"tag": 1}}, "expected one row per atom"),
        ({"atom_extras": {"forces": np.zeros((3, 3))}}, "field of its own"),
        ({"atom_extras": {"w": [1, 2, 3]}, "system_extras": {"w": 1}}, "'w' is in atom_extras and in system_extras"),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AtomicData(**{**WATER, **changes})


def test_level_is_by_name_not_by_length() -> None:
    data = AtomicData(**WATER, system_extras={"dipole": [1.0, 2.0, 3.0]}, atom_extras={"tag": [1, 2, 3]})
    assert data.system_extras["dipole"].shape == data.atom_extras["tag"].shape == (3,)
