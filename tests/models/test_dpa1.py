"""DPA-1: the blocked code against one written on the flat pair axis, its source dict, its options."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from dpa1_forms import flat_energy
from pydantic import ValidationError

from carryall import evaluate, load
from carryall.errors import InputError
from carryall.graph import NeighborGraph, edge_vectors, graph_from_structures
from carryall.graph.neighbor_graph import local_types
from carryall.models import DPA1, DescriptorConfig, EagerPotential, FittingConfig, model_from_source, model_to_source
from carryall.models.dpa1.source import set_weight_dtype
from carryall.package.arrays import from_json, to_json
from carryall.package.load import PackedPotential
from structures import CUTOFF, add_ghosts, small_dpa1, structure, structures

TYPES = ("O", "H")


OPTIONS: dict[str, dict[str, Any]] = {
    "smooth": {},
    "not smooth": {"smooth_type_embedding": False},
    "no angle": {"attn_dotr": False},
    "not normalised": {"normalize": False},
    "temperature": {"temperature": 0.7},
    "scaling_factor": {"scaling_factor": 2.5},
    "one side": {"type_one_side": True},
    "no output embedding": {"concat_output_tebd": False},
    "no attention": {"attn_layer": 0},
    "three layers": {"attn_layer": 3, "ln_eps": 1e-2},
    "protection": {"env_protection": 0.05},
    "strip": {"tebd_input_mode": "strip"},
    "strip, not smooth": {"tebd_input_mode": "strip", "smooth_type_embedding": False},
    "degree 2": {"lmax": 2},
    "degree 4, protection, strip": {"lmax": 4, "env_protection": 0.05, "tebd_input_mode": "strip", "attn_layer": 0},
    "electron configurations": {"use_econf_tebd": True},
    "wide axis": {"axis_neuron": 8, "neuron": (4, 4, 8), "resnet_dt": True, "use_tebd_bias": True},
}


def variant(**options: Any) -> DPA1:
    base = small_dpa1()
    config = base.descriptor.config.model_copy(update=options)
    model = DPA1(TYPES, config, FittingConfig(neuron=(6, 6)), seed=9).eval()
    with torch.no_grad():
        model.descriptor.davg[:, 0] = torch.tensor([0.01, -0.02])
        model.descriptor.dstd.copy_(base.descriptor.dstd)
        for layer in model.descriptor.attention:
            layer.norm.w.copy_(torch.linspace(0.7, 1.3, len(layer.norm.w)))
            layer.norm.b.copy_(torch.linspace(-0.2, 0.3, len(layer.norm.b)))
    return model


def graphs() -> dict[str, NeighborGraph]:
    whole = graph_from_structures(structures(TYPES), CUTOFF, TYPES)
    thinned = torch.rand(whole.n_edges, generator=torch.Generator().manual_seed(1)) < 0.8
    return {
        "whole": whole,
        "masked": whole.replace(edge_mask=thinned),
        "ghosts": add_ghosts(graph_from_structures([structure("tilted", TYPES)], CUTOFF, TYPES)),
    }


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["whole", "masked", "ghosts"])
def test_blocked_equals_the_pair_axis(name: str, kind: str) -> None:
    model, graph = variant(**OPTIONS[name]), graphs()[kind]
    vectors = edge_vectors(graph).requires_grad_()
    blocked, flat = model(graph, vectors), flat_energy(model, graph, vectors)
    assert torch.allclose(blocked, flat, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(energy.sum(), vectors)[0] for energy in (blocked, flat)]
    assert float(gradients[0].abs().max()) > 1e-3
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


def test_options_matter() -> None:
    graph = graphs()["whole"]
    energies = [variant(**options)(graph, edge_vectors(graph)).detach() for options in OPTIONS.values()]
    for (i, a), (j, b) in itertools.combinations(enumerate(energies), 2):
        assert not torch.allclose(a, b, rtol=0, atol=1e-6), (list(OPTIONS)[i], list(OPTIONS)[j])


def test_masked_edges_take_part_in_nothing() -> None:
    masked = graphs()["masked"]
    keep = masked.edge_mask
    nonsense = masked.replace(
        edge_neighbor=torch.where(keep, masked.edge_neighbor, masked.edge_center), edge_shift=masked.edge_shift * keep[:, None]
    )
    pot = EagerPotential(small_dpa1())
    a, b = pot(masked, atomic_virial=True), pot(nonsense, atomic_virial=True)  # masked vectors of length zero now
    for key in a:
        assert torch.allclose(a[key], b[key], rtol=0, atol=1e-13), key


def excluding(**options: Any) -> DPA1:
    base = small_dpa1(attn_layer=1)
    source = model_to_source(base)
    source["descriptor"]["exclude_types"] = options.pop("exclude_types", [])
    model = model_from_source({**source, **options})
    assert isinstance(model, DPA1)
    return model


def test_excluded_pairs_do_not_see_each_other() -> None:
    graph = graphs()["whole"]
    types = graph.atom_types
    unlike = types[graph.edge_center] != types[graph.edge_neighbor]
    expected = small_dpa1(attn_layer=1)(graph.replace(edge_mask=~unlike), edge_vectors(graph))
    for options in ({"pair_exclude_types": [[0, 1]]}, {"exclude_types": [[1, 0]]}):
        model = excluding(**options)
        assert torch.allclose(model(graph, edge_vectors(graph)), expected, rtol=0, atol=1e-13)


def test_excluded_atoms_have_no_energy_but_remain_neighbours() -> None:
    graph = graphs()["whole"]
    full, excluded = (
        small_dpa1(attn_layer=1)(graph, edge_vectors(graph)),
        excluding(atom_exclude_types=[1])(graph, edge_vectors(graph)),
    )
    of_one = local_types(graph) == 1
    assert (excluded[of_one] == 0).all()
    assert torch.equal(excluded[~of_one], full[~of_one])


# -- source form


def tree_equal(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            tree_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            tree_equal(x, y, f"{path}/{index}")
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, path
        assert a.shape == b.shape, path
        assert a.tobytes() == b.tobytes(), path
    else:
        assert a == b, path


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_source_round_trip_is_bit_exact(name: str, dtype: torch.dtype) -> None:
    model = set_weight_dtype(variant(**OPTIONS[name]), dtype)
    source = model_to_source(model)
    again = model_from_source(from_json(to_json(source)))
    assert isinstance(again, DPA1)
    assert again.descriptor.config == model.descriptor.config
    assert again.spec == model.spec
    state, restored = model.state_dict(), again.state_dict()
    assert state.keys() == restored.keys()
    for key, value in state.items():
        assert value.dtype == restored[key].dtype
        assert torch.equal(value, restored[key]), key
    tree_equal(from_json(to_json(model_to_source(again))), from_json(to_json(source)))


def damaged(name: str) -> dict[str, Any]:
    source = model_to_source(small_dpa1())
    descriptor, fitting = source["descriptor"], source["fitting"]
    layer = fitting["nets"]["networks"][0]["layers"][0]
    attention = descriptor["attention_layers"]["attention_layers"]
    damage: dict[str, Callable[[], Any]] = {
        "unknown type": lambda: source.update(type="standart"),
        "other descriptor": lambda: descriptor.update(type="se_e2_a"),
        "other fitting": lambda: fitting.update(type="dos"),
        "attention mask": lambda: descriptor.update(attn_mask=True),
        "old spin": lambda: descriptor.update(spin={"use_spin": [True, False]}),
        "compressed": lambda: descriptor.update(compress={"geo_compress": True}),
        "exponential switch": lambda: descriptor["env_mat"].update(use_exp_switch=True),
        "energy forced to zero": lambda: fitting.update(tot_ener_zero=True),
        "shared layers": lambda: fitting.update(layer_name=["a", None, None]),
        "bfloat16": lambda: fitting.update(precision="bfloat16"),
        "integer weights": lambda: descriptor.update(precision="int32"),
        "degree 5": lambda: descriptor.update(lmax=5),
        "unknown option": lambda: descriptor.update(attn_head=2),
        "unknown field": lambda: source.update(hessian=True),
        "unknown class": lambda: layer.update({"@class": "Tensor"}),
        "newer layer": lambda: layer.update({"@version": 3}),
        "newer model": lambda: source.update({"@version": 3}),
        "older model": lambda: source.pop("@version"),
        "missing field": lambda: descriptor.pop("sel"),
        "missing layer": lambda: fitting["nets"]["networks"][0]["layers"].pop(),
        "wrong shape": lambda: layer["@variables"].update(w=layer["@variables"]["w"][:-1]),
        "missing variable": lambda: layer["@variables"].update(b=None),
        "missing statistics": lambda: fitting.update(numb_fparam=2),
        "another activation": lambda: layer.update(activation_function="relu"),
        "another residual": lambda: fitting["nets"]["networks"][0]["layers"][1].update(resnet=False),
        "another attention": lambda: attention[1]["attention_layer"].update(dotr=False),
        "another eps": lambda: attention[0]["attn_layer_norm"].update(eps=1e-3),
        "fewer attention layers": lambda: attention.pop(),
        "one net for two types": lambda: fitting.update(mixed_types=False),
        "too many vacuum energies": lambda: fitting.update(atom_ener=[1.0, 2.0, 3.0]),
        "other semantics": lambda: source.update(neighbor_graph_method="dense"),
        "slots differ": lambda: operator.iadd(descriptor["@variables"]["davg"][0, 3], 1e-3),
    }
    damage[name]()
    return source


DAMAGE = {
    "unknown type": "unknown model type 'standart', perhaps you meant 'standard'",
    "other descriptor": "cannot read a model of descriptor 'se_e2_a'",
    "other fitting": "fitting 'dos'",
    "attention mask": r"descriptor of the model dict: attn_mask = True is not supported \(attention without the diagonal",
    "old spin": "spin = .* is not supported .*: only None",
    "compressed": "compress = .* read the model as it was before 'dp compress'",
    "exponential switch": "use_exp_switch is not supported",
    "energy forced to zero": "fitting of the model dict: tot_ener_zero = True is not supported",
    "shared layers": "layer_name = .* is not supported",
    "bfloat16": "fitting.precision of the model dict: precision 'bfloat16' is not supported",
    "integer weights": "descriptor.precision of the model dict: precision 'int32' is not a floating-point type",
    "degree 5": "descriptor.lmax of the model dict: Input should be less than or equal to 4",
    "unknown option": r"descriptor.attn_head of the model dict: .* \(known: activation_function, ",
    "unknown field": "the model dict has 'hessian', which carryall does not know",
    "unknown class": r"model.fitting.nets.networks\[0\].layers\[0\] is of class 'Tensor'",
    "newer layer": "is a Layer of version 3, carryall reads 1 to 2",
    "newer model": "model is a Model of version 3, carryall reads 2 to 2",
    "older model": "model is a Model of version 1, carryall reads 2 to 2",
    "missing field": "no field 'sel'",
    "missing layer": "has 2 layers where its configuration says 3",
    "wrong shape": "layer variable 'w' has shape",
    "missing variable": "layer variable 'b' is missing",
    "missing statistics": r"layer variable 'w' has shape \(27, 8\), expected \(29, 8\)",
    "another activation": r"fitting.nets\[0\], layer 0: activation_function is 'relu' .* says 'tanh'",
    "another residual": "layer 1: resnet is False",
    "another attention": "attention layer 1: dotr is False",
    "another eps": "attention layer 0: eps is 0.001",
    "fewer attention layers": "has 1 attention layers, descriptor.attn_layer is 2",
    "one net for two types": "fitting.nets holds 1 nets, expected 2: one for each type",
    "too many vacuum energies": "atom_ener has 3 values for 2 types",
    "other semantics": "neighbor_graph_method must be one of graph, legacy, got 'dense'",
    "slots differ": "descriptor.davg differs between neighbour slots",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_source_that_cannot_be_read_says_why(name: str) -> None:
    with pytest.raises(InputError, match=DAMAGE[name]):
        model_from_source(damaged(name))


def test_configuration_refuses_what_makes_no_sense() -> None:
    for values in ({"rcut_smth": 6.0}, {"sel": (0,)}, {"axis_neuron": 101}, {"neuron": ()}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            DescriptorConfig(**values)


def test_unknown_activation_is_named() -> None:
    with pytest.raises(InputError, match="unknown activation_function 'tan', perhaps you meant 'tanh'"):
        DPA1(TYPES, DescriptorConfig(activation_function="tan"))


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = DPA1(TYPES, DescriptorConfig(neuron=(4, 8), axis_neuron=2), seed=3).state_dict()
    torch.manual_seed(2)
    second = DPA1(TYPES, DescriptorConfig(neuron=(4, 8), axis_neuron=2), seed=3).state_dict()
    other = DPA1(TYPES, DescriptorConfig(neuron=(4, 8), axis_neuron=2), seed=4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["fitting.nets.0.0.w"], other["fitting.nets.0.0.w"])


def test_per_atom_virial_by_either_convention(dpa1_pte: Path) -> None:
    two = structure("two_atoms", TYPES)
    for potential in (EagerPotential(small_dpa1()), load(dpa1_pte)):
        whole, half = (
            evaluate(potential, two, ("virial", "atomic_virial"), atomic_virial=how)[0] for how in ("neighbor", "half")
        )
        # each edge joins the same two atoms: halves are alike, though the atoms are not
        assert np.allclose(half["atomic_virial"], half["virial"] / 2, rtol=0, atol=1e-13)
        assert np.abs(whole["atomic_virial"][0] - whole["atomic_virial"][1]).max() > 1e-3
        assert np.allclose(whole["atomic_virial"].sum(0), whole["virial"], rtol=0, atol=1e-13)
        several = structure("tilted", TYPES)
        for how in ("neighbor", "half"):
            found = evaluate(potential, several, ("virial", "atomic_virial"), atomic_virial=how)[0]
            assert np.allclose(found["atomic_virial"].sum(0), found["virial"], rtol=0, atol=1e-12)
    assert isinstance(potential, PackedPotential)
    graph = graph_from_structures([two], CUTOFF, TYPES)
    by_program = potential.evaluate_whole(graph, "half")["atomic_virial"]
    assert torch.allclose(by_program, potential(graph, atomic_virial="half")["atomic_virial"], rtol=0, atol=1e-13)
    with pytest.raises(InputError, match="must be True, False, 'neighbor' or 'half', got 'both'"):
        potential(graph, atomic_virial="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["graph", "legacy"])
def test_per_atom_virial_is_that_of_finite_differences(method: Literal["graph", "legacy"]) -> None:
    """Energies at displaced edge vectors, four points each, summed to both ends by hand."""
    model = small_dpa1(sel=60, method=method)
    graph = graph_from_structures([structure("two_atoms", TYPES), structure("open", TYPES)], CUTOFF, TYPES)
    vectors, step = edge_vectors(graph), 1e-3
    slope = torch.zeros_like(vectors)
    with torch.no_grad():
        for edge, axis in itertools.product(range(graph.n_edges), range(3)):
            for weight, factor in ((8, 1), (-8, -1), (-1, 2), (1, -2)):
                moved = vectors.clone()
                moved[edge, axis] += factor * step
                slope[edge, axis] += weight * model(graph, moved).sum() / (12 * step)
    expected = {how: torch.zeros(graph.n_atoms, 3, 3, dtype=torch.float64) for how in ("neighbor", "half")}
    for edge in range(graph.n_edges):
        term = -torch.outer(slope[edge], vectors[edge])
        center, neighbor = int(graph.edge_center[edge]), int(graph.edge_neighbor[edge])
        expected["neighbor"][neighbor] += term
        expected["half"][neighbor] += term / 2
        expected["half"][center] += term / 2
    for how, value in expected.items():
        found = EagerPotential(model)(graph, atomic_virial=how)["atomic_virial"]  # type: ignore[arg-type]
        assert float(value.abs().max()) > 1e-2
        assert torch.allclose(found, value, rtol=0, atol=1e-8 * float(value.abs().max()))
