from __future__ import annotations

import gzip
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structure_samples import assert_same, random_structure

from carryall.data import AtomicData, read_structures, units, write_structures
from carryall.data.elements import MASSES
from carryall.errors import InputError

WATER = "3\nProperties=species:S:1:pos:R:3\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"


def read_text(path: Path, text: str, **options: Any) -> list[AtomicData]:
    file = path / "data.extxyz"
    file.write_text(text, encoding="utf-8")
    return read_structures(file, **options)


def frame(comment: str, columns: str = "", cells: str = "") -> str:
    return f"1\n{comment} Properties=species:S:1:pos:R:3{columns}\nH 0 0 0 {cells}\n"


# -- round trips


def test_round_trip_in_full_precision(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    structures = [random_structure(rng, n, extras=False, cell=n != 2) for n in (1, 2, 7)]
    extras = {
        "tag": [1, 2, 3],
        "on": [True, False, True],
        "dipoles": rng.normal(size=(3, 3)),
        "move_mask": np.eye(3, dtype=bool),
    }
    structures.append(
        AtomicData(rng.normal(size=(3, 3)), [8, 1, 1], atom_extras=extras, info={"labels": np.array(["a", "b", "c"])})
    )
    for name in ("a.extxyz", "a.xyz", "a.extxyz.gz"):
        write_structures(tmp_path / name, structures)
        found = read_structures(tmp_path / name)
        assert len(found) == len(structures)
        for one, other in zip(structures, found, strict=True):
            assert_same(one.replace(velocities=None), other.replace(velocities=None))
            if one.velocities is not None:
                torch.testing.assert_close(other.velocities, one.velocities, rtol=1e-15, atol=0)
    assert (tmp_path / "a.extxyz.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.extxyz", "a.extxyz.gz", "a.xyz"]


def test_label_prefix_and_kept_second_labels(tmp_path: Path) -> None:
    data = AtomicData([[0, 0, 0]], [1], cell=np.eye(3), energy=1.0, forces=[[1, 2, 3]], stress=np.eye(3))
    write_structures(tmp_path / "a.xyz", [data], prefix="REF_")
    text = (tmp_path / "a.xyz").read_text()
    assert "REF_energy=1.0" in text
    assert "REF_forces:R:3" in text
    assert "REF_stress=" in text
    assert_same(data, read_structures(tmp_path / "a.xyz")[0])
    both = data.replace(info={"energy": 7.0})
    write_structures(tmp_path / "b.xyz", [both])
    assert_same(both, read_structures(tmp_path / "b.xyz")[0])


def test_system_extras_go_to_the_comment(tmp_path: Path) -> None:
    data = AtomicData(
        [[0, 0, 0]], [1], system_extras={"dipole": [1.0, 2.0, 3.0]}, atom_extras={"q": np.arange(4.0).reshape(1, 2, 2)}
    )
    write_structures(tmp_path / "a.xyz", [data])
    found = read_structures(tmp_path / "a.xyz")[0]
    assert found.info["dipole"].tolist() == [1, 2, 3]
    assert found.atom_extras["q"].tolist() == [[0, 1, 2, 3]]


# -- labels


@pytest.mark.parametrize("key", ["REF_energy", "dft_energy", "DFT_energy", "energy"])
def test_energy_keys(tmp_path: Path, key: str) -> None:
    assert float(read_text(tmp_path, frame(f"{key}=-3"))[0].energy) == -3


@pytest.mark.parametrize("key", ["REF_forces", "REF_force", "dft_forces", "dft_force", "forces", "force"])
def test_forces_keys(tmp_path: Path, key: str) -> None:
    found = read_text(tmp_path, frame("a=1", f":{key}:R:3", "1 2 3"))[0]
    assert found.forces.tolist() == [[1, 2, 3]]
    assert found.atom_extras == {}


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ('stress="1 2 3 2 4 5 3 5 6"', 1.0),
        ('stress="1 4 6 5 3 2"', 1.0),
        ('REF_stress="1 2 3 2 4 5 3 5 6"', 1.0),
        ('dft_stress="_JSON [[1, 2, 3], [2, 4, 5], [3, 5, 6]]"', 1.0),
        ('virial="1 2 3 2 4 5 3 5 6"', -1 / 8),
        ('REF_virial="1 2 3 2 4 5 3 5 6"', -1 / 8),
        ('REF_virials="1 4 6 5 3 2"', -1 / 8),
        ('virials="1 2 3 2 4 5 3 5 6"', -1 / 8),
    ],
)
def test_stress_keys(tmp_path: Path, text: str, sign: float) -> None:
    found = read_text(tmp_path, frame(f'Lattice="2 0 0 0 2 0 0 0 2" {text}'))[0]
    assert found.stress is not None
    np.testing.assert_allclose(found.stress.numpy(), sign * np.array([[1, 2, 3], [2, 4, 5], [3, 5, 6]]))
    assert found.info == {}


def test_precedence_and_what_is_left(tmp_path: Path) -> None:
    text = frame("energy=1 REF_energy=2 dft_energy=3", ":forces:R:3:REF_forces:R:3", "1 1 1 2 2 2")
    found = read_text(tmp_path, text)[0]
    assert float(found.energy) == 2
    assert found.info == {"energy": 1, "dft_energy": 3}
    assert found.forces.tolist() == [[2, 2, 2]]
    assert found.atom_extras["forces_column"].tolist() == [[1, 1, 1]]
    chosen = read_text(tmp_path, text, energy_key="energy", forces_key="forces")[0]
    assert float(chosen.energy) == 1
    assert chosen.forces.tolist() == [[1, 1, 1]]
    assert chosen.info == {"REF_energy": 2, "dft_energy": 3}


def test_stress_key_may_be_a_virial(tmp_path: Path) -> None:
    text = frame('Lattice="2 0 0 0 2 0 0 0 2" my_virial="8 0 0 0 8 0 0 0 8" stress="1 1 1 0 0 0"')
    np.testing.assert_allclose(read_text(tmp_path, text, stress_key="my_virial")[0].stress.numpy(), -np.eye(3), rtol=1e-14)
    no_cell = read_text(tmp_path, frame('virial="8 0 0 0 8 0 0 0 8"'))[0]
    assert no_cell.stress is None
    assert no_cell.info["virial"].tolist() == (8 * np.eye(3)).tolist()


# -- columns


def test_columns_have_their_place(tmp_path: Path) -> None:
    columns = ":Z:I:1:masses:R:1:charge:R:1:magmoms:R:3:tag:I:1:on:L:1:name:S:1:energy:R:1"
    found = read_text(tmp_path, frame('pbc="T F F"', columns, "1 2.0 0.5 0 0 1 7 T ox 3.5"))[0]
    assert found.masses.tolist() == [2.0]
    assert found.charges.tolist() == [0.5]
    assert found.spins.tolist() == [[0, 0, 1]]
    assert found.pbc.tolist() == [True, False, False]
    assert found.energy is None
    assert {name: value.tolist() for name, value in found.atom_extras.items()} == {
        "tag": [7],
        "on": [True],
        "energy_column": [3.5],
    }
    assert [str(value.dtype) for value in found.atom_extras.values()] == ["torch.int64", "torch.bool", "torch.float64"]
    assert found.info["name"].tolist() == ["ox"]


def test_atomic_numbers_instead_of_symbols(tmp_path: Path) -> None:
    assert read_text(tmp_path, "1\nProperties=pos:R:3:Z:I:1\n0 0 0 8\n")[0].atomic_numbers.tolist() == [8]
    assert read_text(tmp_path, "1\n\n8 0 0 0\n")[0].atomic_numbers.tolist() == [8]


def test_plain_xyz_lattice_and_pbc(tmp_path: Path) -> None:
    plain = read_text(tmp_path, "2\nTwo atoms\nH 0 0 0\nHe 0 0 1\n\n")[0]
    assert (plain.cell, plain.pbc.tolist(), plain.info) == (None, [False] * 3, {"comment": "Two atoms"})
    crystal = read_text(tmp_path, frame('Lattice="1 2 3 0 4 5 0 0 6"'))[0]
    assert crystal.cell.tolist() == [[1, 2, 3], [0, 4, 5], [0, 0, 6]]
    assert crystal.pbc.tolist() == [True] * 3


def test_momenta_become_velocities(tmp_path: Path) -> None:
    standard = read_text(tmp_path, frame("a=1", ":momenta:R:3", "1 2 3"))[0]
    np.testing.assert_array_equal(standard.velocities.numpy(), np.array([[1, 2, 3]]) / MASSES[1])
    heavy = read_text(tmp_path, frame("a=1", ":momenta:R:3:masses:R:1", "1 2 3 4"))[0]
    assert heavy.velocities.tolist() == [[0.25, 0.5, 0.75]]


def test_index(tmp_path: Path) -> None:
    text = "".join(frame(f"n={i}") for i in range(5))
    for index, expected in [
        (None, [0, 1, 2, 3, 4]),
        (2, [2]),
        (-1, [4]),
        (slice(1, None, 2), [1, 3]),
        (slice(-2, None), [3, 4]),
    ]:
        assert [one.info["n"] for one in read_text(tmp_path, text, index=index)] == expected
    with pytest.raises(InputError, match="there is no frame 5, the file holds 5"):
        read_text(tmp_path, text, index=5)


# -- errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"data.extxyz: the file holds no frame"),
        ("\n\n", "holds no frame"),
        ("water\n", r"frame 0 \(line 1\): expected the number of atoms, got 'water'"),
        (WATER + "0\n\n", r"frame 1 \(line 6\): the frame has 0 atoms"),
        (WATER + "-1\n\n", "the frame has -1 atoms"),
        (WATER + WATER[:-20], r"frame 1 \(line 6\): the file ends after 2 of 3 atoms: it is truncated"),
        ("3\n", "the file ends after 0 of 3 atoms"),
        (WATER + WATER.replace("H 0.96 0 0", "H 0.96 0"), r"frame 1 \(line 6\): line 9 \(atom 1\) has 3 columns, expected 4"),
        ("1\nfree text\nH 0 0 0 1\n", "has 5 columns, expected 4; a line with Properties= names more"),
        (WATER.replace("0.96", "O.96"), r"line 4 \(atom 1\): pos is 'O.96', expected a number"),
        (WATER.replace("0.96", "nan"), r"frame 0 \(line 1\): positions of atom 1 is \[nan"),
        (WATER.replace("O 0", "0x 0"), r"atom 0: '0x' is not a chemical element"),
        (WATER.replace("H -0", "CL -0"), "atom 2: 'CL' is not a chemical element, perhaps you meant 'Cl'"),
        (frame("energy=nan"), r"frame 0 \(line 1\): energy is nan"),
        (frame("energy=low"), "energy is 'low': expected a number"),
        (frame('energy="1 2"'), r"energy has shape \(2,\)"),
        (frame("a=1", ":forces:R:3", "0 NaN 0"), r"forces of atom 0 is \[0.0, nan, 0.0\]"),
        (frame("a=1", ":forces:R:2", "0 0"), r"forces has shape \(1, 2\), expected \(1, 3\)"),
        (frame('stress="1 2 3"'), "stress is '1 2 3': expected 9 numbers, or 6 in Voigt order"),
        (frame('REF_stress="1 2 3"'), "REF_stress has 3 values: expected 9, or 6 in Voigt order"),
        (frame('Lattice="1 2 3"'), "Lattice is '1 2 3': expected 9 numbers"),
        (frame('pbc="T F"'), r"pbc has shape \(2,\)"),
        (frame('a="1'), "not closed"),
        (frame('a="_JSON {"'), "a is no JSON"),
        (frame("a=1", ":tag:I:1", "1.5"), r"line 3 \(atom 0\): tag is '1.5', expected an integer"),
        (frame("a=1", ":on:L:1", "yes"), "on is 'yes', expected T or F"),
        (frame("a=1", ":w:X:1", "1"), "Properties has w:X:1"),
        (frame("a=1", ":w:R", "1"), "expected name:type:columns for each column"),
        (frame("a=1", ":pos:R:3", "1 1 1"), "each name once"),
        ("1\nProperties=pos:R:3\n0 0 0\n", "must hold pos:R:3 and species:S:1"),
        ("1\nProperties=species:S:1:pos:R:3:Z:I:1 a=1\nH 0 0 0 x\n", "Z is 'x', expected an integer"),
        ("1\nProperties=Z:I:1:pos:R:3\n200 0 0 0\n", "atomic number of atom 0 is 200"),
    ],
)
def test_errors_name_file_frame_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_text(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "data.extxyz"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy_key": "ref_energy"}, "energy_key is 'ref_energy', which is not there, perhaps you meant 'REF_energy'"),
        ({"forces_key": "forces"}, r"forces_key is 'forces', which is not there \(there are: none\)"),
        ({"stress_key": "virial"}, "virial cannot become a stress: the structure has no cell"),
    ],
)
def test_a_chosen_key_must_be_there(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_text(tmp_path, frame('REF_energy=1 virial="1 0 0 0 1 0 0 0 1"'), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"info": {"pbc": 1}}, "structure 0: info has 'pbc', a key of the format itself"),
        ({"info": {"w": 1}, "system_extras": {"w": 1}}, "'w' is in info and in system_extras"),
        ({"atom_extras": {"pos": [1]}}, r"atom_extras\['pos'\] cannot be a column of that name"),
        ({"atom_extras": {"a:b": [1]}}, "cannot be a column of that name"),
        ({"info": {"names": np.array(["two words"])}}, "'two words' cannot be a word of a text column"),
    ],
)
def test_what_cannot_be_written_is_named_and_leaves_no_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "a.xyz").write_text("old")
    with pytest.raises(InputError, match=message):
        write_structures(tmp_path / "a.xyz", [AtomicData([[0, 0, 0]], [1]).replace(**changes)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.xyz"]
    assert (tmp_path / "a.xyz").read_text() == "old"


def test_damaged_gzip_and_binary_files(tmp_path: Path) -> None:
    whole = gzip.compress(WATER.encode() * 50)
    (tmp_path / "a.xyz.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a.xyz.gz: cannot be read as extended XYZ"):
        read_structures(tmp_path / "a.xyz.gz")
    (tmp_path / "b.xyz").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"b.xyz: cannot be read as extended XYZ"):
        read_structures(tmp_path / "b.xyz")


def test_is_fast(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = AtomicData(rng.normal(size=(64, 3)), [14] * 64, cell=np.eye(3) * 10, forces=rng.normal(size=(64, 3)), energy=1.0)
    write_structures(tmp_path / "a.xyz", [one] * 200)
    start = time.process_time()
    assert len(read_structures(tmp_path / "a.xyz")) == 200
    assert time.process_time() - start < 1.0  # measured 0.1 s


# -- against ASE


def ase_images() -> list[Any]:
    ase = pytest.importorskip("ase")
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.constraints import FixAtoms, FixCartesian

    rng = np.random.default_rng(5)
    images = []
    for case in range(4):
        atoms = ase.Atoms(
            "OH2Cl", positions=rng.normal(size=(4, 3)), info={"config_type": "bulk run", "n": case, "v": np.arange(3)}
        )
        if case != 1:
            atoms.set_cell(np.eye(3) * 5 + rng.normal(size=(3, 3)))
            atoms.pbc = [True, case != 2, True]
        if case == 2:
            atoms.set_masses([18.0, 2.0, 2.0, 35.0])
        if case != 3:
            atoms.set_momenta(rng.normal(size=(4, 3)))
            atoms.calc = SinglePointCalculator(
                atoms, energy=-1.5 * case, forces=rng.normal(size=(4, 3)), stress=rng.normal(size=6)
            )
        atoms.set_initial_charges(rng.normal(size=4))
        atoms.set_initial_magnetic_moments(rng.normal(size=4))
        atoms.set_array("tags2", np.arange(4))
        atoms.set_array("names", np.array(["a", "b", "cc", "d"]))
        if case == 0:
            atoms.set_constraint([FixAtoms([1, 2])])
        if case == 2:
            atoms.set_constraint([FixCartesian(1, mask=[True, False, False]), FixAtoms([0])])
        if case != 3:
            atoms.calc = SinglePointCalculator(
                atoms, energy=-1.5 * case, forces=rng.normal(size=(4, 3)), stress=rng.normal(size=6)
            )
        images.append(atoms)
    return images


def test_we_read_what_ase_writes(tmp_path: Path) -> None:
    images = ase_images()
    from ase.io import read, write

    write(tmp_path / "a.extxyz", images)
    ours = read_structures(tmp_path / "a.extxyz")
    theirs = [AtomicData.from_ase(atoms) for atoms in read(tmp_path / "a.extxyz", ":")]
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_equal(other.info, one.info)
        wide = {name: value.long() if value.dtype == torch.int32 else value for name, value in other.atom_extras.items()}
        assert_same(one, other.replace(atom_extras=wide, info=one.info))


def test_ase_reads_what_we_write(tmp_path: Path) -> None:
    images = ase_images()
    from ase.io import read

    structures = [AtomicData.from_ase(atoms) for atoms in images]
    write_structures(tmp_path / "a.extxyz", structures)
    for atoms, found in zip(images, read(tmp_path / "a.extxyz", ":"), strict=True):
        assert found.get_chemical_symbols() == atoms.get_chemical_symbols()
        np.testing.assert_array_equal(found.positions, atoms.positions)
        np.testing.assert_array_equal(found.cell.array, atoms.cell.array)
        np.testing.assert_array_equal(found.pbc, atoms.pbc)
        np.testing.assert_array_equal(found.get_masses(), atoms.get_masses())
        np.testing.assert_allclose(found.get_momenta(), atoms.get_momenta(), rtol=1e-14)
        np.testing.assert_array_equal(found.get_initial_charges(), atoms.get_initial_charges())
        np.testing.assert_array_equal(found.get_initial_magnetic_moments(), atoms.get_initial_magnetic_moments())
        np.testing.assert_array_equal(found.arrays["tags2"], atoms.arrays["tags2"])
        assert list(found.arrays["names"]) == list(atoms.arrays["names"])
        assert found.info["config_type"] == "bulk run"
        if atoms.calc is not None:
            assert found.get_potential_energy() == atoms.get_potential_energy()
            np.testing.assert_array_equal(found.calc.results["forces"], atoms.calc.results["forces"])
            np.testing.assert_array_equal(found.get_stress(), atoms.get_stress())
    again = read(tmp_path / "a.extxyz", ":")
    assert again[0].constraints[0].get_indices().tolist() == [1, 2]
    assert units.fs < 1
