from __future__ import annotations

import numpy as np
import pytest

from carryall.data import MASSES, SYMBOLS, atomic_number, symbol_of, units
from carryall.errors import InputError


def test_symbols_and_numbers_are_inverse() -> None:
    assert len(SYMBOLS) == 119
    assert [atomic_number(symbol_of(z)) for z in range(1, 119)] == list(range(1, 119))
    assert (atomic_number("H"), atomic_number("Cl"), atomic_number("Og"), symbol_of(26)) == (1, 17, 118, "Fe")


@pytest.mark.parametrize(("given", "meant"), [("CL", "'Cl'"), (" he", "'He'"), ("Xx", "'X"), ("h", "'H'")])
def test_unknown_symbol_names_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"perhaps you meant {meant}"):
        atomic_number(given)


@pytest.mark.parametrize("symbol", ["X", "", "123", None])
def test_no_element(symbol: str) -> None:
    with pytest.raises(InputError, match="not a chemical element"):
        atomic_number(symbol)


@pytest.mark.parametrize("number", [0, -1, 119])
def test_number_out_of_range(number: int) -> None:
    with pytest.raises(InputError, match=f"{number} is not an atomic number"):
        symbol_of(number)


def test_elements_equal_ase() -> None:
    data = pytest.importorskip("ase.data")
    assert list(SYMBOLS) == data.chemical_symbols[:119]
    np.testing.assert_array_equal(MASSES, data.atomic_masses[:119])


def test_masses_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        MASSES[1] = 2.0


def test_units_are_the_known_values() -> None:
    assert units.fs == 0.09822694788464063
    assert units.kB == 8.617330337217213e-05
    assert 1 / units.GPa == pytest.approx(160.21766208, rel=1e-12)
    assert units.Bohr == pytest.approx(0.52917721067, rel=1e-9)


def test_units_equal_ase_to_the_last_bit() -> None:
    ase_units = pytest.importorskip("ase.units")
    names = (
        "eV",
        "Ang",
        "second",
        "fs",
        "kB",
        "Pascal",
        "GPa",
        "bar",
        "Bohr",
        "Hartree",
        "Rydberg",
        "kJ",
        "kcal",
        "mol",
        "Debye",
        "invcm",
    )
    assert {name: getattr(units, name) for name in names} == {name: getattr(ase_units, name) for name in names}
