"""Spin models as traced programs: one for graphs of all sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from carryall.graph import NeighborGraph, concatenate, graph_from_structures
from carryall.models import evaluate_model
from carryall.models.spin import SpinModel
from carryall.package.signature import output_names, to_inputs
from carryall.package.trace import trace
from spin_models import TYPES, small_spin
from structures import add_ghosts, geometries, structure

FORMS: dict[str, dict[str, Any]] = {"smooth": {}, "legacy, davg": {"method": "legacy", "davg": 0.2}}


def with_random_spins(graph: NeighborGraph) -> NeighborGraph:
    generator = torch.Generator().manual_seed(graph.n_atoms)
    return graph.replace(spin=torch.randn(graph.n_atoms, 3, generator=generator, dtype=torch.float64))


def export_graphs(model: SpinModel) -> dict[str, NeighborGraph]:
    """Sizes that a program could have specialised on."""
    found = {name: graph_from_structures([structure(name, TYPES)], model.spec.cutoff, TYPES) for name in geometries()}
    found["batch"] = concatenate(list(found.values()))
    found["ghosts"], found["few edges"] = add_ghosts(found["tilted"]), add_ghosts(found["two_atoms"])
    one = found["tilted"]
    none: dict[str, Tensor] = {
        name: getattr(one, name)[:0] for name in ("edge_center", "edge_neighbor", "edge_shift", "edge_mask")
    }
    found["no local atoms"] = one.replace(**none, ptr=one.ptr[:1])
    empty = {name: getattr(one, name)[:0] for name in ("positions", "atom_types", "system", "cell")}
    found["nothing"] = one.replace(**none, **empty, ptr=one.ptr[:1], spin=None)
    return {name: with_random_spins(graph) for name, graph in found.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_traced_program_takes_every_size(form: str) -> None:
    model = small_spin((True, False), **FORMS[form])
    program = trace(model).module()
    for name, graph in export_graphs(model).items():
        expected = evaluate_model(model, graph, atomic_virial=True)
        found = dict(zip(output_names(model.spec), program(*to_inputs(graph, model.spec)), strict=True))
        for key, value in expected.items():
            assert found[key].shape == value.shape, (name, key)
            assert torch.allclose(found[key], value, rtol=1e-12, atol=1e-12), (name, key)
