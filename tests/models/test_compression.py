"""Compressed DPA-1 against the nets that its tables stand for, in every mode, and against its own finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from carryall import load, pack
from carryall.data import AtomicData
from carryall.errors import InputError
from carryall.graph import NeighborGraph, concatenate, graph_from_structures
from carryall.models import DPA1, DescriptorConfig, EagerPotential, FittingConfig, LinearEnergyModel, model_to_source
from carryall.models.dpa1.compression import compress, is_compressed, parts_of
from carryall.models.dpa1.semantics import with_method
from carryall.models.dpa1.source import set_weight_dtype
from carryall.models.dpa1.tabulation import Functions, argument_range
from carryall.models.quintic_table import QuinticTable
from carryall.package.arrays import to_json
from carryall.package.check import check_graphs
from carryall.package.inspect import inspect
from carryall.package.signature import to_inputs
from carryall.package.sources import read_source
from carryall.package.trace import trace
from combined_models import small_bridged, small_sum
from spin_models import TYPES as SPIN_TYPES
from spin_models import small_spin, with_spins
from structures import CUTOFF, add_ghosts, small_lj, structure, structures

TYPES = ("O", "H")
SMALL: dict[str, Any] = {
    "rcut": CUTOFF, "rcut_smth": 1.0, "sel": (20,), "neuron": (4, 8), "axis_neuron": 3, "tebd_dim": 3, "attn": 6,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "two attention layers": {},
    "no attention": {"attn_layer": 0},
    "not smooth": {"smooth_type_embedding": False},
    "one side": {"type_one_side": True, "attn_layer": 1},
    "strip": {"tebd_input_mode": "strip", "attn_layer": 0},
    "strip, one side, not smooth": {"tebd_input_mode": "strip", "type_one_side": True, "smooth_type_embedding": False},
    "se_atten_v2": {"type": "se_atten_v2"},
    "degree 3": {"lmax": 3, "attn_layer": 0},
    "excluded pairs": {"exclude_types": ((0, 1),)},
    "protection": {"env_protection": 0.05, "attn_layer": 0},
    "electron configurations": {"use_econf_tebd": True, "attn_layer": 0},
    "resnet_dt": {"resnet_dt": True, "neuron": (4, 4, 8), "attn_layer": 0},
    "gelu": {"activation_function": "gelu", "attn_layer": 0},
    "silu": {"activation_function": "silu", "attn_layer": 0},
    "linear": {"activation_function": "linear", "attn_layer": 0},
}
METHODS = ("graph", "legacy")


def variant(method: str = "graph", types: tuple[str, ...] = TYPES, **options: Any) -> DPA1:
    """A random model with a mean in its environment rows, so that the range of the tables begins below zero."""
    model = DPA1(types, DescriptorConfig(**SMALL | options), FittingConfig(neuron=(6, 6)), seed=9).eval()
    with torch.no_grad():
        model.descriptor.davg[:, 0] = torch.linspace(0.01, 0.03, len(types))
        model.descriptor.dstd.copy_(torch.linspace(0.06, 0.09, len(types))[:, None].expand(-1, 4))
    return cast(DPA1, with_method(model, method))


def graphs(types: tuple[str, ...] = TYPES) -> dict[str, NeighborGraph]:
    whole = graph_from_structures(structures(types), CUTOFF, types)
    thinned = torch.rand(whole.n_edges, generator=torch.Generator().manual_seed(1)) < 0.8
    ghosts = add_ghosts(graph_from_structures([structure("tilted", types)], CUTOFF, types))
    return {"whole": whole, "masked": whole.replace(edge_mask=thinned), "ghosts": ghosts}


def deviations(first: nn.Module, second: nn.Module, graph: NeighborGraph) -> dict[str, float]:
    """Largest differences of energies and forces."""
    a, b = EagerPotential(first)(graph), EagerPotential(second)(graph)  # type: ignore[arg-type]
    assert float(b["forces"].abs().max()) > 1e-2
    return {key: float((a[key] - b[key]).abs().max()) for key in ("atomic_energy", "forces")}


@pytest.fixture(scope="module")
def plain() -> DPA1:
    return variant(attn_layer=0)


@pytest.fixture(scope="module")
def small(plain: DPA1) -> DPA1:
    return cast(DPA1, compress(plain)[0])


# -- against the nets


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_energies_and_forces_are_those_of_the_nets(name: str, method: str) -> None:
    model = variant(method, **OPTIONS[name])
    compressed, facts = compress(model, tolerance=1e-9)
    assert facts["compression_error_derivative"] <= 1e-9
    for kind, graph in graphs().items():
        off = deviations(compressed, model, graph)
        assert off["atomic_energy"] < 1e-9, kind
        assert off["forces"] < 2e-8, kind


def test_tolerance_decides_the_error() -> None:
    model, graph = variant(), graphs()["whole"]
    forces = [deviations(compress(model, tolerance=t)[0], model, graph)["forces"] for t in (1e-3, 1e-6, 1e-10)]
    assert forces[0] > 1e-6
    assert forces[0] > 30 * forces[1] > 900 * forces[2]


@pytest.mark.parametrize("options", [{}, {"type_one_side": True}, {"tebd_input_mode": "strip"}], ids=str)
def test_stated_errors_bound_those_at_other_places(options: dict[str, Any]) -> None:
    model = variant(types=("O", "H", "C"), **options)
    compressed, facts = compress(model, tolerance=1e-7)
    descriptor = cast(DPA1, compressed).descriptor
    functions, table = Functions.of(model.descriptor), descriptor.get_submodule("compressed.table")
    assert functions.n_functions == facts["compression_tables"] == {"{}": 9, "{'type_one_side': True}": 3}.get(str(options), 1)
    places = torch.rand(4000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low, high = facts["compression_argument_lowest"], facts["compression_argument_highest"]
    x = low + (high - low) * places**3
    worst = torch.zeros(2, dtype=torch.float64)
    for k in range(functions.n_functions):
        value, slope, _ = functions.at(x, k)
        which = torch.full(x.shape, k)
        found = table.value_and_slope(which, x)  # type: ignore[operator]
        off = torch.stack([(found[0] - value).abs().max(), (found[1] - slope).abs().max()])
        worst = torch.maximum(worst, off.detach())
    stated = torch.tensor([facts["compression_error_value_absolute"], facts["compression_error_derivative_absolute"]])
    assert (worst <= 1.05 * stated).all()
    assert (worst >= 0.3 * stated).all()


def test_range_reaches_from_the_cutoff_to_the_shortest_distance() -> None:
    model = variant()
    lowest, ordinary, highest = argument_range(model.descriptor, 0.25)
    mean, std = model.descriptor.davg[:, 0], model.descriptor.dstd[:, 0]
    assert lowest == float((-mean / std).min()) < 0
    assert highest == float(((4 - mean) / std).max())
    assert ordinary == float(((1 - mean) / std).min())
    _, facts = compress(model, shortest_distance=0.25)
    assert (facts["compression_argument_lowest"], facts["compression_argument_highest"]) == (lowest, highest)
    assert facts["compression_shortest_distance"] == 0.25
    shifted = variant()
    shifted.descriptor.davg[:, 0] = -0.1  # then a masked edge, whose argument is 0, lies below all others
    assert argument_range(shifted.descriptor, 0.25)[0] == 0.0
    protected = variant(env_protection=0.5)
    assert argument_range(protected.descriptor, 0.5)[2] == float(((1 - mean) / std).max())


# -- its own derivatives


@pytest.mark.parametrize("method", METHODS)
def test_forces_are_finite_differences_of_the_compressed_model(method: str) -> None:
    model, _ = compress(variant(method, attn_layer=1), tolerance=1e-3)  # far from the net: nothing but its own will do
    data = structure("tilted", TYPES)

    def evaluate(positions: Tensor) -> dict[str, Tensor]:
        graph = graph_from_structures([AtomicData(positions.numpy(), data.atomic_numbers, data.cell, data.pbc)], CUTOFF, TYPES)
        return EagerPotential(model)(graph)  # type: ignore[arg-type]

    positions, step = torch.as_tensor(data.positions).clone(), 1e-5
    forces = evaluate(positions)["forces"]
    for atom, axis in ((0, 0), (3, 1), (5, 2)):
        energies = []
        for sign in (1, -1):
            moved = positions.clone()
            moved[atom, axis] += sign * step
            energies.append(evaluate(moved)["energy"])
        assert float(-(energies[0] - energies[1]) / (2 * step)) == pytest.approx(float(forces[atom, axis]), abs=1e-8)


def dimer(model: nn.Module, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of a pair at each distance (n,), and its derivative by the distance."""
    pair = graph_from_structures([AtomicData([[0.0, 0, 0], [0.5, 0, 0]], [8, 1])], CUTOFF, TYPES)
    graph = concatenate([pair] * len(distance))
    r = distance.clone().requires_grad_()
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(r))
    vectors = (sign * r.repeat_interleave(2))[:, None] * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    energy = model(graph, vectors).view(-1, 2).sum(1)
    return energy.detach(), torch.autograd.grad(energy.sum(), r)[0]


def test_second_derivatives_are_continuous_at_nodes_and_where_the_table_ends(plain: DPA1) -> None:
    shortest = 0.7
    model = cast(DPA1, compress(plain, tolerance=1e-4, shortest_distance=shortest)[0])
    nodes = cast(QuinticTable, model.descriptor.get_submodule("compressed.table")).grid.nodes()
    distance = 1 / (plain.descriptor.davg[0, 0] + plain.descriptor.dstd[0, 0] * nodes)
    distance = distance[(distance < 1.0) & (distance > shortest / 1.01)]  # the switch begins at 1 Å
    assert len(distance) > 3
    step = 1e-4
    slopes = [dimer(model, distance + k * step)[1] for k in (-2, -1, 0, 1, 2)]
    left = (3 * slopes[2] - 4 * slopes[1] + slopes[0]) / (2 * step)
    right = (-3 * slopes[2] + 4 * slopes[3] - slopes[4]) / (2 * step)
    assert torch.allclose(left, right, rtol=1e-4, atol=1e-5)


def test_closer_than_the_table_reaches(plain: DPA1, small: DPA1) -> None:
    closer = torch.tensor([0.3, 0.1, 0.01, 1e-3, 1e-7], dtype=torch.float64)
    assert torch.allclose(dimer(small, closer)[0], dimer(plain, closer)[0], rtol=1e-9, atol=0)
    straight = variant(attn_layer=0, activation_function="gelu")
    model, facts = compress(straight)
    assert facts["compression_shortest_distance"] == 0.1
    closer = torch.tensor([0.099, 0.05, 0.02], dtype=torch.float64)
    assert torch.allclose(dimer(model, closer)[0], dimer(straight, closer)[0], rtol=1e-3, atol=0)
    short = cast(DPA1, compress(plain, shortest_distance=0.7)[0])
    closer, expected = torch.tensor([0.65, 0.5], dtype=torch.float64), dimer(plain, torch.tensor([0.65, 0.5]).double())[0]
    assert torch.allclose(dimer(short, closer)[0], expected, rtol=0.05, atol=0)
    assert not torch.allclose(dimer(short, closer)[0], expected, rtol=1e-6, atol=0)


def test_the_cutoff_is_as_smooth_as_with_the_net(plain: DPA1, small: DPA1) -> None:
    distance = CUTOFF - torch.tensor([1e-1, 1e-2, 1e-4, 1e-8, 0.0, -0.5], dtype=torch.float64)
    for found, expected in zip(dimer(small, distance), dimer(plain, distance), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-7)


# -- precision, combinations, flags


@pytest.mark.parametrize("options", [{}, {"tebd_input_mode": "strip", "attn_layer": 0}], ids=str)
def test_single_precision(options: dict[str, Any]) -> None:
    model = set_weight_dtype(variant(**options), torch.float32)
    compressed, facts = compress(model)
    assert {buffer.dtype for name, buffer in compressed.named_buffers() if "compressed" in name} == {torch.float32}
    assert facts["compression_tolerance"] == 2e-5
    off = deviations(compressed, model, graphs()["whole"])
    assert off["atomic_energy"] < 2e-6
    assert off["forces"] < 1e-4


def test_dtype_is_chosen_before_compression(small: DPA1) -> None:
    again = cast(DPA1, compress(variant(attn_layer=0))[0])
    set_weight_dtype(again, torch.float32)
    with pytest.raises(InputError, match=r"are torch.float64, its weights torch.float32: change the dtype"):
        EagerPotential(again)(graphs()["whole"])


@pytest.mark.parametrize("make", [small_bridged, small_sum])
def test_inside_combinations(make: Callable[[], nn.Module]) -> None:
    model = make()
    compressed, facts = compress(model)
    assert facts["compression_tables"] == 4
    assert is_compressed(compressed)
    off = deviations(compressed, model, graphs()["whole"])
    assert 0 < off["forces"] < 1e-7


@pytest.mark.parametrize("options", [{}, {"method": "legacy", "davg": 0.2}, {"attn_layer": 0}], ids=str)
def test_inside_spin_models(options: dict[str, Any]) -> None:
    model = small_spin(**options)
    compressed, facts = compress(model)
    assert facts["compression_tables"] == (2 * len(model.type_map)) ** 2  # virtual atoms have types of their own
    for length in (1.2, 1e-2):  # virtual atoms near their own
        data = [with_spins(structure(name, SPIN_TYPES), length=length) for name in ("periodic", "open")]
        graph = graph_from_structures(data, model.spec.cutoff, SPIN_TYPES)
        found, expected = EagerPotential(compressed)(graph), EagerPotential(model)(graph)  # type: ignore[arg-type]
        for key in ("atomic_energy", "forces", "magnetic_forces"):
            scale = float(expected[key].abs().max().clamp_min(1.0))
            assert float((found[key] - expected[key]).abs().max()) < 1e-6 * scale, (length, key)


def test_several_models_have_the_facts_of_the_worst() -> None:
    first, second = variant(attn_layer=0), variant(attn_layer=0, tebd_input_mode="strip")
    second.descriptor.davg[:, 0] = 0.04
    alone = [compress(one)[1] for one in (first, second)]
    compressed, facts = compress(LinearEnergyModel([first, second]))
    assert all(part.descriptor.compressed is not None for part in parts_of(compressed))
    for name in ("compression_bytes", "compression_tables"):
        assert facts[name] == alone[0][name] + alone[1][name]
    for name in (
        "compression_error_value",
        "compression_error_derivative",
        "compression_nodes",
        "compression_argument_highest",
    ):
        assert facts[name] == max(one[name] for one in alone)
    assert facts["compression_argument_lowest"] == min(one["compression_argument_lowest"] for one in alone)


def test_semantics_can_be_changed_after(plain: DPA1) -> None:
    graph = graphs()["ghosts"]
    compressed = cast(DPA1, compress(plain)[0])
    assert compressed.neighbor_graph_method == "graph"
    assert compressed.spec == plain.spec
    other, expected = with_method(compressed, "legacy"), variant("legacy", attn_layer=0)
    assert deviations(other, expected, graph)["atomic_energy"] < 1e-8
    assert deviations(plain, expected, graph)["atomic_energy"] > 1e-4
    assert cast(DPA1, compress(expected)[0]).neighbor_graph_method == "legacy"


def test_a_copy_that_knows_its_source() -> None:
    model = variant()
    before = to_json(model_to_source(model))
    energy = EagerPotential(model)(graphs()["whole"])["energy"]
    compressed, _ = compress(model)
    assert to_json(model_to_source(model)) == before
    assert torch.equal(EagerPotential(model)(graphs()["whole"])["energy"], energy)
    assert not is_compressed(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in compressed.parameters())
    assert to_json(model_to_source(compressed)) == before


def test_facts_are_flat_and_true(plain: DPA1, small: DPA1) -> None:
    facts = compress(plain)[1]
    assert set(facts) == {
        "compressed", "compression_tolerance", "compression_error_value", "compression_error_derivative",
        "compression_error_value_absolute", "compression_error_derivative_absolute", "compression_tables",
        "compression_nodes", "compression_argument_lowest", "compression_argument_highest", "compression_bytes",
        "compression_shortest_distance",
    }  # fmt: skip
    assert facts["compressed"] is True
    assert all(type(value) in (bool, int, float) for value in facts.values())
    rows = small.descriptor.get_buffer("compressed.table.rows")
    assert facts["compression_bytes"] == rows.numel() * 8 == facts["compression_nodes"] * 4 * 3 * 8 * 8
    assert (
        0 < facts["compression_error_value"] < facts["compression_error_derivative"] <= facts["compression_tolerance"] == 1e-8
    )


# -- refusals


def test_nothing_to_compress() -> None:
    with pytest.raises(InputError, match="class LennardJones has nothing to compress: only the embedding nets of DPA-1"):
        compress(small_lj())


def test_twice(small: DPA1) -> None:
    with pytest.raises(InputError, match="compressed already: compress the original, which is in the source of its file"):
        compress(small)


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_kinks(name: str) -> None:
    with pytest.raises(InputError, match=rf"cannot be tabulated to 1e-08: .* {name} has kinks, where the slope jumps"):
        compress(variant(activation_function=name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 1e-12}, r"tolerance of a compressed float64 model must be 1e-11 or more.*, got 1e-12"),
        ({"tolerance": float("nan")}, r"tolerance .* must be 1e-11 or more.*, got nan"),
        ({"shortest_distance": 0.0}, r"shortest_distance must be positive \(Å\), got 0.0"),
        (
            {"max_bytes": 10_000},
            "do not fit: tebd_input_mode 'concat' and 2 types need 4, and max_bytes = 10000 leaves 13 nodes",
        ),
        ({"max_bytes": 16_000}, r"to 1e-08: with 20 nodes .* do not fit into max_bytes = 16000: raise one of the two"),
    ],
)
def test_what_cannot_be_met_says_why(plain: DPA1, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compress(plain, **options)  # type: ignore[arg-type]


def test_what_single_precision_cannot_resolve() -> None:
    model = set_weight_dtype(variant(attn_layer=0), torch.float32)
    with pytest.raises(InputError, match="compressed float32 model must be 5e-06 or more"):
        compress(model, tolerance=1e-6)


def test_slow_convergence_is_noticed_soon() -> None:
    with pytest.raises(InputError, match=r"more nodes hardly help .*not smooth enough.*: raise the tolerance"):
        compress(variant(activation_function="silut", attn_layer=0))
    compress(variant(activation_function="silut", attn_layer=0), tolerance=1e-3)


def test_protection_below_zero() -> None:
    with pytest.raises(InputError, match=r"beyond -env_protection = 0.2 Å, got 1e-06"):
        compress(variant(env_protection=-0.2))


def test_weights_that_are_not_finite() -> None:
    model = variant(attn_layer=0)
    with torch.no_grad():
        cast(Tensor, model.descriptor.get_parameter("embedding.0.w"))[0, 0] = torch.nan
    with pytest.raises(InputError, match="its outputs are not finite"):
        compress(model)


# -- the traced program


def test_traced_for_every_size() -> None:
    model = cast(DPA1, compress(variant("legacy", tebd_input_mode="strip", attn_layer=1))[0])
    program = trace(model)
    shapes = {tuple(value.shape) for value in program.state_dict.values()}
    assert tuple(model.descriptor.get_buffer("compressed.table.rows").shape) in shapes
    assert tuple(model.descriptor.get_parameter("embedding.0.w").shape) not in shapes  # what the tables stand for is not there
    run, eager = program.module(), EagerPotential(model)
    for graph in check_graphs(eager.spec):
        energy = run(*to_inputs(graph, eager.spec))[0]
        assert torch.allclose(energy, eager(graph)["energy"], rtol=0, atol=1e-12)
    assert any(graph.n_edges == 0 for graph in check_graphs(eager.spec))


@pytest.mark.compile
def test_packed(plain: DPA1, tmp_path: Path) -> None:
    path = pack(plain, tmp_path / "small.pt2", compress=True)
    packed, graph = load(path), graphs()["ghosts"]
    found, expected = packed(graph), EagerPotential(plain)(graph)
    for key in ("energy", "forces", "virial"):
        assert torch.allclose(found[key], expected[key], rtol=0, atol=1e-6), key
    assert to_json(read_source(path)) == to_json(model_to_source(plain))
    facts = compress(plain)[1]
    stated = inspect(path)["metadata"]
    assert {name: stated[name] for name in facts} == facts
