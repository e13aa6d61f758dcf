"""The fitting net with all its inputs: against one atom after the other, and what it says when an input is missing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from carryall.errors import InputError
from carryall.graph import NeighborGraph, edge_vectors, graph_from_structures
from carryall.graph.neighbor_graph import local_types
from carryall.models import DPA1, DescriptorConfig, EagerPotential, FittingConfig
from carryall.models.dpa1.fitting import EnergyFitting
from structures import CUTOFF, add_ghosts, structure, structures

TYPES = ("O", "H")
WIDTH = 5
SMALL = DescriptorConfig(rcut=CUTOFF, rcut_smth=1.0, sel=(20,), neuron=(4, 8), axis_neuron=3, tebd_dim=3, attn=6, attn_layer=1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomize(fitting: EnergyFitting, seed: int = 3) -> EnergyFitting:
    """Statistics start at zero and one, where they would hide errors."""
    for index, (_, buffer) in enumerate(fitting.named_buffers()):
        if buffer is not fitting.default_fparam:
            buffer.copy_(0.3 + 0.5 * noise(*buffer.shape, seed=seed + index))
    return fitting


def whole(config: FittingConfig, ghosts: bool = False) -> NeighborGraph:
    """Several systems, or one with ghosts, with the parameters that `config` takes, different for each system and atom."""
    items = [structure("tilted", TYPES)] if ghosts else structures(TYPES)
    graph = graph_from_structures(items, CUTOFF, TYPES)
    graph = add_ghosts(graph) if ghosts else graph
    return graph.replace(
        fparam=noise(graph.n_systems, config.numb_fparam, seed=1) if config.numb_fparam else None,
        aparam=noise(graph.n_atoms, config.numb_aparam, seed=2) if config.numb_aparam else None,
    )


def one_by_one(fitting: EnergyFitting, descriptor: Tensor, graph: NeighborGraph) -> Tensor:
    """Energies from the definition, atom by atom."""
    config, energies = fitting.config, []
    for atom, kind in enumerate(local_types(graph).tolist()):
        extra: list[Tensor] = []
        if config.numb_fparam:
            assert graph.fparam is not None
            extra.append((graph.fparam[graph.system[atom]] - fitting.fparam_avg) * fitting.fparam_inv_std)
        if config.numb_aparam and not config.use_aparam_as_mask:
            assert graph.aparam is not None
            extra.append((graph.aparam[atom] - fitting.aparam_avg) * fitting.aparam_inv_std)
        if fitting.case_embd is not None:
            extra.append(fitting.case_embd)
        net = fitting.nets[0 if config.mixed_types else kind]
        energy = net(torch.cat([descriptor[atom], *extra]))[0] + fitting.bias_atom_e[kind]
        known = [one is not None for one in config.atom_ener or ()]
        if any(known) and (config.mixed_types or known[kind]):
            energy = energy - net(torch.cat([torch.zeros(WIDTH, dtype=torch.float64), *extra]))[0]
        energies.append(energy)
    return torch.stack(energies)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fparam": {"numb_fparam": 2},
    "aparam": {"numb_aparam": 3},
    "both": {"numb_fparam": 1, "numb_aparam": 2},
    "mask": {"numb_aparam": 2, "use_aparam_as_mask": True},
    "case": {"dim_case_embd": 2},
    "per type": {"mixed_types": False},
    "vacuum": {"atom_ener": (-1.0, 2.0)},
    "vacuum of one": {"atom_ener": (None, 2.0)},
    "vacuum of one, per type": {"atom_ener": (None, 2.0), "mixed_types": False},
    "vacuum with fparam": {"atom_ener": (1.0, 2.0), "numb_fparam": 2},
    "nothing of vacuum": {"atom_ener": (None, None), "dim_case_embd": 1},
    "no hidden layer": {"neuron": (), "numb_aparam": 1},
    "all": {
        "numb_fparam": 2, "numb_aparam": 1, "dim_case_embd": 3, "mixed_types": False, "atom_ener": (0.5, None),
        "resnet_dt": False, "activation_function": "silut:0.5", "neuron": (6, 12),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ghosts", [False, True])
def test_equals_one_atom_after_the_other(name: str, ghosts: bool) -> None:
    config = FittingConfig(**{"neuron": (6, 6), **CONFIGS[name]})
    fitting = randomize(EnergyFitting(config, 2, WIDTH, torch.Generator().manual_seed(1)))
    graph = whole(config, ghosts)
    descriptor = noise(graph.n_local, WIDTH, seed=9).requires_grad_()
    found, expected = fitting(descriptor, graph), one_by_one(fitting, descriptor, graph)
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(energy.sum(), descriptor)[0] for energy in (found, expected)]
    assert float(gradients[0].abs().min(1).values.max()) > 0
    assert torch.allclose(*gradients, rtol=0, atol=1e-13)


def test_the_cases_differ() -> None:
    energies = []
    for options in CONFIGS.values():
        config = FittingConfig(**{"neuron": (6, 6), **options})
        graph = whole(config)
        fitting = randomize(EnergyFitting(config, 2, WIDTH, torch.Generator().manual_seed(1)))
        energies.append(fitting(noise(graph.n_local, WIDTH, seed=9), graph).detach())
    for a, b in itertools.combinations(range(len(energies)), 2):
        same = {list(CONFIGS)[a], list(CONFIGS)[b]} in ({"plain", "mask"}, {"vacuum", "vacuum of one"})
        assert torch.allclose(energies[a], energies[b], rtol=0, atol=1e-6) == same, (list(CONFIGS)[a], list(CONFIGS)[b])


@given(seed=st.integers(0, 10_000), widths=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)))
@settings(max_examples=30, deadline=None)
def test_any_widths(seed: int, widths: tuple[int, int, int]) -> None:
    fparam, aparam, case = widths
    flags = {"mixed_types": seed % 2 == 0, "atom_ener": (None, 1.0) if seed % 3 == 0 else None, "neuron": (4,)}
    config = FittingConfig(numb_fparam=fparam, numb_aparam=aparam, dim_case_embd=case, **flags)
    fitting = randomize(EnergyFitting(config, 2, WIDTH, torch.Generator().manual_seed(seed)), seed)
    graph = whole(config)
    descriptor = noise(graph.n_local, WIDTH, seed=seed)
    assert torch.allclose(fitting(descriptor, graph), one_by_one(fitting, descriptor, graph), rtol=0, atol=1e-12)


# -- inputs of the model


def with_inputs(**options: Any) -> DPA1:
    model = DPA1(TYPES, SMALL, FittingConfig(neuron=(6, 6), **options), seed=2).eval()
    randomize(model.fitting)
    model.descriptor.dstd.fill_(0.1)
    return model


def test_parameters_reach_the_energy_of_their_own_system_and_atom() -> None:
    model = with_inputs(numb_fparam=2, numb_aparam=1)
    graph = whole(model.fitting_config)
    assert graph.fparam is not None
    assert graph.aparam is not None
    pot = EagerPotential(model)
    assert pot.spec.extra_inputs == ("fparam", "aparam")
    base = pot(graph)
    fparam, aparam = graph.fparam.clone(), graph.aparam.clone()
    fparam[2, 1] += 0.3
    moved = pot(graph.replace(fparam=fparam))
    changed = (moved["atomic_energy"] - base["atomic_energy"]).abs() > 1e-6
    assert torch.equal(changed, graph.system == 2)
    assert float((moved["forces"] - base["forces"]).abs().max()) > 1e-6
    aparam[5, 0] -= 0.3
    one = (pot(graph.replace(aparam=aparam))["atomic_energy"] - base["atomic_energy"]).abs() > 1e-6
    assert one.nonzero().tolist() == [[5]]


def test_a_default_stands_for_what_is_missing() -> None:
    model = with_inputs(numb_fparam=2, default_fparam=(0.4, -1.2))
    graph = whole(model.fitting_config)
    explicit = graph.replace(fparam=torch.tensor([0.4, -1.2], dtype=torch.float64).repeat(graph.n_systems, 1))
    vectors = edge_vectors(graph)
    assert torch.equal(model(graph.replace(fparam=None), vectors), model(explicit, vectors))
    assert not torch.allclose(model(graph, vectors), model(explicit, vectors))


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"numb_fparam": 2}, {}, "this potential needs fparam, 2 values for each structure: the graph has none"),
        ({"numb_aparam": 1}, {}, "this potential needs aparam, 1 value for each atom: the graph has none"),
        ({"numb_fparam": 2}, {"fparam": 1}, "this potential needs fparam, 2 values for each structure, got 1"),
        ({"numb_aparam": 1}, {"aparam": 4}, "this potential needs aparam, 1 value for each atom, got 4"),
    ],
)
def test_missing_and_misshapen_inputs_are_named(options: dict[str, int], given: dict[str, int], message: str) -> None:
    model = with_inputs(**options)
    graph = graph_from_structures([structure("tilted", TYPES)], CUTOFF, TYPES)
    rows = {"fparam": graph.n_systems, "aparam": graph.n_atoms}
    graph = graph.replace(**{name: noise(rows[name], width) for name, width in given.items()})
    with pytest.raises(InputError, match=message):
        model(graph, edge_vectors(graph))


def test_aparam_as_mask_is_not_asked_for() -> None:
    model = with_inputs(numb_aparam=1, use_aparam_as_mask=True)
    assert model.spec.extra_inputs == ()
    graph = graph_from_structures([structure("tilted", TYPES)], CUTOFF, TYPES)
    assert torch.isfinite(model(graph, edge_vectors(graph))).all()


def test_excluded_types_of_the_fitting_net_are_those_of_the_model() -> None:
    graph = graph_from_structures(structures(TYPES), CUTOFF, TYPES)
    by_net = DPA1(TYPES, SMALL, FittingConfig(neuron=(6, 6), exclude_types=(1,)), seed=2)
    by_model = DPA1(TYPES, SMALL, FittingConfig(neuron=(6, 6)), atom_exclude_types=[1], seed=2)
    for model in (by_net, by_model):
        model.out_bias.copy_(torch.tensor([1.0, 2.0]))
        assert (model.atom_exclude_types, model.fitting_config.exclude_types) == ((1,), (1,))
    energies = [model(graph, edge_vectors(graph)).detach() for model in (by_net, by_model)]
    assert torch.equal(*energies)
    assert torch.equal(energies[0] == 0, local_types(graph) == 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"default_fparam": (1.0,)}, "default_fparam has 1 values, numb_fparam is 0"),
        ({"numb_fparam": -1}, "greater than or equal to 0"),
        ({"trainable": (True, False)}, "trainable has 2 flags, expected 4"),
        ({"tot_ener_zero": True}, "tot_ener_zero = True is not supported"),
        ({"spin": {}}, "spin = {} is not supported"),
        ({"layer_name": ["a"]}, "layer_name = .* is not supported"),
        ({"precision": "bfloat16"}, "no file of a model can hold it"),
        ({"precision": "float8"}, "'float8' is not a floating-point type of weights"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FittingConfig(**options)


def test_options_that_only_have_one_value_are_taken_at_it() -> None:
    assert FittingConfig(tot_ener_zero=False, spin=None, layer_name=None) == FittingConfig()  # type: ignore[call-arg]
