"""Spin models against outputs of deepmd-kit 3.2.0, both of its routes (made by scripts/make_spin_reference.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from spin_reference import (
    FOLDER,
    MARGINS,
    MODELS,
    NAMES,
    answers,
    evaluate_together,
    potential,
    reference,
    systems,
    worst_error,
)

from carryall import load
from carryall.errors import SemanticsWarning
from carryall.models import model_from_source, model_to_source
from carryall.package.sources import read_source

CASES = [(model, route) for model in MODELS for route in sorted({key[1] for key in reference(model)} & set(MARGINS))]
# no padding in their numbers: davg is zero, and attention is not there or does not fade
WITHOUT_PADDING = ("no_attention", "second_rough")


def test_the_margin_is_that_of_the_files() -> None:
    largest = 0.0
    for model in MODELS:
        spin = read_source(FOLDER / f"{model}.dp")["spin"]
        scale = np.array(spin["virtual_scale"]) * spin["use_spin"]
        largest = max(largest, *(np.linalg.norm(s * scale[t][:, None], axis=1).max() for (_, t, _), s in systems().values()))
    assert 1.0 < 2 * largest < MARGINS["whole"]
    assert len(MODELS) == 10
    assert sum(route == "whole" for _, route in CASES) == 9


@pytest.mark.parametrize(("model", "route"), CASES)
def test_equals_deepmd(model: str, route: str) -> None:
    errors = worst_error(answers(model, route), reference(model), route)
    assert len(errors) == len(NAMES) * len(systems()) == 30
    assert {key: value for key, value in errors.items() if not value <= 1e-10} == {}


@pytest.mark.parametrize("model", MODELS)
def test_graph_semantics_are_the_same_where_there_is_no_padding(model: str) -> None:
    errors = worst_error(answers(model, "lower", "graph"), reference(model), "lower")
    if model in WITHOUT_PADDING:
        assert max(errors.values()) <= 1e-10
    else:
        assert max(errors.values()) > 1e-8


@pytest.mark.parametrize("model", [model for model, route in CASES if route == "whole"])
def test_the_routes_differ_as_the_margin_says(model: str) -> None:
    """deepmd-kit's own two routes: by 1e-6 to 1e-2 eV for 32 atoms."""
    of_routes = [reference(model)["cu32_tri", route, "energy"][0] for route in ("lower", "whole")]
    assert 1e-6 < abs(of_routes[1] - of_routes[0]) < 0.1


@pytest.mark.parametrize("model", ["both", "parameters"])
def test_the_dict_is_written_as_it_was_read(model: str) -> None:
    source = read_source(FOLDER / f"{model}.dp")
    written = model_to_source(model_from_source(source))
    assert written.keys() == source.keys()
    assert written["spin"] == source["spin"]
    assert written["backbone_model"].keys() >= source["backbone_model"].keys() - {"neighbor_graph_method"}
    system = {"two_pbc": systems()["two_pbc"]}
    inputs = {"two_pbc": {key[2]: v for key, v in reference(model).items() if key[:2] == ("two_pbc", "input")}}
    a, b = (evaluate_together(potential(one, "legacy", 0.0), system, inputs) for one in (source, written))
    assert all(np.array_equal(a[key], b[key]) for key in a)


def test_loading_says_that_semantics_differ(tmp_path: Path) -> None:
    with pytest.warns(SemanticsWarning, match="neighbor_graph_method='legacy' gives their numbers"):
        made = load(FOLDER / "davg.dp")
    assert made.spec.spin
    assert made.spec.type_map == ("Fe", "O")
