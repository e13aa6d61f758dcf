"""Sutton-Chen against lattice sums made here, the paper's lattice constants and the experimental cohesive energies it fits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from carryall import evaluate, load
from carryall.data import AtomicData
from carryall.data.elements import atomic_number
from carryall.errors import InputError
from carryall.models import EagerPotential, SuttonChen, model_from_source, model_to_source
from carryall.models.sutton_chen import METALS
from structures import fcc

# symbol: (n, m, epsilon / eV, c, a / Å) of table 1 of the paper, then the cohesive energy (eV; C. Kittel, Introduction to Solid
# State Physics) that epsilon was fitted to
PAPER = {
    "Ni": (9, 6, 1.5707e-2, 39.432, 3.52, 4.44),
    "Cu": (9, 6, 1.2382e-2, 39.432, 3.61, 3.50),
    "Rh": (12, 6, 4.9371e-3, 144.41, 3.80, 5.75),
    "Pd": (12, 7, 4.1790e-3, 108.27, 3.89, 3.94),
    "Ag": (12, 6, 2.5415e-3, 144.41, 4.09, 2.96),
    "Ir": (14, 6, 2.4489e-3, 334.94, 3.84, 6.93),
    "Pt": (10, 8, 1.9833e-2, 34.408, 3.92, 5.86),
    "Au": (10, 8, 1.2793e-2, 34.408, 4.08, 3.78),
    "Pb": (10, 7, 5.5765e-3, 45.778, 4.95, 2.04),
    "Al": (7, 6, 3.3147e-2, 16.399, 4.05, 3.34),
}


def shells(radius: float) -> np.ndarray:
    """Distances, in lattice constants, of an fcc crystal's atoms from one of them, out to `radius`."""
    n = int(radius) + 2
    half = np.stack(np.meshgrid(*[np.arange(-2 * n, 2 * n + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    half = half[half.sum(1) % 2 == 0]
    distance = np.sqrt((half.astype(float) ** 2).sum(1)) / 2
    return distance[(distance > 0) & (distance <= radius)]


DISTANCES = shells(14.0)


def lattice_sum(power: int, radius: float = 14.0, tail: bool = True) -> float:
    """sum (a / r)^power over an fcc crystal; beyond `radius` an integral over 4 atoms per a^3."""
    inside = float((DISTANCES[radius >= DISTANCES] ** -float(power)).sum())
    return inside + (16 * math.pi * radius ** (3 - power) / (power - 3) if tail else 0.0)


def crystal(symbol: str, a: float) -> AtomicData:
    positions, cell = fcc((1, 1, 1), a=a, jitter=0.0)
    return AtomicData(positions, [atomic_number(symbol)] * 4, cell)


def test_lattice_sums_are_the_published_ones() -> None:
    """L. F. Lennard-Jones and A. E. Ingham's sums in units of the nearest distance: 14.45392 (6) and 12.13188 (12)."""
    assert lattice_sum(6) / 2**3 == pytest.approx(14.45392, abs=2e-5)
    assert lattice_sum(12) / 2**6 == pytest.approx(12.13188, abs=2e-5)


@pytest.mark.parametrize("symbol", PAPER)
def test_parameters_are_the_papers(symbol: str) -> None:
    metal = METALS[symbol]
    assert (metal.n, metal.m, metal.epsilon, metal.c, metal.a) == PAPER[symbol][:5]
    assert set(METALS) == set(PAPER)


@pytest.mark.parametrize("symbol", PAPER)
def test_cohesive_energy(symbol: str) -> None:
    """With a sharp cutoff: exactly the sum within it; to infinity: the experimental value that the paper fits."""
    n, m, epsilon, c, a, cohesive = PAPER[symbol]
    cutoff = 4.3 * a  # between two shells
    pot = EagerPotential(SuttonChen((symbol,), cutoff=cutoff, switch_from=1.0))
    (found,) = evaluate(pot, crystal(symbol, a), ("energy", "forces", "virial"))

    def closed_form(radius: float, tail: bool) -> float:
        return epsilon * (0.5 * lattice_sum(n, radius, tail) - c * math.sqrt(lattice_sum(m, radius, tail)))

    assert float(found["energy"]) / 4 == pytest.approx(closed_form(4.3, False), rel=1e-12)
    assert np.abs(found["forces"]).max() < 1e-10
    assert -closed_form(14.0, True) == pytest.approx(cohesive, rel=1e-4)
    # what a finite cutoff misses
    assert 0 < closed_form(4.3, False) - closed_form(14.0, True) < 0.03 * cohesive


@pytest.mark.parametrize("symbol", PAPER)
def test_lattice_constant(symbol: str) -> None:
    """E(a) is least at the paper's a, where n S_n = c m sqrt(S_m); the potential agrees, less what its cutoff misses."""
    n, m, _, c, a, _ = PAPER[symbol]
    assert n * lattice_sum(n) == pytest.approx(c * m * math.sqrt(lattice_sum(m)), rel=5e-5)
    pot = EagerPotential(SuttonChen((symbol,), cutoff=5.1 * a, switch_from=1.0))
    scales = np.array([0.99, 1.0, 1.01])  # no shell crosses the cutoff
    energies = [float(out["energy"]) for out in evaluate(pot, [crystal(symbol, s * a) for s in scales], ("energy",))]
    curve = np.polynomial.Polynomial.fit(scales, energies, 2)
    (lowest,) = curve.deriv().roots()
    assert lowest == pytest.approx(1.0, abs=0.006)


def test_how_much_the_built_in_cutoff_costs() -> None:
    """8 Å with a smooth end, against the sums to infinity: under 2 % of the cohesive energy of any metal."""
    pot = load("sutton-chen")
    for symbol, (_, _, _, _, a, cohesive) in PAPER.items():
        (found,) = evaluate(pot, crystal(symbol, a), ("energy",))
        assert 0.98 < -float(found["energy"]) / 4 / cohesive < 1, symbol


def test_alloy_parameters_are_mixed() -> None:
    """A dimer of unlike atoms, from the formula with geometric (a, epsilon) and arithmetic (n, m) means."""
    r = 2.9
    pot = EagerPotential(SuttonChen(("Cu", "Au"), cutoff=8.0))
    (found,) = evaluate(pot, AtomicData([[0, 0, 0], [r, 0, 0]], [29, 79]), ("atomic_energy",))
    cu, au = METALS["Cu"], METALS["Au"]
    ratio = math.sqrt(cu.a * au.a) / r
    repulsion = 0.5 * math.sqrt(cu.epsilon * au.epsilon) * ratio ** ((cu.n + au.n) / 2)
    density = ratio ** ((cu.m + au.m) / 2)
    expected = [repulsion - metal.epsilon * metal.c * math.sqrt(density) for metal in (cu, au)]
    assert found["atomic_energy"] == pytest.approx(expected, rel=1e-12)


def test_an_atom_without_neighbours_has_no_energy_and_finite_derivatives() -> None:
    (found,) = evaluate(load("sutton-chen"), AtomicData([[0, 0, 0], [20, 0, 0]], [29, 79]))
    assert float(found["energy"]) == 0
    assert not found["forces"].any()


def test_unknown_metal_and_bad_switch() -> None:
    with pytest.raises(InputError, match=r"no Sutton-Chen parameters for 'Fe'.*known are Ni, Cu"):
        SuttonChen(("Fe",))
    for switch_from in (0.0, 1.1):
        with pytest.raises(InputError, match="switch_from is a fraction"):
            SuttonChen(("Cu",), switch_from=switch_from)


def test_source_round_trip() -> None:
    model = SuttonChen(("Au", "Cu"), cutoff=7.3, switch_from=0.83)
    again = model_from_source(model_to_source(model))
    assert isinstance(again, SuttonChen)
    assert (again.spec, again.switch_from) == (model.spec, model.switch_from)
    assert torch.equal(again.get_buffer("epsilon"), model.get_buffer("epsilon"))
