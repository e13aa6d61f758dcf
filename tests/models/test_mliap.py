"""Models written for LAMMPS' ML-IAP interface: a stand-in, against the same network on a graph without ghosts."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from mliap_model import PlainForm, SmallMACE, Unified

from carryall import evaluate, md
from carryall.data import AtomicData
from carryall.errors import InputError
from carryall.exchange import Transport, serial_exchange, sum_to_owners
from carryall.graph import NeighborGraph, Potential, graph_from_structures, validate
from carryall.models import EagerPotential
from carryall.models.mliap import GhostRows, MACEPotential, MLIAPPotential
from message_passing import Recorded, SwitchedOff
from ranks import evaluate_spread, run_ranks, split
from structures import CUTOFF, add_ghosts, geometries, structure

SYMBOLS = ("Cu", "Au")
SPREADS = {
    "one": lambda i: 0,
    "two": lambda i: i % 2,
    "three, uneven": lambda i: min(i % 4, 2),
    "first has none": lambda i: 1,
    "two in the middle have none": lambda i: 3 * (i % 2),
}
WRAPPED = {
    "mace": MACEPotential,
    "unified": lambda model: MLIAPPotential(Unified(model, ["Cu", "Au"])),
    # elements in another order, among entries that name none
    "unified, more elements": lambda model: MLIAPPotential(Unified(model, ["none", "Cu", "none", "Au"])),
}


def graph_of(*names: str) -> NeighborGraph:
    return graph_from_structures([structure(name, SYMBOLS) for name in names], CUTOFF, SYMBOLS)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float64
        scale = max(1.0, float(value.abs().max()))
        assert torch.allclose(found[name], value, rtol=0, atol=tolerance * scale), name


@pytest.fixture(scope="module", params=WRAPPED)
def potential(request: pytest.FixtureRequest) -> Potential:
    return WRAPPED[request.param](SmallMACE(cutoff=CUTOFF, layers=3))


@pytest.fixture(scope="module")
def oracle() -> Potential:
    return EagerPotential(PlainForm(SmallMACE(cutoff=CUTOFF, layers=3)))


# -- one process


@pytest.mark.parametrize("name", geometries())
@pytest.mark.parametrize("convention", [True, "half"])
def test_equals_the_network_without_the_interface(potential: Potential, oracle: Potential, name: str, convention: Any) -> None:
    graph = graph_of(name)
    assert_close(potential(graph, atomic_virial=convention), oracle(graph, atomic_virial=convention))


def test_many_systems_at_once(potential: Potential, oracle: Potential) -> None:
    graph = graph_of(*geometries())
    assert_close(potential(graph), oracle(graph))


@pytest.mark.parametrize("names", [("tilted",), ("one_atom_periodic",), ("open", "slab", "tiny_triclinic")], ids=" ".join)
def test_images_as_ghosts(potential: Potential, oracle: Potential, names: tuple[str, ...]) -> None:
    graph = graph_of(*names)
    ghosted = add_ghosts(graph)
    found = potential(ghosted, atomic_virial=True)
    summed = {key: sum_to_owners(found[key], ghosted) for key in ("forces", "atomic_virial")}
    assert_close({**found, **summed}, oracle(graph, atomic_virial=True))


def test_masked_and_far_edges_take_no_part(potential: Potential, oracle: Potential) -> None:
    data = structure("tilted", SYMBOLS)
    wide = graph_from_structures([data], CUTOFF + 0.7, SYMBOLS)
    expected = oracle(graph_from_structures([data], CUTOFF, SYMBOLS))
    assert_close(potential(wide), expected)
    graph = graph_of("tilted")
    mask = torch.arange(graph.n_edges) % 7 != 0
    masked = graph.replace(edge_mask=mask)
    assert_close(potential(masked), oracle(masked))


def test_nothing_of_the_input_is_changed(potential: Potential) -> None:
    graph = graph_of("tilted")
    before = graph.map(torch.clone)
    out = potential(graph)
    assert all(not value.requires_grad for value in out.values())
    for name in ("positions", "cell", "edge_neighbor", "edge_center", "atom_types"):
        assert torch.equal(getattr(graph, name), getattr(before, name))
        assert not getattr(graph, name).requires_grad
    with torch.inference_mode():
        inside = potential(graph_of("tilted"))
    assert torch.equal(inside["forces"], out["forces"])


def test_in_ase_and_in_batched_dynamics(potential: Potential, oracle: Potential) -> None:
    ase = pytest.importorskip("ase")
    from carryall.engines.ase import Calculator

    data = structure("tilted", SYMBOLS)
    (expected,) = evaluate(potential, data)
    atoms = data.to_ase()
    atoms.calc = Calculator(potential)
    assert isinstance(atoms, ase.Atoms)
    assert np.abs(atoms.get_forces() - expected["forces"]).max() < 1e-12
    assert abs(atoms.get_potential_energy() - expected["energy"]) < 1e-12
    moved = [
        md([data, structure("open", SYMBOLS)], one, "nve", 100.0, 0.5, 5, progress=False).structures
        for one in (potential, oracle)
    ]
    for found, wanted in zip(*moved, strict=True):
        assert torch.allclose(found.positions, wanted.positions, rtol=0, atol=1e-11)
    assert not torch.allclose(moved[0][0].positions, data.positions, rtol=0, atol=1e-3)


# -- ranks


@pytest.mark.parametrize("name", ["tilted", "slab", "one_atom_periodic", "tiny_triclinic"])
@pytest.mark.parametrize("spread", SPREADS)
def test_ranks_give_what_one_process_gives(potential: Potential, oracle: Potential, name: str, spread: str) -> None:
    graph = graph_of(name)
    rank_of = [SPREADS[spread](atom) for atom in range(graph.n_atoms)]
    assert_close(evaluate_spread(potential, graph, rank_of), oracle(graph, atomic_virial=True))


def test_a_rank_with_ghosts_only_and_one_with_a_lonely_atom(potential: Potential, oracle: Potential) -> None:
    graph = graph_of("open")
    expected = oracle(graph)

    def rank(transport: Transport) -> tuple[torch.Tensor, list[str]]:
        share = split(graph, [0, 0, 2, 2, 0, 2, 0], transport.rank, spare=[(0, 3, 5), (2, 2, 4), (1,)][transport.rank])
        here = share.on(transport, Recorded)
        return potential(here)["energy"], here.exchange.calls

    parts = run_ranks(3, rank)
    assert torch.allclose(sum(part[0] for part in parts), expected["energy"], rtol=0, atol=1e-12)
    width = "torch.float64 [16]"
    # three layers, so two exchanges and their derivatives, on the rank without atoms too
    assert all(part[1] == [f"forward {width}", f"forward {width}", f"reverse {width}", f"reverse {width}"] for part in parts)


def test_an_exchange_that_is_switched_off_is_noticed(potential: Potential, oracle: Potential) -> None:
    graph = graph_of("tilted")
    expected = oracle(graph)

    def rank(transport: Transport) -> dict[str, torch.Tensor]:
        here = split(graph, [0, 1] * 4, transport.rank).on(transport, SwitchedOff)
        return potential(here)

    parts = run_ranks(2, rank)
    assert abs(float(sum(part["energy"] for part in parts) - expected["energy"])) > 1e-3


def test_a_wrong_sign_of_the_vectors_would_show() -> None:
    """The network is no mirror image of itself, so that the tests above tell receiver - sender from its opposite."""
    model = PlainForm(SmallMACE(cutoff=CUTOFF, layers=3))
    graph = graph_of("tilted")
    mirrored = graph.replace(positions=-graph.positions, cell=-graph.cell)
    assert abs(float(EagerPotential(model)(graph)["energy"] - EagerPotential(model)(mirrored)["energy"])) > 1e-3


def test_an_error_on_one_rank_before_the_call_is_an_error_on_all(potential: Potential) -> None:
    graph = graph_of("tilted")

    def rank(transport: Transport) -> str:
        here = split(graph, [0, 1] * 4, transport.rank).on(transport)
        with pytest.raises(InputError) as caught:
            potential(here if transport.rank == 0 else graph.replace(exchange=here.exchange))
        return str(caught.value)

    messages = run_ranks(2, rank)
    assert "the exchange plan is for 4 local" in messages[0]
    assert "the exchange plan is for 4 local" in messages[1]


# -- dtypes, heads, refusals


def test_float32_models() -> None:
    graph = graph_of("tilted")
    model = SmallMACE(cutoff=CUTOFF, layers=3, dtype=torch.float32)
    exact = SmallMACE(cutoff=CUTOFF, layers=3)
    with torch.no_grad():
        for wide, narrow in zip(exact.parameters(), model.parameters(), strict=True):
            wide.copy_(narrow)
    expected = EagerPotential(PlainForm(exact))(graph, atomic_virial=True)
    for potential in (MACEPotential(model), MLIAPPotential(Unified(model, ["Cu", "Au"]))):
        assert potential.spec.dtype == "float32"
        assert_close(potential(graph, atomic_virial=True), expected, 2e-5)
        assert_close(evaluate_spread(potential, graph, [0, 2] * 4), expected, 2e-5)

    def rank(transport: Transport) -> list[str]:
        here = split(graph, [0, 1] * 4, transport.rank).on(transport, Recorded)
        MACEPotential(model)(here)
        return here.exchange.calls

    assert {call.split()[1] for call in run_ranks(2, rank)[0]} == {"torch.float32"}


def test_spec_is_read_from_the_module() -> None:
    spec = MACEPotential(SmallMACE(("Au", "Cu"), 3.7)).spec
    assert (spec.cutoff, spec.type_map, spec.message_passing, spec.dtype) == (3.7, ("Au", "Cu"), True, "float64")
    assert not MACEPotential(SmallMACE(layers=1)).spec.message_passing
    other = MLIAPPotential(Unified(SmallMACE(), ["none", "Cu", "none", "Au"]), dtype="float32", message_passing=False).spec
    assert (other.type_map, other.dtype, other.message_passing) == (("Cu", "Au"), "float32", False)


def test_a_model_of_one_layer_needs_no_exchange() -> None:
    model = SmallMACE(cutoff=CUTOFF, layers=1)
    graph = graph_of("tilted")
    expected = EagerPotential(PlainForm(model))(graph)
    # ghosts that belong to anybody, as engines give them to potentials without messages
    foreign = add_ghosts(graph).replace(ghost_owner=None)
    found = MACEPotential(model)(foreign)
    assert torch.allclose(found["energy"], expected["energy"], rtol=0, atol=1e-12)
    alone = split(graph, [0] * 8, 0)
    assert torch.allclose(MACEPotential(model)(alone.graph)["energy"], expected["energy"], rtol=0, atol=1e-12)


def test_heads_are_named() -> None:
    model = SmallMACE(cutoff=CUTOFF, heads=("one", "two"))
    graph = graph_of("tilted")
    for index, head in enumerate(model.heads):
        assert_close(MACEPotential(model, head=head)(graph), EagerPotential(PlainForm(model, index))(graph))
    for head in (None, "three"):
        with pytest.raises(InputError, match="has the heads one, two, not"):
            MACEPotential(model, head=head)


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(InputError, match=r"no MACE model: a Linear without r_max"):
        MACEPotential(torch.nn.Linear(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which MACE's compiled files need
        scripted = torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1))
    with pytest.raises(InputError, match="a scripted MACE module leaves out its exchanges"):
        MACEPotential(scripted)
    charged = SmallMACE()
    charged.joint_embedding, charged.embedding_specs = torch.nn.Linear(1, 1), {"total_charge": {}}
    with pytest.raises(InputError, match="takes total_charge of a whole system"):
        MACEPotential(charged)

    class Silent(Unified):
        def compute_forces(self, data: Any) -> None:
            pass

    with pytest.raises(InputError, match=r"Silent\.compute_forces returned without update_pair_forces"):
        MLIAPPotential(Silent(SmallMACE(), ["Cu", "Au"]))(graph_of("tilted"))


def test_rows_that_do_not_fit_are_an_error() -> None:
    rows = GhostRows(serial_exchange(3, torch.tensor([2, 0])), n_phantom=1)
    wrong, right = torch.zeros(5, 4), torch.arange(6.0)[:, None]
    with pytest.raises(InputError, match="expected 6 rows, 3 owned, 1 phantom and 2 ghosts"):
        rows.forward_exchange(wrong, wrong, 4)
    with pytest.raises(InputError, match="with width 3"):
        rows.reverse_exchange(right, right, 3)
    out = torch.full_like(right, torch.nan)
    rows.forward_exchange(right, out, 1)
    assert out[:, 0].tolist() == [0, 1, 2, 3, 2, 0]
    rows.reverse_exchange(right, out, 1)
    assert out[:, 0].tolist() == [5, 1, 6, 3, 0, 0]


def test_pair_energies_are_halved() -> None:
    """LAMMPS' other way to give energies, which its own Lennard-Jones for this interface uses."""

    class Springs:
        element_types, rcutfac = ["Cu", "Au"], 0.5 * CUTOFF

        def compute_forces(self, data: Any) -> None:
            stretch = CUTOFF - np.linalg.norm(data.rij, axis=1)
            data.update_pair_energy(stretch**4)
            data.update_pair_forces(-2 * stretch[:, None] ** 3 * data.rij / np.linalg.norm(data.rij, axis=1)[:, None])

    potential = MLIAPPotential(Springs(), message_passing=False)
    data = AtomicData([[0, 0, 0], [1.5, 0, 0], [0, 2.5, 0]], [29, 79, 29])
    (found,) = evaluate(potential, data)
    lengths = np.array([1.5, 2.5, np.hypot(1.5, 2.5)])
    assert found["energy"] == pytest.approx(((CUTOFF - lengths) ** 4).sum(), rel=1e-12)
    assert found["forces"][0] == pytest.approx([-4 * 2.5**3, -4 * 1.5**3, 0], rel=1e-12)
    graph = validate(graph_from_structures([data], CUTOFF, SYMBOLS))
    assert_close(evaluate_spread(potential, graph, [0, 2, 2]), potential(graph, atomic_virial=True))
