from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from carryall.data import AtomicData, Batch, check_structures, read_structures, split_structures, summary, write_structures
from carryall.errors import InputError


def numbered(n: int) -> list[AtomicData]:
    return [AtomicData([[0, 0, 0]], [1], info={"n": i}) for i in range(n)]


def indices(parts: list[list[AtomicData]]) -> list[list[int]]:
    return [[one.info["n"] for one in part] for part in parts]


def test_split_is_deterministic_disjoint_and_keeps_order() -> None:
    structures = numbered(50)
    parts = indices(split_structures(structures, (0.8, 0.1, 0.1), seed=4))
    assert parts == indices(split_structures(structures, (0.8, 0.1, 0.1), seed=4))
    assert parts != indices(split_structures(structures, (0.8, 0.1, 0.1), seed=5))
    assert [len(part) for part in parts] == [40, 5, 5]
    assert sorted(chain(*parts)) == list(range(50))
    assert all(part == sorted(part) for part in parts)
    assert parts[1] != list(range(40, 45))


@pytest.mark.parametrize(
    ("n", "fractions", "sizes"),
    [
        (2, (0.95, 0.05), [1, 1]),
        (3, (0.98, 0.01, 0.01), [1, 1, 1]),
        (10, (0.5,), [5]),
        (10, (1.0, 0.0), [10, 0]),
        (10, (0.0, 1.0), [0, 10]),
        (7, (1 / 3, 1 / 3, 1 / 3), [2, 3, 2]),
        (100, (0.001, 0.999), [1, 99]),
    ],
)
def test_split_sizes(n: int, fractions: tuple[float, ...], sizes: list[int]) -> None:
    parts = split_structures(numbered(n), fractions, seed=0)
    assert [len(part) for part in parts] == sizes
    flat = list(chain(*indices(parts)))
    assert len(set(flat)) == len(flat)


@pytest.mark.parametrize("fractions", [(0.9, 0.2), (-0.1, 0.5), (), (float("nan"),)])
def test_split_refuses_bad_fractions(fractions: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="fractions must be from 0 to 1"):
        split_structures(numbered(5), fractions)


def test_split_refuses_too_few() -> None:
    with pytest.raises(InputError, match="1 structures cannot make 2 parts"):
        split_structures(numbered(1), (0.9, 0.1))


def with_nan(name: str) -> AtomicData:
    batch = Batch.from_data_list(
        [AtomicData([[0, 0, 0]], [1], cell=np.eye(3), energy=0.0, forces=[[0, 0, 0]], stress=np.eye(3))]
    )
    batch.get(name)[...] = float("nan")
    return batch.to_data_list()[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (AtomicData([], []), "structure 1: it has no atoms"),
        (with_nan("energy"), "structure 1: energy is nan"),
        (with_nan("forces"), "structure 1: forces of atom 0 is"),
        (with_nan("stress"), "structure 1: stress is"),
        (with_nan("positions"), "structure 1: positions of atom 0 is"),
        (AtomicData([[0, 0, 0]], [1], pbc=True), "structure 1: it is periodic but its cell has no volume"),
        (AtomicData([[0, 0, 0]], [1], cell=[[1, 0, 0], [2, 0, 0], [0, 0, 1]]), "its cell has no volume"),
        (AtomicData([[0, 0, 0]], [1], cell=[[1, 0, 0], [0, 1, 0], [0, 0, 0]]), "its cell has no volume"),
    ],
)
def test_check_names_the_structure(data: AtomicData, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_structures([numbered(1)[0], data])


def test_check_accepts_what_is_fine() -> None:
    slab = AtomicData([[0, 0, 0]], [1], cell=[[1, 0, 0], [0, 1, 0], [0, 0, 0]], pbc=[True, True, False])
    tiny = AtomicData([[0, 0, 0]], [1], cell=np.eye(3) * 1e-3)
    check_structures([*numbered(2), slab, tiny])
    with pytest.raises(InputError, match="no structures"):
        check_structures([])


def test_summary() -> None:
    structures = [
        AtomicData(np.zeros((2, 3)), [8, 1], energy=4.0, forces=np.full((2, 3), 3.0), cell=np.eye(3)),
        AtomicData(np.zeros((1, 3)), [1], energy=4.0, forces=np.full((1, 3), 3.0)),
        AtomicData(np.zeros((4, 3)), [26] * 4, stress=np.eye(3)),
    ]
    assert summary(structures) == {
        "frames": 3,
        "atoms": 7,
        "atoms_min": 1,
        "atoms_max": 4,
        "elements": ["H", "O", "Fe"],
        "energy_per_atom_mean": 3.0,
        "energy_per_atom_std": 1.0,
        "force_rms": 3.0,
        "with_energy": 2,
        "with_forces": 2,
        "with_stress": 1,
        "periodic": 1,
    }
    assert summary(structures[2:])["force_rms"] is None
    assert summary([])["frames"] == 0


def test_missing_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "water.extxyz").touch()
    with pytest.raises(InputError, match=r"watr.extxyz: no such file or folder, perhaps you meant 'water.extxyz'"):
        read_structures(tmp_path / "watr.extxyz")
    with pytest.raises(InputError, match="no such folder: make it first"):
        write_structures(tmp_path / "none" / "a.xyz", numbered(1))
    with pytest.raises(InputError, match="no structures to write"):
        write_structures(tmp_path / "a.xyz", [])


def test_import_needs_no_ase() -> None:
    import subprocess
    import sys

    code = "import sys; sys.modules['ase'] = None; import carryall.data as d; print(d.AtomicData([[0,0,0]], [1]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("AtomicData(H, 1 atoms")
    assert torch.__version__
