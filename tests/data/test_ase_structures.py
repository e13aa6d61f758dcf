from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from structure_samples import assert_same, random_structure

from carryall.data import AtomicData, Batch, read_structures, write_structures
from carryall.errors import InputError, MissingDependencyError

ase = pytest.importorskip("ase")


def test_round_trip_through_atoms() -> None:
    rng = np.random.default_rng(0)
    for cell in (True, False):
        data = random_structure(rng, 5, extras=False, cell=cell)
        data = data.replace(stress=data.stress + data.stress.T, atom_extras={"tag": [1, 2, 3, 4, 5]})
        found = AtomicData.from_ase(data.to_ase())
        assert_same(data, found, rtol=1e-14)


def test_bare_atoms_stay_bare() -> None:
    data = AtomicData.from_ase(ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]]))
    assert data.cell is None
    names = ("velocities", "masses", "charges", "spins", "forces", "energy", "stress")
    assert [getattr(data, name) for name in names] == [None] * 7
    assert data.to_ase().calc is None


def test_labels_come_from_current_results_only_and_nothing_is_computed() -> None:
    from ase.build import bulk
    from ase.calculators.emt import EMT

    atoms = bulk("Cu")
    atoms.calc = EMT()
    assert AtomicData.from_ase(atoms).energy is None
    energy = atoms.get_potential_energy()
    assert float(AtomicData.from_ase(atoms).energy) == energy
    stress = AtomicData.from_ase(atoms).stress
    np.testing.assert_allclose(stress.numpy()[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], atoms.get_stress())
    atoms.positions[0] += 0.1
    assert AtomicData.from_ase(atoms).energy is None


def test_label_keys_in_info_come_before_results() -> None:
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = ase.Atoms("H", info={"REF_energy": 2.0})
    atoms.set_array("REF_forces", np.ones((1, 3)))
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=np.zeros((1, 3)))
    data = AtomicData.from_ase(atoms)
    assert float(data.energy) == 2.0
    assert data.forces.tolist() == [[1, 1, 1]]
    assert data.info == {"energy": 1.0}
    assert "REF_energy" in atoms.info
    assert "REF_forces" in atoms.arrays


def test_constraints_become_a_mask_and_back() -> None:
    from ase.constraints import FixAtoms, FixBondLength, FixCartesian

    atoms = ase.Atoms("H3", positions=np.arange(9.0).reshape(3, 3))
    atoms.set_constraint([FixAtoms([0]), FixCartesian([2], mask=[False, True, False])])
    data = AtomicData.from_ase(atoms)
    assert data.atom_extras["move_mask"].tolist() == [[False] * 3, [True] * 3, [True, False, True]]
    assert_same(data, AtomicData.from_ase(data.to_ase()))
    atoms.set_constraint(FixBondLength(0, 1))
    with pytest.warns(UserWarning, match="constraint FixBondLengths is left out"):
        assert "move_mask" not in AtomicData.from_ase(atoms).atom_extras


def test_batch_from_and_to_ase() -> None:
    images = [ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]]), ase.Atoms("O", cell=np.eye(3), pbc=True)]
    batch = Batch.from_ase(images)
    assert batch.atom_counts == [2, 1]
    assert batch.cell[0].abs().max() == 0
    assert [str(atoms.symbols) for atoms in batch.to_ase()] == ["H2", "O"]
    assert batch.to_ase()[1].pbc.all()


@pytest.mark.parametrize("name", ["a.cif", "POSCAR", "a.traj", "a.db", "a.json", "CONTCAR", "a.traj.gz"])
def test_other_formats_through_ase(tmp_path: Path, name: str) -> None:
    data = AtomicData(
        [[0, 0, 0], [1.5, 1.5, 1.5]], [11, 17], cell=np.diag([3.0, 4.0, 5.0]), forces=np.ones((2, 3)), energy=-2.0
    )
    write_structures(tmp_path / name, [data])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (found,) = read_structures(tmp_path / name)
    torch.testing.assert_close(found.positions, data.positions)
    torch.testing.assert_close(found.cell, data.cell)
    assert found.atomic_numbers.tolist() == [11, 17]
    if "traj" in name or name == "a.db":
        assert float(found.energy) == -2.0
        assert torch.equal(found.forces, data.forces)


def test_index_format_and_errors(tmp_path: Path) -> None:
    structures = [AtomicData([[0, 0, float(i)]], [1]) for i in range(3)]
    write_structures(tmp_path / "a.traj", structures)
    assert [float(one.positions[0, 2]) for one in read_structures(tmp_path / "a.traj", index=slice(1, None))] == [1, 2]
    assert float(read_structures(tmp_path / "a.traj", index=-1)[0].positions[0, 2]) == 2
    with pytest.raises(InputError, match="there is no frame 3"):
        read_structures(tmp_path / "a.traj", index=3)
    (tmp_path / "a.traj").rename(tmp_path / "a.data1")
    assert len(read_structures(tmp_path / "a.data1", format="traj")) == 3
    (tmp_path / "b.cif").write_text("not a cif file")
    with pytest.raises(InputError, match=r"b\.cif: "):
        read_structures(tmp_path / "b.cif")
    (tmp_path / "b.qqq").write_text("nothing")
    with pytest.raises(InputError, match=r"b\.qqq: neither carryall nor ASE knows this kind of file"):
        read_structures(tmp_path / "b.qqq")
    with pytest.raises(InputError, match=r"knows the suffix of .*c\.qqq"):
        write_structures(tmp_path / "c.qqq", structures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.data1", "b.cif", "b.qqq"]


def test_without_ase_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ase", None)
    data = AtomicData([[0, 0, 0]], [1])
    (tmp_path / "a.cif").touch()
    with pytest.raises(MissingDependencyError, match=r"pip install 'carryall\[ase\]'"):
        data.to_ase()
    with pytest.raises(MissingDependencyError, match=r"pip install 'carryall\[ase\]'"):
        read_structures(tmp_path / "a.cif")
    write_structures(tmp_path / "a.xyz", [data])
    assert len(read_structures(tmp_path / "a.xyz")) == 1
