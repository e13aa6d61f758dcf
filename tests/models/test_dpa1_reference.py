"""DPA-1 against outputs of deepmd-kit 3.2.0 (made by scripts/make_dpa1_reference.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from carryall import evaluate, load
from carryall.data import AtomicData
from carryall.data.elements import atomic_number
from carryall.package.from_source import load_model
from carryall.training.samples import make_samples
from carryall.training.statistics import environment_statistics

FOLDER = Path(__file__).parents[1] / "reference_data" / "dpa1"
MODELS = sorted(path.stem for path in FOLDER.glob("*.dp"))
NAMES = {
    "energy": "energy",
    "force": "forces",
    "virial": "virial",
    "atom_energy": "atomic_energy",
    "atom_virial": "atomic_virial",
}
# One neighbour sits 5e-5 Å inside the cutoff: without the smooth gate, the cosine divides a vector of 5e-15 by max(|.|, 1e-12)
# and last-bit differences of the geometry grow by nine orders of magnitude, in deepmd-kit's own backends too.
ILL_CONDITIONED = {("a2_nonsmooth", "cu64_tri"): 5e-9}


@pytest.fixture(scope="module")
def systems() -> dict[str, AtomicData]:
    with np.load(FOLDER / "systems.npz") as file:
        found = {}
        for name in sorted({key.split("/")[0] for key in file.files}):
            cell = file[f"{name}/cell"]
            numbers = [atomic_number(("O", "H")[kind]) for kind in file[f"{name}/atype"]]
            found[name] = AtomicData(file[f"{name}/coord"], numbers, cell if cell.size else None)
    return found


def test_the_models_and_systems_are_there(systems: dict[str, AtomicData]) -> None:
    assert MODELS == ["a0", "a0_atomexcl", "a0_pairexcl", "a0_strip", "a2_nonsmooth", "a2_smooth", "a2_smooth_statzero"]
    assert len(systems) == 10


@pytest.mark.parametrize("model", MODELS)
def test_equals_deepmd(model: str, systems: dict[str, AtomicData]) -> None:
    """Errors are relative to the largest value, so that the small forces of a random model count; energies to 1 eV at least."""
    pot = load(FOLDER / f"{model}.dp")
    results = dict(zip(systems, evaluate(pot, list(systems.values()), tuple(NAMES.values())), strict=True))
    with np.load(FOLDER / f"{model}_ref.npz") as file:
        expected = {tuple(key.split("/")): file[key] for key in file.files}
    # the padded route agrees with the graph where attention is off or not smooth
    routes = {"graph"} if model.startswith("a2_smooth") else {"graph", "dense"}
    assert {key[1] for key in expected} == routes
    assert {key[0] for key in expected} == set(systems)
    for (system, route, quantity), value in expected.items():
        found = results[system][NAMES[quantity]].reshape(value.shape)
        absolute = ILL_CONDITIONED.get((model, system))
        tolerance = 1e-10 * max(np.abs(value).max(), 1e-6) if absolute is None else absolute
        assert np.abs(found - value).max() <= tolerance, (system, route, quantity)


@pytest.mark.parametrize("model", ["a2_smooth_statzero"])
def test_statistics_equal_deepmd(model: str, systems: dict[str, AtomicData]) -> None:
    """deepmd-kit took the scale of this model's environment rows from two of the systems."""
    loaded = load_model(FOLDER / f"{model}.dp")
    labelled = [systems[name].replace(energy=0.0) for name in ("cu64", "water192")]
    _, dstd = environment_statistics(loaded, make_samples(labelled, 4.5, ("O", "H")))  # type: ignore[arg-type]
    stored = loaded.get_submodule("descriptor").get_buffer("dstd")
    assert 0.05 < float(stored.min()) < float(stored.max()) < 0.2
    assert torch.allclose(dstd, stored, rtol=1e-10, atol=0)
