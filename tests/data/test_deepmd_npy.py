from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from carryall.data import AtomicData, read_structures, write_structures
from carryall.data.deepmd_npy import write_deepmd
from carryall.errors import InputError

RNG = np.random.default_rng(11)
N_FRAMES, N_ATOMS = 3, 4


def arrays(dtype: str = "float64") -> dict[str, np.ndarray]:
    widths = {"coord": 3 * N_ATOMS, "force": 3 * N_ATOMS, "virial": 9}
    found = {name: RNG.normal(size=(N_FRAMES, width)).astype(dtype) for name, width in widths.items()}
    found["box"] = np.tile(np.diag([2.0, 3.0, 4.0]).reshape(9), (N_FRAMES, 1)).astype(dtype)
    found["energy"] = RNG.normal(size=N_FRAMES).astype(dtype)
    return found


def make_system(
    folder: Path, values: dict[str, np.ndarray], types: str = "0 1 1 0", nopbc: bool = False, part: str = "000"
) -> Path:
    target = folder / f"set.{part}"
    target.mkdir(parents=True)
    (folder / "type.raw").write_text(types.replace(" ", "\n"))
    (folder / "type_map.raw").write_text("O\nH\n")
    if nopbc:
        (folder / "nopbc").touch()
    for name, array in values.items():
        np.save(target / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_reads_a_system(tmp_path: Path, dtype: str) -> None:
    values = arrays(dtype)
    found = read_structures(make_system(tmp_path / "s", values))
    assert len(found) == N_FRAMES
    for i, data in enumerate(found):
        assert data.symbols == ["O", "H", "H", "O"]
        assert data.positions.dtype == data.energy.dtype == data.forces.dtype == torch.float64
        np.testing.assert_array_equal(data.positions.numpy().reshape(-1), values["coord"][i])
        np.testing.assert_array_equal(data.forces.numpy().reshape(-1), values["force"][i])
        assert float(data.energy) == float(values["energy"][i])
        np.testing.assert_allclose(data.stress.numpy().reshape(-1), -values["virial"][i].astype(np.float64) / 24, rtol=1e-13)
        assert data.cell.diagonal().tolist() == [2, 3, 4]
        assert data.pbc.all()


def test_sets_in_order_and_systems_below_a_folder(tmp_path: Path) -> None:
    for system, part in (("b", "000"), ("b", "001"), ("sub/a", "000")):
        values = arrays()
        values["energy"] = np.full(N_FRAMES, {"b000": 1.0, "b001": 2.0}.get(system + part, 3.0))
        target = tmp_path / system
        if (target / "type.raw").exists():
            (target / f"set.{part}").mkdir()
            for name, array in values.items():
                np.save(target / f"set.{part}" / f"{name}.npy", array)
        else:
            make_system(target, values, part=part)
    assert [float(one.energy) for one in read_structures(tmp_path)] == [1.0] * 3 + [2.0] * 3 + [3.0] * 3
    assert [float(one.energy) for one in read_structures(tmp_path, index=slice(2, 4))] == [1.0, 2.0]


def test_mixed_types_and_virtual_atoms(tmp_path: Path) -> None:
    values = arrays()
    real = np.array([[0, 1, 1, -1], [1, 1, 1, 1], [0, -1, -1, -1]])
    aparam = RNG.normal(size=(N_FRAMES, N_ATOMS))
    folder = make_system(
        tmp_path / "s", {**values, "real_atom_types": real, "aparam": aparam, "fparam": np.ones((3, 2))}, "0 0 0 0"
    )
    found = read_structures(folder)
    assert [data.symbols for data in found] == [["O", "H", "H"], ["H"] * 4, ["O"]]
    np.testing.assert_array_equal(found[0].positions.numpy(), values["coord"][0].reshape(4, 3)[:3])
    np.testing.assert_array_equal(found[2].forces.numpy(), values["force"][2].reshape(4, 3)[:1])
    assert found[0].atom_extras["aparam"].tolist() == aparam[0, :3, None].tolist()
    assert found[0].system_extras["fparam"].tolist() == [1, 1]


def test_without_cell(tmp_path: Path) -> None:
    values = arrays()
    del values["box"]
    found = read_structures(make_system(tmp_path / "s", values, nopbc=True))
    assert found[0].cell is None
    assert not found[0].pbc.any()
    assert found[0].stress is None
    np.testing.assert_array_equal(found[0].info["virial"].reshape(-1), values["virial"][0])


def structure(numbers: list[int], *, cell: bool = True, labels: bool = True) -> AtomicData:
    n = len(numbers)
    return AtomicData(
        RNG.normal(size=(n, 3)),
        numbers,
        cell=np.eye(3) * 5 + RNG.normal(size=(3, 3)) if cell else None,
        energy=RNG.normal() if labels else None,
        forces=RNG.normal(size=(n, 3)) if labels else None,
        stress=RNG.normal(size=(3, 3)) if cell and labels else None,
    )


def assert_same_set(found: list[AtomicData], expected: list[AtomicData]) -> None:
    """The same structures, in any order, to rounding of the virial."""
    assert len(found) == len(expected)
    by_place = {float(one.positions[0, 0]): one for one in found}
    for one in expected:
        other = by_place[float(one.positions[0, 0])]
        for name in ("positions", "atomic_numbers", "cell", "pbc", "energy", "forces", "stress"):
            value, back = getattr(one, name), getattr(other, name)
            assert (value is None) == (back is None), name
            if value is not None:
                torch.testing.assert_close(back, value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mixed_type", [False, True])
def test_round_trip_of_structures_that_differ(tmp_path: Path, mixed_type: bool) -> None:
    structures = [
        structure([8, 1, 1]),
        structure([1, 8, 1]),
        structure([8, 1, 1]),
        structure([8, 1, 1], cell=False),
        structure([8, 1, 1], labels=False),
        structure([6]),
    ]
    write_deepmd(tmp_path / "out", structures, mixed_type=mixed_type, set_size=1)
    assert_same_set(read_structures(tmp_path / "out"), structures)
    assert len(list((tmp_path / "out").iterdir())) == (4 if mixed_type else 5)


def test_write_structures_makes_one_system_and_overwrites_nothing(tmp_path: Path) -> None:
    structures = [structure([8, 1, 1]) for _ in range(3)]
    write_structures(tmp_path / "out", structures)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["set.000", "type.raw", "type_map.raw"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "type_map.raw").read_text().split() == ["H", "O"]
    assert_same_set(read_structures(tmp_path / "out"), structures)
    with pytest.raises(InputError, match="out exists and is not an empty folder"):
        write_structures(tmp_path / "out", structures)
    write_structures(tmp_path / "x.npydir", structures, format="deepmd/npy")
    assert len(read_structures(tmp_path / "x.npydir")) == 3


def test_float32_files(tmp_path: Path) -> None:
    data = structure([8, 1, 1])
    write_deepmd(tmp_path / "out", [data], dtype="float32")
    assert np.load(tmp_path / "out" / "set.000" / "coord.npy").dtype == np.float32
    torch.testing.assert_close(read_structures(tmp_path / "out")[0].positions, data.positions, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (AtomicData([[0, 0, 0]], [1], cell=np.eye(3), pbc=[True, True, False]), "structure 0 is periodic along some axes only"),
        (AtomicData([[0, 0, 0]], [1], pbc=True), "structure 0 is periodic but its cell has no volume"),
        (AtomicData([], []), "structure 0 has no atoms"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, data: AtomicData, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_structures(tmp_path / "out", [data])
    assert list(tmp_path.iterdir()) == []


def break_system(folder: Path, what: str) -> None:
    first = folder / "set.000"
    nan = np.zeros(N_FRAMES)
    nan[1] = np.nan
    actions = {
        "no type_map": lambda: (folder / "type_map.raw").unlink(),
        "bad type": lambda: (folder / "type.raw").write_text("0 1 x 0"),
        "unnamed type": lambda: (folder / "type.raw").write_text("0 1 2 0"),
        "unknown element": lambda: (folder / "type_map.raw").write_text("O\nHH\n"),
        "no box": lambda: (first / "box.npy").unlink(),
        "no coord": lambda: (first / "coord.npy").unlink(),
        "flat box": lambda: np.save(first / "box.npy", np.zeros((N_FRAMES, 9))),
        "width": lambda: np.save(first / "force.npy", np.zeros((N_FRAMES, 5))),
        "frames": lambda: np.save(first / "energy.npy", np.zeros(2)),
        "truncated": lambda: (first / "coord.npy").write_bytes((first / "coord.npy").read_bytes()[:-7]),
        "nan": lambda: np.save(first / "energy.npy", nan),
        "no set": lambda: first.rename(folder / "other"),
        "no system": lambda: (folder / "type.raw").unlink(),
    }
    actions[what]()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no type_map", "type_map.raw is missing"),
        ("bad type", "type.raw: expected one integer an atom"),
        ("unnamed type", r"set.000: frame 0: type 2 has no name: type_map.raw names 2 types, O, H"),
        ("unknown element", "frame 0: 'HH' is not a chemical element"),
        ("no box", "box.npy is missing: a system without cell has an empty file nopbc"),
        ("no coord", "coord.npy is missing"),
        ("flat box", "frame 0: box is .* which has no volume"),
        ("width", "force.npy has 5 values a frame, expected 12"),
        ("frames", "energy.npy has 2 frames, coord.npy has 3"),
        ("truncated", "coord.npy: not an array of numbers"),
        ("nan", "set.000: frame 1: energy is "),
        ("no set", r"no set.\* folder"),
        ("no system", "no DeePMD system here or below"),
    ],
)
def test_errors_name_the_place(tmp_path: Path, what: str, message: str) -> None:
    folder = make_system(tmp_path / "s", arrays())
    break_system(folder, what)
    with pytest.raises(InputError, match=message) as caught:
        read_structures(folder)
    assert str(caught.value).startswith(str(folder))
