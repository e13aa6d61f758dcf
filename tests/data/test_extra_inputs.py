"""fparam and aparam on their way from files, ASE and structures to batches, and what is said when one is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carryall.data import AtomicData, Batch, read_structures, write_structures
from carryall.data.extra_inputs import (
    ase_extras,
    complete_input,
    extra_inputs,
    input_extras,
    missing_inputs,
    structure_inputs,
    take_system_inputs,
)
from carryall.errors import InputError

POSITIONS = [[0.0, 0, 0], [1.1, 0.2, 0.1], [0.3, 1.4, -0.2]]


def with_inputs(fparam: Any = None, aparam: Any = None) -> AtomicData:
    return AtomicData(
        POSITIONS,
        [8, 1, 1],
        energy=-1.0,
        system_extras={} if fparam is None else {"fparam": fparam},
        atom_extras={} if aparam is None else {"aparam": aparam},
    )


@pytest.mark.parametrize(
    ("fparam", "aparam", "widths"),
    [
        (300.0, [1, 0, 2], (1, 1)),
        ([300.0], [[1.0], [0.0], [2.0]], (1, 1)),
        ([1, 2, 3], np.arange(6).reshape(3, 2), (3, 2)),
        (torch.ones(2, dtype=torch.float32), torch.zeros(3, 2, 2, dtype=torch.float32), (2, 4)),
    ],
)
def test_any_form_becomes_rows_of_float64(fparam: Any, aparam: Any, widths: tuple[int, int]) -> None:
    data = with_inputs(fparam, aparam)
    found = structure_inputs(data)
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(("fparam", "aparam"), torch.float64)
    assert (found["fparam"].shape, found["aparam"].shape) == ((1, widths[0]), (3, widths[1]))
    batch = extra_inputs(Batch.from_data_list([data, data]))
    assert torch.equal(batch["fparam"], found["fparam"].repeat(2, 1))
    assert torch.equal(batch["aparam"], found["aparam"].repeat(2, 1))


def test_values_are_kept_in_order() -> None:
    found = structure_inputs(with_inputs([4.0, -1.0], [[1, 2], [3, 4], [5, 6]]))
    assert found["fparam"].tolist() == [[4.0, -1.0]]
    assert found["aparam"].tolist() == [[1, 2], [3, 4], [5, 6]]


def test_inputs_go_to_another_structure_without_other_extras() -> None:
    data = with_inputs([4.0, -1.0], [1.0, 2.0, 3.0])
    data = data.replace(system_extras={**data.system_extras, "other": 1.0}, atom_extras={**data.atom_extras, "more": [1, 2, 3]})
    bare = AtomicData(POSITIONS, [8, 1, 1], **input_extras(data))
    assert (list(bare.system_extras), list(bare.atom_extras)) == (["fparam"], ["aparam"])
    assert structure_inputs(bare)["fparam"].tolist() == [[4.0, -1.0]]
    assert structure_inputs(bare)["aparam"].tolist() == [[1.0], [2.0], [3.0]]
    assert input_extras(with_inputs()) == {"system_extras": {}, "atom_extras": {}}


def test_what_has_none_has_none() -> None:
    assert structure_inputs(with_inputs()) == {}
    assert extra_inputs(Batch.from_data_list([with_inputs()])) == {}
    assert list(structure_inputs(with_inputs(fparam=1.0))) == ["fparam"]


def test_an_empty_batch_keeps_its_widths() -> None:
    batch = Batch.from_data_list([with_inputs([1.0, 2.0], [[1.0], [2.0], [3.0]])])
    none = extra_inputs(batch.index_select([]))
    assert (none["fparam"].shape, none["aparam"].shape) == ((0, 2), (0, 1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_inputs([1.0, float("nan")]), r"fparam is \[1.0, nan\]: expected finite numbers"),
        (with_inputs(aparam=[1.0, float("inf"), 0.0]), r"aparam of atom 1 is \[inf\]: expected finite numbers"),
        (with_inputs(aparam=[True, False, True]), "aparam must be numbers, got bool"),
    ],
)
def test_values_that_cannot_be_used(data: AtomicData, message: str) -> None:
    with pytest.raises(InputError, match=message):
        structure_inputs(data)


# -- a mixed batch, and what is missing


def test_structures_without_a_parameter_are_marked_in_a_batch() -> None:
    items = [with_inputs([1.0, 2.0]), with_inputs(), with_inputs([3.0, 4.0])]
    fill = missing_inputs(items)
    assert list(fill) == ["fparam"]
    found = extra_inputs(Batch.from_data_list(items, fill))["fparam"]
    assert found[[0, 2]].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert found[1].isnan().all()
    completed = complete_input("fparam", found, 3, 2, default=(8.0, 9.0))
    assert completed.tolist() == [[1.0, 2.0], [8.0, 9.0], [3.0, 4.0]]


def test_alike_structures_need_no_filling() -> None:
    assert missing_inputs([with_inputs(1.0), with_inputs(2.0)]) == {}
    assert missing_inputs([with_inputs(), with_inputs()]) == {}


def test_complete_input_without_anything() -> None:
    assert complete_input("fparam", None, 2, 1, default=(7.0,)).tolist() == [[7.0], [7.0]]
    given = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    assert torch.equal(complete_input("aparam", given, 2, 1), given)


@pytest.mark.parametrize(
    ("name", "value", "rows", "width", "message"),
    [
        ("fparam", None, 2, 1, r"is missing for system 0, 1: the potential needs 1 value for each system \(system_extras"),
        ("aparam", None, 10, 2, r"is missing for atom 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.: .* needs 2 values for each atom"),
        ("fparam", torch.zeros(2, 3), 2, 1, "fparam has 3 values for each system, the potential needs 1"),
        ("fparam", torch.tensor([[0.0], [torch.nan]]), 2, 1, "fparam is missing for system 1: "),
    ],
)
def test_what_is_missing_is_named(name: str, value: torch.Tensor | None, rows: int, width: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        complete_input(name, value, rows, width)


# -- files and ASE


@pytest.mark.parametrize("suffix", [".extxyz", ".extxyz.gz", ""])
def test_files_keep_them(suffix: str, tmp_path: Path) -> None:
    """The last is a DeePMD folder."""
    items = [with_inputs([0.1 * i, -1.0], [[1.0, i], [2.0, 0.25], [3.0, -7.0]]) for i in range(3)]
    path = tmp_path / f"data{suffix}"
    write_structures(path, items)
    for before, after in zip(items, read_structures(path), strict=True):
        for name, value in structure_inputs(before).items():
            assert torch.equal(structure_inputs(after)[name], value)
        assert "fparam" not in after.info


def test_a_single_number_in_the_comment_line(tmp_path: Path) -> None:
    path = tmp_path / "one.extxyz"
    path.write_text("1\nProperties=species:S:1:pos:R:3:aparam:R:1 fparam=300 energy=1.0\nH 0 0 0 0.5\n")
    (data,) = read_structures(path)
    assert structure_inputs(data)["fparam"].tolist() == [[300.0]]
    assert structure_inputs(data)["aparam"].tolist() == [[0.5]]


def test_text_is_no_parameter(tmp_path: Path) -> None:
    path = tmp_path / "text.extxyz"
    path.write_text("1\nProperties=species:S:1:pos:R:3 fparam=hot\nH 0 0 0\n")
    with pytest.raises(InputError, match=r"text.extxyz: frame 0 .*: fparam is 'hot': expected numbers"):
        read_structures(path)


def test_deepmd_folders_separate_what_has_other_parameters(tmp_path: Path) -> None:
    items = [with_inputs(1.0), with_inputs(), with_inputs([1.0, 2.0]), with_inputs(3.0)]
    write_structures(tmp_path / "systems", items)
    found = [value.tolist() for one in read_structures(tmp_path / "systems") for value in one.system_extras.values()]
    assert sorted(found) == [[1.0], [1.0, 2.0], [3.0]]


def test_ase_atoms_carry_them_in_info_and_arrays() -> None:
    ase = pytest.importorskip("ase")
    atoms = ase.Atoms("OHH", POSITIONS, info={"fparam": 2, "name": "water"})
    atoms.set_array("aparam", np.array([[1, 2], [3, 4], [5, 6]]))
    data = AtomicData.from_ase(atoms)
    assert structure_inputs(data)["fparam"].tolist() == [[2.0]]
    assert structure_inputs(data)["aparam"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert data.info == {"name": "water"}
    back = data.to_ase()
    assert back.info["fparam"].tolist() == [2.0]
    assert back.arrays["aparam"].tolist() == [[1, 2], [3, 4], [5, 6]]
    bare = AtomicData(POSITIONS, [8, 1, 1], **ase_extras(atoms.info, atoms.arrays))
    assert {name: value.tolist() for name, value in structure_inputs(bare).items()} == {
        name: value.tolist() for name, value in structure_inputs(data).items()
    }
    assert ase_extras({}, {}) == {"system_extras": {}, "atom_extras": {}}
    assert atoms.info["fparam"] == 2


def test_take_system_inputs_leaves_the_rest() -> None:
    info = {"fparam": np.array([1, 2]), "other": 3}
    assert take_system_inputs(info)["fparam"].tolist() == [1.0, 2.0]
    assert info == {"other": 3}


# -- spins, and charge and spin state of a system


def with_state(spins: Any = None, charge_spin: Any = None) -> AtomicData:
    system = {} if charge_spin is None else {"charge_spin": charge_spin}
    return AtomicData(POSITIONS, [8, 1, 1], cell=5 * np.eye(3), energy=-1.0, spins=spins, system_extras=system)


SPINS = np.random.default_rng(0).normal(size=(3, 3))


def test_vectors_are_inputs_and_collinear_moments_are_not() -> None:
    found = structure_inputs(with_state(SPINS, [1.0, 2.0]))
    assert found["spin"].tolist() == SPINS.tolist()
    assert found["charge_spin"].tolist() == [[1.0, 2.0]]
    batch = extra_inputs(Batch.from_data_list([with_state(SPINS, [1.0, 2.0]), with_state(2 * SPINS, [3.0, 4.0])]))
    assert batch["spin"].tolist() == np.concatenate([SPINS, 2 * SPINS]).tolist()
    assert batch["charge_spin"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    collinear = with_state([1.0, -1.0, 0.0])
    assert structure_inputs(collinear) == {}
    assert extra_inputs(Batch.from_data_list([collinear])) == {}


def test_structures_without_spins_are_marked_in_a_batch() -> None:
    items = [with_state(SPINS), with_state(), with_state(charge_spin=[0.0, 1.0])]
    fill = missing_inputs(items)
    assert set(fill) == {"spins", "charge_spin"}
    found = extra_inputs(Batch.from_data_list(items, fill))
    assert found["spin"].isnan().any(1).tolist() == [False] * 3 + [True] * 6
    assert found["charge_spin"].isnan().any(1).tolist() == [True, True, False]
    with pytest.raises(InputError, match=r"spin is missing for atom 3, 4, 5, 6, 7, 8: .* as vectors, \(n_atoms, 3\)"):
        complete_input("spin", found["spin"], 9, 3)


@pytest.mark.parametrize("suffix", [".extxyz", ""])
def test_spins_and_states_go_through_files(tmp_path: Path, suffix: str) -> None:
    data = with_state(SPINS, [-1.0, 2.0]).replace(atom_extras={"magnetic_forces": 2 * SPINS})
    write_structures(tmp_path / f"data{suffix}", [data, data])
    for found in read_structures(tmp_path / f"data{suffix}"):
        assert found.spins is not None
        assert found.spins.tolist() == SPINS.tolist()
        assert found.system_extras["charge_spin"].tolist() == [-1.0, 2.0]
        assert found.atom_extras["magnetic_forces"].tolist() == (2 * SPINS).tolist()


def test_deepmd_folders_have_deepmds_names(tmp_path: Path) -> None:
    data = with_state(SPINS, [-1.0, 2.0]).replace(atom_extras={"magnetic_forces": 2 * SPINS})
    write_structures(tmp_path / "data", [data])
    arrays = {path.stem: np.load(path) for path in (tmp_path / "data" / "set.000").glob("*.npy")}
    assert (arrays["spin"].shape, arrays["force_mag"].shape, arrays["charge_spin"].tolist()) == ((1, 9), (1, 9), [[-1.0, 2.0]])
    (tmp_path / "data" / "set.000" / "spin.npy").unlink()
    np.save(tmp_path / "data" / "set.000" / "spin.npy", np.zeros((1, 3)))
    with pytest.raises(InputError, match=r"spin.npy has 3 values a frame, expected 9"):
        read_structures(tmp_path / "data")


def test_a_column_named_spin_is_spins(tmp_path: Path) -> None:
    text = '1\nProperties=species:S:1:pos:R:3:spin:R:3:magmoms:R:1 charge_spin="1 2" pbc="F F F"\nO 0 0 0 0.5 0 -1 7\n'
    (tmp_path / "one.extxyz").write_text(text)
    (found,) = read_structures(tmp_path / "one.extxyz")
    assert found.spins is not None
    assert found.spins.tolist() == [[0.5, 0.0, -1.0]]
    assert found.system_extras["charge_spin"].tolist() == [1.0, 2.0]
    assert "spin" not in found.atom_extras
    # of another shape it is a column like any
    (tmp_path / "two.extxyz").write_text(text.replace("spin:R:3:magmoms:R:1", "spin:R:1:other:R:3"))
    (found,) = read_structures(tmp_path / "two.extxyz")
    assert found.spins is None
    assert found.atom_extras["spin"].tolist() == [0.5]


def test_inputs_of_ase_atoms() -> None:
    arrays = {"initial_magmoms": SPINS, "spin": 2 * SPINS}
    assert ase_extras({}, arrays)["spins"].tolist() == (2 * SPINS).tolist()
    assert ase_extras({}, {"initial_magmoms": SPINS})["spins"].tolist() == SPINS.tolist()
    assert "spins" not in ase_extras({}, {"initial_magmoms": SPINS[:, 0]})
    assert ase_extras({"charge_spin": (1, 2)}, {})["system_extras"]["charge_spin"].tolist() == [1.0, 2.0]
    with pytest.raises(InputError, match="charge_spin is 'singlet': expected numbers"):
        ase_extras({"charge_spin": "singlet"}, {})


def test_spins_go_through_ase() -> None:
    pytest.importorskip("ase")
    data = with_state(SPINS, [-1.0, 2.0])
    back = AtomicData.from_ase(data.to_ase())
    assert back.spins is not None
    assert back.spins.tolist() == SPINS.tolist()
    assert back.system_extras["charge_spin"].tolist() == [-1.0, 2.0]
    atoms = data.to_ase()
    atoms.arrays["spin"] = 3 * SPINS
    again = AtomicData.from_ase(atoms)
    assert again.spins is not None
    assert again.spins.tolist() == (3 * SPINS).tolist()
    assert "spin" not in again.atom_extras
