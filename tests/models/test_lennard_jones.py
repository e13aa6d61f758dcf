"""Lennard-Jones against ASE's and against the closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from carryall import evaluate, load
from carryall.data import AtomicData
from carryall.data.units import kB
from carryall.errors import InputError
from carryall.models import EagerPotential, LennardJones, model_from_source, model_to_source
from carryall.models.pair import smooth_cutoff
from structures import fcc, geometries

ALL = ("energy", "forces", "virial", "stress", "atomic_energy")


@pytest.mark.parametrize("name", [name for name in geometries() if name not in ("one_atom", "two_far")])
def test_equals_ase(name: str) -> None:
    """ASE's calculator with its sharp cutoff, energies shifted to zero there."""
    ase = pytest.importorskip("ase")
    calculators = pytest.importorskip("ase.calculators.lj")
    positions, cell, pbc = geometries()[name]
    atoms = ase.Atoms(f"Ar{len(positions)}", positions, cell=cell, pbc=(cell is not None) if pbc is None else pbc)
    atoms.calc = calculators.LennardJones(sigma=2.2, epsilon=0.03, rc=5.0, smooth=False)
    pot = EagerPotential(LennardJones(("Ar",), (0.03,), (2.2,), 5.0, "shift"))
    (found,) = evaluate(pot, atoms, ALL if all(atoms.pbc) else tuple(key for key in ALL if key != "stress"))
    expected = {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(),
        "atomic_energy": atoms.get_potential_energies(),
    }
    if all(atoms.pbc):
        expected["stress"] = atoms.get_stress(voigt=False)
        expected["virial"] = -expected["stress"] * atoms.get_volume()
    assert abs(expected["energy"]) > 1e-4
    for key, value in expected.items():
        scale = max(1.0, np.abs(value).max())
        assert np.abs(found[key] - value).max() <= 1e-12 * scale, key


@pytest.mark.parametrize("truncation", ["none", "shift", "switch"])
@pytest.mark.parametrize("r", [2.0, 2.2 * 2 ** (1 / 6), 3.3, 4.6, 4.999])
def test_dimer_closed_form(truncation: str, r: float) -> None:
    epsilon, sigma, cutoff = 0.03, 2.2, 5.0
    pot = EagerPotential(LennardJones(("Ar",), (epsilon,), (sigma,), cutoff, truncation))
    (found,) = evaluate(pot, AtomicData([[0, 0, 0], [0, 0, r]], [18, 18]), ("energy", "forces", "atomic_energy"))

    def form(d: float) -> float:
        return 4 * epsilon * ((sigma / d) ** 12 - (sigma / d) ** 6)

    slope = 4 * epsilon * (-12 * sigma**12 / r**13 + 6 * sigma**6 / r**7)
    energy = form(r)
    if truncation == "shift":
        energy -= form(cutoff)
    elif truncation == "switch" and r > 0.9 * cutoff:
        u = (r - 0.9 * cutoff) / (0.1 * cutoff)
        factor, bend = 1 - u**3 * (6 * u**2 - 15 * u + 10), -30 * u**2 * (1 - u) ** 2 / (0.1 * cutoff)
        energy, slope = energy * factor, slope * factor + energy * bend
    assert float(found["energy"]) == pytest.approx(energy, rel=1e-12, abs=1e-16)
    assert found["atomic_energy"] == pytest.approx([energy / 2] * 2, rel=1e-12)
    assert found["forces"] == pytest.approx(np.array([[0, 0, slope], [0, 0, -slope]]), rel=1e-11, abs=1e-14)


def test_zero_force_at_the_minimum_of_the_well() -> None:
    pot = EagerPotential(LennardJones(("Ar",), (0.03,), (2.2,), 5.0, "none"))
    (found,) = evaluate(pot, AtomicData([[0, 0, 0], [0, 0, 2.2 * 2 ** (1 / 6)]], [18, 18]))
    assert float(found["energy"]) == pytest.approx(-0.03, abs=1e-15)
    assert np.abs(found["forces"]).max() < 1e-14


def test_mixed_pairs_follow_lorentz_and_berthelot() -> None:
    pot = EagerPotential(LennardJones(("Ne", "Ar"), (0.01, 0.04), (2.0, 3.0), 8.0, "none"))
    r = 3.1
    (found,) = evaluate(pot, AtomicData([[0, 0, 0], [r, 0, 0]], [10, 18]), ("energy",))
    assert float(found["energy"]) == pytest.approx(4 * 0.02 * ((2.5 / r) ** 12 - (2.5 / r) ** 6), rel=1e-12)


def test_argon_crystal_has_its_cohesive_energy() -> None:
    """The lattice sums of fcc (12.13188, 14.45392; Kittel, ch. 3): E = -8.610 epsilon at r = 1.0902 sigma, tail included."""
    positions, cell = fcc((1, 1, 1), a=1.0902 * 3.4 * math.sqrt(2), jitter=0.0)
    epsilon = 120 * kB
    wide = EagerPotential(LennardJones(("Ar",), (epsilon,), (3.4,), 30.0, "none"))
    (found,) = evaluate(wide, AtomicData(positions, [18] * 4, cell), ("energy",))
    tail = -8 * math.pi / 3 * math.sqrt(2) / 1.0902**3 * (3.4 / 30.0) ** 3
    assert float(found["energy"]) / 4 / epsilon + tail == pytest.approx(-8.610, abs=5e-4)
    (built_in,) = evaluate(load("lj-argon"), AtomicData(positions, [18] * 4, cell), ("energy", "forces"))
    assert -8.61 < float(built_in["energy"]) / 4 / epsilon < -7.8
    assert np.abs(built_in["forces"]).max() < 1e-12


def test_smooth_cutoff_is_twice_continuous() -> None:
    r = torch.tensor([4.4, 4.5, 4.75, 5.0, 5.1], dtype=torch.float64, requires_grad=True)
    value = smooth_cutoff(r, 4.5, 5.0)
    (first,) = torch.autograd.grad(value.sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    value, first = value.detach(), first.detach()
    assert value.tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]
    for derivative in (first, second):
        assert derivative[[0, 1, 3, 4]].abs().max() < 1e-12
    assert first[2].item() == pytest.approx(-1.875 / 0.5)


def test_bad_parameters_are_named() -> None:
    with pytest.raises(InputError, match="one value for each"):
        LennardJones(("Ar", "Ne"), (0.1,), (3.0, 2.0), 5.0)
    with pytest.raises(InputError, match="truncation must be"):
        LennardJones(("Ar",), (0.1,), (3.0,), 5.0, "smooth")


def test_source_round_trip() -> None:
    model = LennardJones(("Ne", "Ar"), (0.1 / 3, 0.04), (2.0 / 7, 3.0), 8.1, "switch")
    again = model_from_source(model_to_source(model))
    assert isinstance(again, LennardJones)
    assert (again.spec, again.truncation) == (model.spec, model.truncation)
    assert torch.equal(again.epsilon, model.epsilon)
    assert torch.equal(again.sigma, model.sigma)
