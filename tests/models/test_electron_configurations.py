"""Electron configurations: against deepmd-kit's table (scripts/make_econf_reference.py), and against what every one must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from carryall.data import SYMBOLS
from carryall.errors import InputError
from carryall.models.dpa1.econf import SUBSHELLS, electron_configuration, electron_configurations, occupations, orbitals

REFERENCE = Path(__file__).parents[1] / "reference_data" / "electron_configurations.npz"
ELEMENTS = SYMBOLS[1:]


def test_equals_deepmd_for_every_element() -> None:
    with np.load(REFERENCE) as file:
        symbols, occupied, scale = file["symbols"].tolist(), file["occupied"], float(file["scale"])
    assert symbols == list(ELEMENTS)
    signs = np.unpackbits(occupied, axis=1, count=118).astype(float) * 2 - 1
    assert np.array_equal(electron_configurations(ELEMENTS).numpy(), signs * scale)


@pytest.mark.peer
def test_equals_an_installed_deepmd() -> None:
    peer = pytest.importorskip("deepmd.utils.econf_embd").normalized_electronic_configuration_embedding
    assert np.array_equal(electron_configurations(list(peer)).numpy(), np.array(list(peer.values())))


def test_every_electron_is_somewhere_and_no_orbital_has_three() -> None:
    for number, symbol in enumerate(ELEMENTS, 1):
        found = occupations(symbol)
        assert sum(found.values()) == number
        assert all(0 <= electrons <= 2 * orbitals(subshell) for subshell, electrons in found.items())
        assert sum(spin > 0 for spin in electron_configuration(symbol)) == number
    assert sum(2 * orbitals(subshell) for subshell in SUBSHELLS) == 118


@pytest.mark.parametrize(
    ("symbol", "expected"),
    [
        ("Fe", {"3d": 6, "4s": 2}),
        ("Cr", {"3d": 5, "4s": 1}),
        ("Pd", {"4d": 10, "5s": 0}),
        ("Gd", {"4f": 7, "5d": 1, "6s": 2}),
        ("Th", {"5f": 0, "6d": 2, "7s": 2}),
        ("Au", {"4f": 14, "5d": 10, "6s": 1}),
    ],
)
def test_known_ground_states(symbol: str, expected: dict[str, int]) -> None:
    assert {subshell: occupations(symbol)[subshell] for subshell in expected} == expected


def test_elements_differ_and_rows_have_length_one() -> None:
    table = electron_configurations(ELEMENTS)
    assert len(torch.unique(table, dim=0)) == 118
    assert torch.allclose(table.square().sum(1), torch.ones(118, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_type_that_is_no_element() -> None:
    with pytest.raises(InputError, match="use_econf_tebd needs elements in type_map, got 'Hw'"):
        electron_configurations(("O", "Hw"))
