"""The screened nuclear repulsion against LAMMPS, its formula, and as a table."""

from __future__ import annotations

from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch

from carryall.data.elements import atomic_number
from carryall.data.units import Bohr, Hartree
from carryall.errors import InputError
from carryall.models import model_from_source, model_to_source
from carryall.models.pair_table import PairTable
from carryall.models.zbl import ZBL, write_zbl_table

# dE/dr of `pair_style zbl 3.0 4.0` (LAMMPS 2025, units metal), eV/Å
LAMMPS = {
    ("O", "H", 0.3): -694.8664216596159,
    ("O", "H", 0.9): -22.533314718343288,
    ("Cu", "Au", 0.5): -19511.954290139623,
    ("Cu", "Cu", 1.5): -71.99366268935805,
    ("H", "H", 0.7): -9.597204432046324,
    ("U", "C", 1.0): -358.0455567198135,
}
LAMMPS_COULOMB = 14.399645  # eV Å


def pair(model: ZBL, a: str, b: str, distance: torch.Tensor) -> torch.Tensor:
    index = model.type_map.index(a) * len(model.type_map) + model.type_map.index(b)
    return model.pair_energy(distance, torch.full(distance.shape, index))


@pytest.mark.parametrize(("a", "b", "r"), LAMMPS)
def test_forces_equal_lammps(a: str, b: str, r: float) -> None:
    distance = torch.tensor([r], dtype=torch.float64, requires_grad=True)
    energy = pair(ZBL(tuple(dict.fromkeys((a, b))), 3.0, 4.0), a, b, distance)
    (slope,) = torch.autograd.grad([energy.sum()], [distance])
    assert float(slope) * LAMMPS_COULOMB / (Hartree * Bohr) == pytest.approx(LAMMPS[a, b, r], rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [("H", "H"), ("O", "H"), ("Au", "Cu")])
def test_energies_are_the_formulas(a: str, b: str) -> None:
    model = ZBL(tuple(dict.fromkeys((a, b))), 2.0, 3.0)
    za, zb = atomic_number(a), atomic_number(b)
    for r in (0.05, 0.4, 1.3, 1.999):
        x = r * (za**0.23 + zb**0.23) / 0.46850
        phi = 0.18175 * exp(-3.19980 * x) + 0.50986 * exp(-0.94229 * x) + 0.28022 * exp(-0.40290 * x)
        phi += 0.02817 * exp(-0.20162 * x)
        found = pair(model, a, b, torch.tensor([r], dtype=torch.float64))
        assert float(found) == pytest.approx(14.39964535 * za * zb / r * phi, rel=1e-9)


def test_the_screening_is_one_at_the_nucleus() -> None:
    """Bare nuclei at short distance: the four weights add up to 1."""
    found = pair(ZBL(("C",)), "C", "C", torch.tensor([1e-9], dtype=torch.float64))
    assert float(found) * 1e-9 / 36 == pytest.approx(Hartree * Bohr, rel=1e-7)


def test_the_switch_has_two_continuous_derivatives() -> None:
    model = ZBL(("Cu", "Au"), 1.0, 2.0)
    for end in (1.0, 2.0):
        distance = torch.tensor([end - 1e-6, end + 1e-6], dtype=torch.float64, requires_grad=True)
        energy = pair(model, "Cu", "Au", distance)
        (slope,) = torch.autograd.grad([energy.sum()], [distance], create_graph=True)
        (curvature,) = torch.autograd.grad([slope.sum()], [distance])
        # the third derivative has a step of 60 E: 2e-6 apart, less than a thousandth is due to it
        for value in (energy, slope, curvature):
            below, above = value.tolist()
            assert abs(above - below) < 1e-3 * max(1.0, abs(below))
    assert pair(model, "Cu", "Au", torch.tensor([2.0, 2.5], dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_as_a_table(tmp_path: Path) -> None:
    model = ZBL(("O", "H"), 1.0, 2.0)
    table = PairTable.from_file(write_zbl_table(tmp_path / "zbl.txt", ["O", "H"], 1.0, 2.0), ["O", "H"], 6.0)
    assert table.table.rmin == pytest.approx(0.001)
    distance = torch.linspace(0.02, 1.9, 4001, dtype=torch.float64)
    for index in range(4):
        exact = model.pair_energy(distance, torch.full((4001,), index))
        found = table.pair_energy(distance, torch.full((4001,), index))
        assert float(((found - exact) / exact).abs().max()) < 1e-6
    assert table.pair_energy(torch.tensor([2.0, 5.0], dtype=torch.float64), torch.tensor([0, 0])).tolist() == [0.0, 0.0]


def test_a_table_whose_spacing_does_not_divide_the_cutoff(tmp_path: Path) -> None:
    path = write_zbl_table(tmp_path / "zbl.txt", ["Cu"], 0.8, 1.0, spacing=0.03)
    rows = np.loadtxt(path)
    assert len(rows) == 34
    assert rows[-1].tolist() == pytest.approx([1.02, 0.0])


def test_the_source_dict_gives_the_model_back() -> None:
    model = model_from_source(model_to_source(ZBL(("Cu", "Au"), 0.7, 1.9)))
    assert isinstance(model, ZBL)
    assert (model.type_map, model.inner, model.outer) == (("Cu", "Au"), 0.7, 1.9)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 < inner < outer"):
        ZBL(("Cu",), 2.0, 2.0)
    with pytest.raises(InputError, match="'CU' is not a chemical element"):
        ZBL(("CU",))
    with pytest.raises(InputError, match="spacing must be positive and much smaller than outer"):
        write_zbl_table(tmp_path / "zbl.txt", ["Cu"], spacing=0.5)
