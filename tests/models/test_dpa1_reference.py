"""DPA-1 against outputs of deepmd-kit 3.2.0, both of its routes (made by scripts/make_dpa1_reference.py)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from dpa1_reference import (
    FOLDER,
    METHODS,
    MODELS,
    NAMES,
    NEAR_CUTOFF,
    allowed,
    answers,
    effects,
    is_float32,
    reference,
    source,
    structure,
    systems,
)

from carryall.models.dpa1.config import DescriptorConfig, FittingConfig
from carryall.package.from_source import load_model
from carryall.training.samples import make_samples
from carryall.training.statistics import environment_statistics

CASES = [(model, route) for model in MODELS for route in sorted({key[1] for key in reference(model)} & set(METHODS))]
BOTH = [model for model in MODELS if (model, "dense") in CASES and (model, "graph") in CASES]
DIFFERING = [model for model in BOTH if effects(model)]
AGREEING = [model for model in BOTH if not effects(model)]
# deepmd-kit's own: with the fitting net in float64, deepmd.pt_expt stops at a descriptor of float32
WITHOUT_GRAPH = {"float32_descriptor"}
# names of one function, and options that deepmd-kit keeps but does not read
ALIKE = [
    {"act_gelu", "act_gelu_tf"},
    {"act_linear", "act_none"},
    {"strip_smooth", "v2"},
    {"davg_strip", "davg_v2"},
    {"two_layers", "aparam_as_mask"},
]
# eV per atom by which padding changes the energy: least of a model's largest over its systems, and largest of all
SIZES = {"smooth": (1e-9, 1e-4), "davg": (1e-3, 0.1), "sel": (1e-3, 1.0)}
# eV, of one system; of the first, padding is 2.3e-4 eV in a smooth model, and 5 eV where davg is not zero
PINNED = {
    ("a2_smooth_statzero", "water192"): 2.290e-4,
    ("a0_stat", "water192"): 5.069,
    ("a2_nonsmooth_stat", "cu64_tri"): 0.1008,
    ("a0_bindingsel", "water24"): 0.07967,
    ("sel12_davg", "cu32_tri"): 13.94,
    ("davg_four", "water24"): 1.334,
}


def test_every_model_has_its_answers() -> None:
    assert {path.name.removesuffix("_ref.npz") for path in FOLDER.glob("*_ref.npz")} == set(MODELS)
    assert set(MODELS) - set(BOTH) == WITHOUT_GRAPH
    assert len(BOTH) > 90
    used = {key[0] for model in MODELS for key in reference(model)}
    assert used == set(systems())
    for model, route in CASES:
        kept = {(key[0], key[2]) for key in reference(model) if key[1] == route}
        assert kept == {(key[0], name) for key in reference(model) for name in NAMES}, model


@pytest.mark.parametrize(("part", "config"), [("descriptor", DescriptorConfig), ("fitting", FittingConfig)])
def test_every_option_is_somewhere_not_at_its_default(part: str, config: Any) -> None:
    """But those that take no part in an evaluation, and the exclude_types of the fitting net, which a model has itself."""
    usual = config().model_dump()
    usual["precision"] = "float64"
    missing = set(usual) - {"trainable", "rcond"} - ({"exclude_types"} if part == "fitting" else set())
    for model, name in itertools.product(MODELS, tuple(missing)):
        value = source(model)[part].get(name, usual[name])
        if (tuple(value) if isinstance(value, list) else value) != usual[name]:
            missing.discard(name)
    assert not missing
    assert any(source(model)["atom_exclude_types"] for model in MODELS)
    assert any(source(model)["pair_exclude_types"] for model in MODELS)


def test_no_two_models_have_the_same_answers() -> None:
    """An option without effect would test nothing."""
    seen: dict[bytes, set[str]] = {}
    for model in MODELS:
        energies = [value for key, value in sorted(reference(model).items()) if key[1:] == ("dense", "atom_energy")]
        seen.setdefault(np.concatenate(energies).round(12).tobytes(), set()).add(model)
    assert sorted(map(sorted, (group for group in seen.values() if len(group) > 1))) == sorted(map(sorted, ALIKE))


@pytest.mark.parametrize(("model", "route"), CASES)
def test_equals_deepmd(model: str, route: str) -> None:
    """Energy, forces, virial, per-atom energies and virials of every system."""
    found = answers(model, route)
    expected = {key: value for key, value in reference(model).items() if key[1] == route}
    worst = {
        (system, quantity): np.abs(found[system, quantity].reshape(value.shape) - value).max()
        / allowed(model, route, system, quantity)
        for (system, _, quantity), value in expected.items()
    }
    assert {key: ratio for key, ratio in worst.items() if not ratio <= 1} == {}


@pytest.mark.parametrize("model", AGREEING)
def test_both_semantics_agree(model: str) -> None:
    """Without smooth attention, davg or a binding sel they are the same function: deepmd-kit's as well as ours."""
    for system, quantity in answers(model, "graph"):
        limit = allowed(model, "graph", system, quantity)
        ours = np.abs(answers(model, "dense")[system, quantity] - answers(model, "graph")[system, quantity]).max()
        theirs = np.abs(reference(model)[system, "dense", quantity] - reference(model)[system, "graph", quantity]).max()
        assert ours <= limit, (system, quantity)
        assert theirs <= limit, (system, quantity)


@pytest.mark.parametrize("model", DIFFERING)
def test_semantics_differ_as_in_deepmd(model: str) -> None:
    """By design: not zero, bounded, and the same difference as between deepmd-kit's routes, in every quantity."""
    per_atom = {}
    for system, quantity in answers(model, "graph"):
        theirs = reference(model)[system, "dense", quantity] - reference(model)[system, "graph", quantity]
        ours = answers(model, "dense")[system, quantity] - answers(model, "graph")[system, quantity]
        limit = max(allowed(model, route, system, quantity) for route in METHODS)
        assert np.abs(ours.reshape(theirs.shape) - theirs).max() <= limit, (system, quantity)
        if quantity == "energy":
            per_atom[system] = float(np.abs(ours).max()) / len(systems()[system][0])
            if (model, system) in PINNED:
                assert float(np.abs(ours).max()) == pytest.approx(PINNED[model, system], rel=1e-3)
    least, most = max(SIZES[effect][0] for effect in effects(model)), max(SIZES[effect][1] for effect in effects(model))
    assert least <= max(per_atom.values()) <= most, per_atom


def test_pinned_differences_are_stored() -> None:
    assert set(PINNED) <= {(model, key[0]) for model in DIFFERING for key in reference(model)}


@pytest.mark.parametrize("quantity", sorted(NEAR_CUTOFF))
def test_the_neighbour_at_the_cutoff_is_why_some_may_be_further_off(quantity: str) -> None:
    """deepmd-kit's own routes differ there by more than rounding, and within what is allowed."""
    both = [reference("a2_nonsmooth_statzero")["cu64_tri", route, quantity] for route in METHODS]
    theirs = np.abs(both[0] - both[1]).max()
    assert 1e-10 * np.abs(both[0]).max() < theirs < NEAR_CUTOFF[quantity]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("a0_stat", ("cu64", "water192")),
        ("a2_smooth_statzero", ("cu64", "water192")),
        ("davg_smooth", ("cu32_tri", "water24")),
        ("davg_excl", ("cu32_tri", "water24")),
        ("davg_four", ("alloy32_four",)),
        ("env_protection", ("cu32_tri", "water24")),
        ("rcut_smth", ("cu32_tri", "water24")),
    ],
)
def test_statistics_equal_deepmd(model: str, names: tuple[str, ...]) -> None:
    """deepmd-kit took the scale of this model's environment rows from some of the systems."""
    loaded = load_model(FOLDER / f"{model}.dp", "graph")
    type_map = tuple(source(model)["type_map"])
    labelled = [structure(systems()[name], type_map).replace(energy=0.0) for name in names]
    davg, dstd = environment_statistics(loaded, make_samples(labelled, 4.5, type_map))  # type: ignore[arg-type]
    stored = loaded.get_submodule("descriptor")
    assert 0.01 < float(stored.get_buffer("dstd").min()) < float(stored.get_buffer("dstd").max()) < 0.3
    assert torch.allclose(dstd, stored.get_buffer("dstd"), rtol=1e-10, atol=0)
    if not source(model)["descriptor"]["set_davg_zero"]:
        assert float(stored.get_buffer("davg").abs().max()) > 0.01
        assert torch.allclose(davg, stored.get_buffer("davg"), rtol=1e-10, atol=1e-15)


def test_float32_models_are_few() -> None:
    """They are held to less, so they must not be what most are."""
    assert {model for model in MODELS if is_float32(model)} == {
        "float32", "float32_descriptor", "float32_fitting", "float32_strip",
    }  # fmt: skip
