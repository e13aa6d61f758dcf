"""Models that pass messages: one process, images as ghosts, and ranks give the same, eager, traced and packed alike."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from carryall import inspect, load, pack
from carryall.errors import InputError
from carryall.exchange import Exchange, Transport, serial_exchange, sum_to_owners
from carryall.exchange.context import open_exchange
from carryall.graph import NeighborGraph, Potential, concatenate, graph_from_structures
from carryall.models import EagerPotential, LinearEnergyModel
from carryall.models.derivatives import evaluate_model
from carryall.models.registry import model_from_source, model_to_source, register
from carryall.package.arrays import from_json, to_json
from carryall.package.load import quiet_torch
from carryall.package.signature import to_inputs
from carryall.package.trace import Program
from message_passing import Recorded, SwitchedOff, Tangled, small_message_passing
from ranks import evaluate_spread, run_ranks, split
from structures import CUTOFF, add_ghosts, small_alloy, small_lj, structure

MODELS = {"example": small_message_passing, "tangled": Tangled}
GEOMETRIES = ("tilted", "slab", "one_atom_periodic", "tiny_triclinic")
SPREADS = {
    "one": lambda i: 0,
    "two": lambda i: i % 2,
    "three, uneven": lambda i: min(i % 4, 2),
    "first has none": lambda i: 1,
    "two in the middle have none": lambda i: 3 * (i % 2),
}


def graph_of(*names: str) -> NeighborGraph:
    return graph_from_structures([structure(name, ("Cu", "Au")) for name in names], CUTOFF, ("Cu", "Au"))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        assert torch.allclose(found[name], value, rtol=0, atol=tolerance * scale), name


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def pte(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Potential:
    return load(pack(model, tmp_path_factory.mktemp("packed") / "model.pte"))


# -- the same results


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("spread", SPREADS)
def test_ranks_give_what_one_process_gives(model: nn.Module, pte: Potential, name: str, spread: str) -> None:
    graph = graph_of(name)
    rank_of = [SPREADS[spread](atom) for atom in range(graph.n_atoms)]
    expected = EagerPotential(model)(graph, atomic_virial=True)
    assert bool(expected["energy"].any())
    assert_close(pte(graph, atomic_virial=True), expected)
    for potential in (EagerPotential(model), pte):
        assert_close(evaluate_spread(potential, graph, rank_of), expected)


@pytest.mark.parametrize("names", [("tilted",), ("one_atom_periodic",), ("open", "slab", "tiny_triclinic")], ids=" ".join)
def test_images_as_ghosts_of_one_process(model: nn.Module, pte: Potential, names: tuple[str, ...]) -> None:
    graph = graph_of(*names)
    ghosted = add_ghosts(graph)
    expected = EagerPotential(model)(graph, atomic_virial=True)
    for potential in (EagerPotential(model), pte):
        found = potential(ghosted, atomic_virial=True)
        summed = {key: sum_to_owners(found[key], ghosted) for key in ("forces", "atomic_virial")}
        assert_close({**found, **summed}, expected)


def test_an_exchange_that_is_switched_off_is_noticed(model: nn.Module, pte: Potential) -> None:
    graph = graph_of("tilted")
    expected = EagerPotential(model)(graph)
    for potential in (EagerPotential(model), pte):

        def rank(transport: Transport, potential: Potential = potential) -> torch.Tensor:
            return potential(split(graph, [0, 1] * 4, transport.rank).on(transport, SwitchedOff))["energy"]

        assert abs(float(sum(run_ranks(2, rank)) - expected["energy"])) > 1e-3


def test_ghosts_that_no_edge_needs_do_no_harm(model: nn.Module, pte: Potential) -> None:
    """A rank without atoms that has ghosts, and one with more than it needs."""
    graph = graph_of("open")
    expected = EagerPotential(model)(graph)

    def rank(transport: Transport) -> list[torch.Tensor]:
        share = split(graph, [0, 0, 2, 2, 0, 2, 0], transport.rank, spare=[(0, 3, 5), (2, 2, 4), (1,)][transport.rank])
        assert share.graph.n_atoms > share.graph.n_local
        here = share.on(transport)
        return [potential(here)["energy"] for potential in (EagerPotential(model), pte)]

    for energies in zip(*run_ranks(3, rank), strict=True):
        assert torch.allclose(sum(energies), expected["energy"], rtol=0, atol=1e-12)


def test_parameter_gradients_across_ranks_equal_those_of_one_process() -> None:
    """Training on forces differentiates through the exchanges twice."""
    graph = graph_of("tilted")

    def loss(model: nn.Module, graph: NeighborGraph) -> torch.Tensor:
        out = evaluate_model(model, graph, create_graph=True)  # type: ignore[arg-type]
        return sum_to_owners(out["forces"], graph).square().sum() + out["atomic_energy"].square().sum()

    def gradients(model: nn.Module, graph: NeighborGraph) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss(model, graph), list(model.parameters())))

    expected = gradients(small_message_passing(), graph)
    for rank_of in ([0, 1] * 4, [1] * 8):

        def rank(transport: Transport, rank_of: list[int] = rank_of) -> list[torch.Tensor]:
            here = split(graph, rank_of, transport.rank).on(transport)
            return gradients(small_message_passing(), open_exchange(here))

        for index, parts in enumerate(zip(*run_ranks(2, rank), strict=True)):
            scale = float(expected[index].abs().max())
            assert torch.allclose(sum(parts), expected[index], rtol=0, atol=1e-12 * scale), index


def test_losses_of_different_parts_make_the_same_exchanges() -> None:
    """Where one rank has labels that another has not, both differentiate through every exchange, in one order."""
    graph = graph_of("tilted")

    def rank(transport: Transport) -> list[str]:
        here = split(graph, [0, 1] * 4, transport.rank).on(transport, Recorded)
        model = small_message_passing()
        out = evaluate_model(model, here, create_graph=True)  # type: ignore[arg-type]
        loss = out["energy"].sum() if transport.rank == 0 else out["forces"].square().sum()
        loss.backward()
        return here.exchange.calls

    first, second = run_ranks(2, rank)
    assert first == second
    assert len(first) == 8


# -- the same exchanges, in the same order


FORWARD = [
    "all_reduce torch.int64 []",
    "forward torch.float64 [5]",
    "forward torch.int64 []",
    "forward torch.float64 []",
    "forward torch.float64 [2, 2]",
    "forward torch.float32 []",
    "all_reduce torch.float64 []",
    "reverse torch.float64 []",
    "forward torch.float64 [7]",
]


def adjoint(call: str) -> str:
    name, rest = call.split(" ", 1)
    return {"forward": "reverse", "reverse": "forward"}.get(name, name) + " " + rest


SEQUENCE = FORWARD + [adjoint(call) for call in reversed(FORWARD) if "int" not in call]


def recorded(run: Sequence[Callable[[NeighborGraph], object]], rank_of: Sequence[int]) -> list[list[str]]:
    graph = graph_of("tilted")

    def rank(transport: Transport) -> list[str]:
        here = split(graph, rank_of, transport.rank).on(transport, Recorded)
        run[transport.rank](here)
        return here.exchange.calls

    return run_ranks(len(run), rank)


@pytest.mark.parametrize("rank_of", [[0, 1] * 4, [1] * 8], ids=["two", "first has none"])
def test_exchanges_come_in_one_order_everywhere(rank_of: list[int], tmp_path: Path) -> None:
    model = Tangled()
    sample = open_exchange(add_ghosts(graph_of("slab")))
    traced = make_fx(Program(model), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*to_inputs(sample, model.spec))
    packed = load(pack(model, tmp_path / "tangled.pte", check=False))

    def run_traced(graph: NeighborGraph) -> None:
        traced(*to_inputs(open_exchange(graph), model.spec))

    for run in (EagerPotential(model), run_traced, packed):
        assert recorded([run, run], rank_of) == [SEQUENCE, SEQUENCE]


@pytest.mark.compile
def test_compiled_exchanges_come_in_the_same_order(tangled_pt2: Path) -> None:
    potentials = [load(tangled_pt2), load(tangled_pt2)]  # each runs one call at a time
    for rank_of in ([0, 1] * 4, [1] * 8):
        assert recorded(potentials, rank_of) == [SEQUENCE, SEQUENCE]
    # next to one that is not compiled
    assert recorded([potentials[0], EagerPotential(Tangled())], [0, 1] * 4) == [SEQUENCE, SEQUENCE]


@pytest.mark.compile
def test_exchanges_of_models_compiled_at_run_time_come_in_the_same_order() -> None:
    # each rank compiles for its own sizes: one without atoms may fold nothing away
    for dynamic, rank_of in ((True, [0, 1] * 4), (False, [1] * 8)):
        potentials = [EagerPotential(torch.compile(Tangled(), dynamic=dynamic, fullgraph=True)) for _ in range(2)]
        with quiet_torch():
            assert recorded(potentials, rank_of) == [SEQUENCE, SEQUENCE]


@pytest.mark.compile
@pytest.mark.parametrize("name", GEOMETRIES)
def test_compiled_ranks_give_what_one_process_gives(tangled_pt2: Path, name: str) -> None:
    graph = graph_of(name)
    potentials = [load(tangled_pt2) for _ in range(4)]
    expected = EagerPotential(Tangled())(graph, atomic_virial=True)
    assert_close(potentials[0](graph, atomic_virial=True), expected)
    ghosted = add_ghosts(graph)
    assert torch.allclose(potentials[0](ghosted)["energy"], expected["energy"], rtol=0, atol=1e-12)
    for spread in SPREADS.values():
        assert_close(evaluate_spread(potentials, graph, [spread(atom) for atom in range(graph.n_atoms)]), expected)


# -- errors


class Failing(Exchange):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        raise InputError("the line is dead")


@pytest.mark.compile
def test_an_error_inside_compiled_code_is_the_error_itself(tangled_pt2: Path) -> None:
    check_errors_surface(load(tangled_pt2))


def test_an_error_inside_an_exchange_is_the_error_itself(pte: Potential, model: nn.Module) -> None:
    check_errors_surface(pte)
    check_errors_surface(EagerPotential(model))


def check_errors_surface(potential: Potential) -> None:
    graph = graph_of("tilted")
    transport_of = add_ghosts(graph)
    expected = potential(graph)

    def rank(transport: Transport) -> None:
        with pytest.raises(InputError, match="the line is dead"):
            potential(split(graph, [0] * 8, 0).on(transport, Failing))

    run_ranks(1, rank)
    assert_close(potential(graph), expected)
    assert potential(transport_of)["energy"].shape == (1,)


def test_a_graph_that_is_not_the_plans_is_an_error_on_every_rank(model: nn.Module, pte: Potential) -> None:
    graph = graph_of("tilted")

    def rank(transport: Transport) -> list[str]:
        here = split(graph, [0, 1] * 4, transport.rank).on(transport)
        wrong = here if transport.rank == 0 else graph.replace(exchange=here.exchange)
        types = here if transport.rank == 0 else here.replace(atom_types=here.atom_types + 7)
        messages = []
        for potential in (EagerPotential(model), pte):
            with pytest.raises(InputError) as caught:
                potential(wrong)
            messages.append(str(caught.value))
        with pytest.raises(InputError) as caught:
            pte(types)
        return [*messages, str(caught.value)]

    for messages in run_ranks(2, rank):
        assert all(message.startswith("rank 1: ") for message in messages)
        assert "but the graph has 8 and 0: it belongs to another graph" in messages[0]
        assert messages[0] == messages[1]
        assert "atom_types must lie in 0..1" in messages[2]


def test_ghosts_of_nobody_and_wrong_exchanges_are_errors(model: nn.Module, pte: Potential) -> None:
    ghosted = add_ghosts(graph_of("tilted"))
    for potential in (EagerPotential(model), pte):
        with pytest.raises(InputError, match="neither ghost_owner nor exchange"):
            potential(ghosted.replace(ghost_owner=None))
        with pytest.raises(InputError, match=r"graph.exchange is a str, expected a carryall.exchange.Exchange"):
            potential(ghosted.replace(exchange="mpi"))


# -- those who pass no messages


def test_a_file_without_message_passing_is_run_without_exchange_code(tmp_path: Path) -> None:
    plain = pack(small_lj(), tmp_path / "plain.pte", check=False)
    passing = pack(small_message_passing(), tmp_path / "passing.pte", check=False)
    code = """
import sys, torch
from carryall.graph import NeighborGraph
from carryall.package.load import load_packed
def exchange():
    return sorted(name for name in sys.modules if name.startswith("carryall.exchange"))
graph = NeighborGraph(
    torch.zeros(1, 3), torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1, 3, 3), torch.zeros(0).long(),
    torch.zeros(0).long(), torch.zeros(0, 3).int(), torch.zeros(0).bool(), torch.zeros(2).long(),
)
load_packed(sys.argv[1])(graph)
print(exchange())
load_packed(sys.argv[2])(graph)
print("carryall.exchange.ops" in exchange(), "message_passing_model" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, plain, passing], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[]", "True False"], done.stderr
    exchange, facts, others = (
        {"ghost", "exchange_handle", "exchange_token"},
        inspect(passing)["metadata"],
        inspect(plain)["metadata"],
    )
    assert facts["message_passing"]
    assert set(facts["input_keys"][-3:]) == exchange
    assert facts["output_keys"][-1] == "exchange_token"
    assert not others["message_passing"]
    assert not exchange & {*others["input_keys"], *others["output_keys"]}


# -- around it


def test_a_graph_carries_its_exchange_along() -> None:
    graph = add_ghosts(graph_of("open"))
    exchange = serial_exchange(graph.n_local, torch.zeros(0, dtype=torch.int64))
    here = graph.replace(exchange=exchange)
    for other in (here.to(dtype=torch.float32), here.map(torch.clone), here.replace(fparam=None)):
        assert other.exchange is exchange
    with pytest.raises(InputError, match="graph 1 has an exchange, whose plan is for that graph alone"):
        concatenate([graph, here])


def test_combinations_pass_the_messages_of_their_parts() -> None:
    model = LinearEnergyModel([small_message_passing(), small_alloy()], weights="sum")
    assert model.spec.message_passing
    graph = graph_of("tilted")
    assert_close(evaluate_spread(EagerPotential(model), graph, [0, 1] * 4), EagerPotential(model)(graph, atomic_virial=True))


def test_a_model_of_ones_own_comes_back_from_its_source() -> None:
    model = small_message_passing()
    again = model_from_source(from_json(to_json(model_to_source(model))))
    assert type(again) is type(model)
    graph = graph_of("tilted")
    assert_close(EagerPotential(again)(graph), EagerPotential(model)(graph), 0.0)
    with pytest.raises(InputError, match="model type 'linear' is taken"):
        register("linear", type(model))
    with pytest.raises(InputError, match="class Linear has no source form: give it to_dict and from_dict"):
        model_to_source(nn.Linear(1, 1))
