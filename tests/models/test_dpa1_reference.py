"""DPA-1 against outputs of deepmd-kit 3.2.0, both of its routes (made by scripts/make_dpa1_reference.py)."""

from __future__ import annotations

from typing import Any

import pytest
from dpa1_reference import (
    FOLDER,
    METHODS,
    MODELS,
    NAMES,
    answers,
    disagreement,
    effects,
    reference,
    source,
    systems,
)

from carryall.models.dpa1.config import DescriptorConfig, FittingConfig

CASES = [(model, route) for model in MODELS for route in sorted({key[1] for key in reference(model)} & set(METHODS))]
BOTH = [model for model in MODELS if (model, "dense") in CASES and (model, "graph") in CASES]
DIFFERING = [model for model in BOTH if effects(model)]
AGREEING = [model for model in BOTH if not effects(model)]
# deepmd-kit's own: with the fitting net in float64, deepmd.pt_expt stops at a descriptor of float32
WITHOUT_GRAPH = {"float32_descriptor"}


def test_every_model_has_its_answers() -> None:
    assert {path.name.removesuffix("_ref.npz") for path in FOLDER.glob("*_ref.npz")} == set(MODELS)
    assert set(MODELS) - set(BOTH) == WITHOUT_GRAPH
    assert len(BOTH) > 90
    used = {key[0] for model in MODELS for key in reference(model)}
    assert used == set(systems())
    for model, route in CASES:
        found = reference(model)
        assert {key[2] for key in found if key[1] == route} == set(NAMES), model


@pytest.mark.parametrize(("part", "config"), [("descriptor", DescriptorConfig), ("fitting", FittingConfig)])
def test_every_option_is_somewhere_not_at_its_default(part: str, config: Any) -> None:
    """`trainable` and `rcond` take no part in an evaluation; deepmd-kit has no other kinds of `spin` and the like."""
    usual = config().model_dump()
    missing = set(usual) - {"trainable", "rcond"}
    for model in MODELS:
        for name in tuple(missing):
            value = source(model)[part].get(name, usual[name])
            value = tuple(value) if isinstance(value, list) else value
            if value not in (usual[name], "float64" if name == "precision" else usual[name]):
                missing.discard(name)
    # the exclusion of types is the model's in a whole model's dict
    assert missing <= {"exclude_types"}
    assert any(source(model)["atom_exclude_types"] for model in MODELS)
    assert any(source(model)["pair_exclude_types"] for model in MODELS)


@pytest.mark.parametrize(("model", "route"), CASES)
def test_equals_deepmd(model: str, route: str) -> None:
    """Energy, forces, virial, per-atom energies and virials of every system."""
    found = answers(model, route)
    expected = {key: value for key, value in reference(model).items() if key[1] == route}
    assert expected
    worst = {
        (system, quantity): disagreement(model, system, quantity, found[system, quantity], value)
        for (system, _, quantity), value in expected.items()
    }
    assert not {key: ratio for key, ratio in worst.items() if not ratio <= 1}
