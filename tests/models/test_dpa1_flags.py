"""Options of DPA-1 that change what its parts are: types, precisions, what is trained, and older forms of the model dict."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from carryall.errors import InputError
from carryall.graph import NeighborGraph, edge_vectors, graph_from_structures
from carryall.models import DPA1, DescriptorConfig, EagerPotential, FittingConfig, model_from_source, model_to_source
from carryall.models.dpa1.econf import electron_configurations
from carryall.models.dpa1.source import set_weight_dtype
from carryall.package.arrays import from_json, to_json
from carryall.package.export import export_model
from structures import CUTOFF, structures

TYPES = ("O", "H")
SMALL: dict[str, Any] = {
    "rcut": CUTOFF, "rcut_smth": 1.0, "sel": (20,),
    "neuron": (4, 8), "axis_neuron": 3, "tebd_dim": 3, "attn": 6, "attn_layer": 1,
}  # fmt: skip


def build(fitting: dict[str, Any] | None = None, types: tuple[str, ...] = TYPES, **options: Any) -> DPA1:
    """A model whose statistics, norms and biases are not those that it starts with."""
    model = DPA1(types, DescriptorConfig(**SMALL | options), FittingConfig(neuron=(6, 6), **fitting or {}), seed=4).eval()
    generator = torch.Generator().manual_seed(7)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        model.descriptor.davg[:, 0] = 0.01
        model.descriptor.dstd.copy_((0.08 + 0.01 * noise(model.descriptor.dstd[:, :1])).expand(-1, 4))
        for name, buffer in [*model.fitting.named_buffers(), ("out_bias", model.out_bias)]:
            if name != "default_fparam":
                buffer.copy_(0.5 + 0.2 * noise(buffer))
        for layer in model.descriptor.attention:
            layer.norm.w += 0.2 * noise(layer.norm.w)
            layer.norm.b += 0.2 * noise(layer.norm.b)
    return model


def graph_for(model: DPA1) -> NeighborGraph:
    graph = graph_from_structures(structures(model.type_map), CUTOFF, model.type_map)
    generator = torch.Generator().manual_seed(1)
    spec = model.spec
    return graph.replace(
        fparam=torch.randn(graph.n_systems, spec.dim_fparam, generator=generator, dtype=torch.float64),
        aparam=torch.randn(graph.n_atoms, spec.dim_aparam, generator=generator, dtype=torch.float64),
    )


def energies(model: DPA1) -> torch.Tensor:
    graph = graph_for(model)
    return model(graph, edge_vectors(graph)).detach()


FLAGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "se_atten_v2": ({"type": "se_atten_v2"}, {}),
    "electron configurations": ({"use_econf_tebd": True}, {}),
    "electron configurations, bias": ({"use_econf_tebd": True, "use_tebd_bias": True, "tebd_dim": 118}, {}),
    "degree 4": ({"lmax": 4}, {}),
    "frozen descriptor": ({"trainable": False}, {}),
    "frozen norms": ({"trainable_ln": False}, {}),
    "frozen layers": ({}, {"trainable": (False, True, False)}),
    "frozen net": ({}, {"trainable": False}),
    "float32": ({"precision": "float32"}, {"precision": "float32"}),
    "float16": ({"precision": "half"}, {"precision": "float16"}),
    "float32 and float64": ({"precision": "single"}, {"precision": "double"}),
    "float64 and float16": ({}, {"precision": "half", "numb_fparam": 1}),
    "all inputs": ({}, {"numb_fparam": 2, "numb_aparam": 1, "dim_case_embd": 2, "default_fparam": (0.1, 0.2), "rcond": 1e-3}),
    "per type": ({}, {"mixed_types": False, "atom_ener": (None, 1.5), "exclude_types": (0,)}),
    "mask": ({}, {"numb_aparam": 2, "use_aparam_as_mask": True}),
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("method", ["graph", "legacy"])
def test_source_round_trip_is_bit_exact(name: str, method: str) -> None:
    descriptor, fitting = FLAGS[name]
    model = build(fitting, **descriptor)
    model = set_weight_dtype(model, torch.float32) if name == "float32" else model
    model.neighbor_graph_method = method  # type: ignore[assignment]
    source = from_json(to_json(model_to_source(model)))
    first = model_from_source(source)
    again = model_from_source(from_json(to_json(model_to_source(first))))
    assert isinstance(first, DPA1)
    assert isinstance(again, DPA1)
    assert first.descriptor.config == model.descriptor.config
    assert first.fitting.config == model.fitting.config
    assert first.spec == model.spec
    assert (first.neighbor_graph_method, "neighbor_graph_method" in source) == (method, method == "legacy")
    assert [p.requires_grad for p in first.parameters()] == [p.requires_grad for p in model.parameters()]
    restored = again.state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(value, restored[key]), key
    assert torch.equal(energies(first), energies(again))
    if not {descriptor.get("precision"), fitting.get("precision")} & {"half", "float16", "single"}:
        assert torch.equal(energies(first), energies(model))  # statistics set by hand need not be on a coarser grid


def test_arrays_are_written_in_the_precision_of_their_part() -> None:
    source = model_to_source(build({"precision": "half", "numb_fparam": 2}, precision="single"))

    def dtypes(tree: Any) -> set[str]:
        if isinstance(tree, dict):
            return set().union(*(dtypes(value) for value in tree.values()))
        if isinstance(tree, list):
            return set().union(*(dtypes(value) for value in tree))
        return {tree.dtype.name} if isinstance(tree, np.ndarray) else set()

    assert dtypes(source["descriptor"]) == {"float32"}  # statistics too: deepmd-kit's graph route takes no other
    biases = source["fitting"]["@variables"].pop("bias_atom_e")
    assert biases.dtype == np.float64
    assert dtypes(source["fitting"]) == {"float16"}
    assert (source["descriptor"]["precision"], source["fitting"]["precision"]) == ("float32", "float16")


# -- kinds of descriptor


def test_se_atten_v2_is_strip_under_another_name() -> None:
    v2 = build(type="se_atten_v2")
    assert (v2.descriptor.config.tebd_input_mode, v2.descriptor.config.smooth_type_embedding) == ("strip", True)
    assert torch.equal(energies(v2), energies(build(tebd_input_mode="strip")))
    source = model_to_source(v2)["descriptor"]
    assert source["type"] == "se_atten_v2"
    assert not {"tebd_input_mode", "smooth_type_embedding", "lmax"} & source.keys()
    assert "embeddings_strip" in source


def test_names_of_deepmd_are_understood() -> None:
    assert DescriptorConfig(type="se_atten", sel=120, ln_eps=None) == DescriptorConfig()  # type: ignore[arg-type]
    assert DescriptorConfig(attn_mask=False, spin=None, compress=None) == DescriptorConfig()  # type: ignore[call-arg]
    assert DescriptorConfig(stripped_type_embedding=True).tebd_input_mode == "strip"  # type: ignore[call-arg]
    assert DescriptorConfig(stripped_type_embedding=False, tebd_input_mode="strip").tebd_input_mode == "concat"  # type: ignore[call-arg]
    assert [DescriptorConfig(precision=name).precision for name in ("double", "Single", "half", "default")] == [
        "float64", "float32", "float16", "default",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask": True}, r"attn_mask = True is not supported \(attention without the diagonal.*: only False"),
        ({"spin": [True]}, "spin = .* is not supported"),
        ({"lmax": 5}, "less than or equal to 4"),
        ({"lmax": 0}, "greater than or equal to 1"),
        ({"type": "se_atten_v2", "tebd_input_mode": "concat"}, "se_atten_v2 has tebd_input_mode = 'strip', got 'concat'"),
        ({"type": "se_atten_v2", "smooth_type_embedding": False}, "se_atten_v2 has smooth_type_embedding = True"),
        ({"precision": "int64"}, "'int64' is not a floating-point type"),
    ],
)
def test_what_is_not_supported_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DescriptorConfig(**options)


@pytest.mark.parametrize(("width", "copies"), [(3, 0), (118, 1), (236, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_type_embedding_of_electron_configurations(width: int, copies: int, bias: bool) -> None:
    embedding = build(use_econf_tebd=True, tebd_dim=width, use_tebd_bias=bias, types=("U", "Cu", "H")).descriptor.type_embedding
    rows = electron_configurations(("U", "Cu", "H"))
    expected = rows @ embedding.layer.w + (embedding.layer.b if bias else 0)
    if copies:
        expected = expected + rows.repeat(1, copies)
    assert (embedding.layer.b is not None) == bias
    assert torch.allclose(embedding(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bad", [2, -1])
def test_types_that_do_not_exist(bad: int) -> None:
    with pytest.raises(InputError, match=f"atom_exclude_types names type {bad}, there are types 0 to 1"):
        DPA1(TYPES, DescriptorConfig(**SMALL), atom_exclude_types=[bad])
    with pytest.raises(InputError, match=f"atom_exclude_types names type {bad}"):
        build({"exclude_types": (bad,)})
    with pytest.raises(InputError, match=f"pair_exclude_types names type {bad}"):
        DPA1(TYPES, DescriptorConfig(**SMALL), pair_exclude_types=[(0, bad)])
    with pytest.raises(InputError, match=f"descriptor.exclude_types names type {bad}"):
        build(exclude_types=((bad, 1),))


def test_electron_configurations_need_elements() -> None:
    with pytest.raises(InputError, match="needs elements in type_map, got 'Xx'"):
        build(use_econf_tebd=True, types=("O", "Xx"))


# -- precision


def test_weights_have_the_dtype_that_computes_their_precision() -> None:
    model = build({"precision": "double"}, precision="half")
    assert {p.dtype for p in model.descriptor.parameters()} == {torch.float32}
    assert {p.dtype for p in model.fitting.parameters()} == {torch.float64}
    assert model.spec.dtype == "float32"
    assert all(torch.equal(p, p.half().float()) for p in model.descriptor.attention[0].in_proj.parameters())
    assert set_weight_dtype(model, torch.float64).spec.dtype == "float64"
    assert model.descriptor.config.precision == model.fitting.config.precision == "float64"


@pytest.mark.parametrize(("precision", "low", "high"), [("float32", 1e-9, 1e-5), ("float16", 1e-5, 2e-2)])
def test_precisions_differ_by_their_rounding(precision: str, low: float, high: float) -> None:
    exact = energies(build())
    coarse = {"precision": precision}
    for model in (build(**coarse), build(coarse), build(coarse, **coarse)):
        found = energies(model)
        assert found.dtype == torch.float64
        assert low < float((found - exact).abs().max()) < high


# -- training


@pytest.mark.parametrize(
    ("flags", "free"),
    [
        ({}, {"descriptor", "norm", "0", "1", "2"}),
        ({"trainable": False}, {"0", "1", "2"}),
        ({"trainable_ln": False}, {"descriptor", "0", "1", "2"}),
        ({"trainable": False, "trainable_ln": True}, {"0", "1", "2"}),
        ({"fitting": {"trainable": False}}, {"descriptor", "norm"}),
        ({"fitting": {"trainable": (False, True, False)}}, {"descriptor", "norm", "1"}),
        ({"fitting": {"trainable": (True, False, True), "mixed_types": False}}, {"descriptor", "norm", "0", "2"}),
    ],
)
def test_what_is_trained(flags: dict[str, Any], free: set[str]) -> None:
    model = build(**flags)
    found: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[3] if name.startswith("fitting") else "norm" if ".norm." in name else "descriptor"
        found.setdefault(part, set()).add(parameter.requires_grad)
    assert found == {part: {part in free} for part in ("descriptor", "norm", "0", "1", "2")}
    source = model_to_source(model)
    assert source["descriptor"]["trainable"] == model.descriptor.config.trainable
    assert source["fitting"]["trainable"] == [str(index) in free for index in range(3)]
    layers = [layer["trainable"] for layer in source["fitting"]["nets"]["networks"][-1]["layers"]]
    assert layers == source["fitting"]["trainable"]


# -- older dicts


def of_version_1(value: Any) -> Any:
    """The dict as the first version of the format had it."""
    if isinstance(value, list):
        return [of_version_1(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: of_version_1(one) for key, one in value.items()}
    dropped = {
        "Layer": ("trainable",),
        "EmbeddingNetwork": ("bias",),
        "TypeEmbedNet": ("use_tebd_bias",),
        "Descriptor": ("use_tebd_bias",),
        "Fitting": ("dim_case_embd", "default_fparam", "use_aparam_as_mask", "atom_ener"),
    }
    kind = found.get("@class")
    if kind in dropped:
        found["@version"] = 1
        for key in dropped[kind]:
            del found[key]
    if kind == "Layer":
        variables = found["@variables"]
        found["@variables"] = {k: v if v is None or k == "w" else v.reshape(1, -1) for k, v in variables.items()}
    if kind == "Fitting":
        del found["@variables"]["case_embd"]
    return found


@pytest.mark.parametrize("options", [{}, {"tebd_input_mode": "strip", "resnet_dt": True}, {"use_econf_tebd": True}])
@pytest.mark.parametrize("fitting", [{}, {"numb_fparam": 2}, {"mixed_types": False}])
@pytest.mark.parametrize("numbered", [True, False])
def test_dicts_of_version_1_are_read(options: dict[str, Any], fitting: dict[str, Any], numbered: bool) -> None:
    """Their type embedding always has a bias; versions of parts may be missing."""
    model = build(fitting, use_tebd_bias=True, **options)
    source = of_version_1(copy.deepcopy(model_to_source(model)))
    if not numbered:
        del source["fitting"]["@version"]
        del source["descriptor"]["embeddings"]["networks"][0]["layers"][0]["@version"]
    if not model.fitting_config.mixed_types:
        del source["fitting"]["mixed_types"]  # DeePMD's default is one net for each type
    again = model_from_source(source)
    assert isinstance(again, DPA1)
    assert again.descriptor.config == model.descriptor.config
    assert torch.equal(energies(again), energies(model))


def test_exclusions_of_the_fitting_net_in_a_dict_are_the_models() -> None:
    """deepmd-kit overwrites them, whatever the dict says."""
    source = model_to_source(build())
    source["fitting"]["exclude_types"] = [1]
    assert torch.equal(energies(model_from_source(source)), energies(build()))  # type: ignore[arg-type]


# -- packed files


def test_flags_can_be_packed(tmp_path: Path) -> None:
    """`export_model` compares the program with the model on graphs of its own before it writes anything."""
    fitting = {"numb_fparam": 1, "numb_aparam": 2, "dim_case_embd": 2, "mixed_types": False, "atom_ener": (None, 1.0)}
    model = build(fitting | {"activation_function": "silut:2.0"}, type="se_atten_v2", use_econf_tebd=True, lmax=3, attn_layer=0)
    assert export_model(model, tmp_path / "model.pte").is_file()


def test_the_blocks_of_the_evaluation_keep_parameters_with_their_atoms() -> None:
    model = build({"numb_fparam": 2, "numb_aparam": 1})
    graph = graph_for(model)
    found = EagerPotential(model)(graph)["atomic_energy"]
    assert torch.allclose(found, energies(model), rtol=0, atol=1e-13)
