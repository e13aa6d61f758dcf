"""What every potential promises, in every engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from carryall.data import AtomicData
from carryall.errors import InputError
from carryall.exchange import Transport
from carryall.graph import NeighborGraph, Potential, concatenate, graph_from_structures, pointer
from engines import ENGINES, PARAMS, PROPERTIES, Engine
from ranks import Share, run_ranks, split
from structures import CUTOFF, add_ghosts, geometries, structures

SMALL = ("tilted", "slab", "open", "tiny_triclinic")
LONG_RANGE = "charges act over any distance"


@pytest.fixture(params=PARAMS, scope="module")
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param](request)


@pytest.fixture(scope="module")
def potential(engine: Engine) -> Potential:
    if engine.potential is None:
        pytest.skip("not called on graphs")
    return engine.potential


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float, place: object = "") -> None:
    for key in found.keys() & expected.keys():
        scale = max(1.0, np.abs(expected[key]).max(initial=0.0))
        assert np.abs(found[key] - expected[key]).max(initial=0.0) <= tolerance * scale, (key, place)


def graph_of(engine: Engine, *names: str) -> NeighborGraph:
    pot = engine.potential
    assert pot is not None
    return graph_from_structures([engine.structure(name) for name in names], pot.spec.cutoff, pot.spec.type_map)


def rigid(data: AtomicData, rotation: np.ndarray, shift: np.ndarray) -> AtomicData:
    turn = torch.from_numpy(rotation)
    cell = None if data.cell is None else data.cell @ turn.T
    return data.replace(positions=data.positions @ turn.T + torch.from_numpy(shift), cell=cell)


# -- form


def test_spec(engine: Engine, potential: Potential) -> None:
    assert potential.spec.cutoff == CUTOFF
    assert set(engine.symbols) <= set(potential.spec.type_map)
    assert potential.spec.dtype == ("float64" if engine.exact else "float32")
    assert potential.spec.message_passing == (engine.model in ("message passing", "ewald"))
    assert potential.spec.long_range == engine.long_range


def test_shapes_and_dtypes(engine: Engine) -> None:
    items = engine.structures()
    for data, found in zip(items, engine.run(items), strict=True):
        n = data.n_atoms
        shapes = {"energy": (), "forces": (n, 3), "virial": (3, 3), "atomic_energy": (n,)}
        assert set(found) == set(PROPERTIES) - (set() if engine.has_virial(data) else {"virial"})
        for key, value in found.items():
            assert value.shape == shapes[key], key
            assert value.dtype == np.float64, key
            assert np.isfinite(value).all(), key


def test_outputs_on_graphs(engine: Engine, potential: Potential) -> None:
    graph = graph_of(engine, "slab", "one_atom", "open")
    out = potential(graph, atomic_virial=True)
    n, s = graph.n_atoms, graph.n_systems
    shapes = {"energy": (s,), "atomic_energy": (n,), "forces": (n, 3), "virial": (s, 3, 3), "atomic_virial": (n, 3, 3)}
    assert {key: tuple(value.shape) for key, value in out.items()} == shapes
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in out.values())
    assert set(potential(graph)) == set(shapes) - {"atomic_virial"}
    per_system = torch.zeros(s, 3, 3, dtype=torch.float64).index_add(0, graph.system, out["atomic_virial"])
    assert torch.allclose(per_system, out["virial"], rtol=0, atol=1e-12 * max(1.0, float(out["virial"].abs().max())))
    energies = torch.zeros(s, dtype=torch.float64).index_add(0, graph.system, out["atomic_energy"])
    assert torch.allclose(energies, out["energy"], rtol=1e-14, atol=0)


def test_a_float32_graph_is_taken(engine: Engine, potential: Potential) -> None:
    graph = graph_of(engine, "open").to(dtype=torch.float32)
    rounded = graph.to(dtype=torch.float64)
    for key, value in potential(graph).items():
        assert value.dtype == torch.float64
        assert torch.allclose(value, potential(rounded)[key], rtol=1e-12, atol=1e-12), key


# -- invariance


def test_single_equals_batched(engine: Engine) -> None:
    items = engine.structures()
    for name, data, batched in zip(geometries(), items, engine.run(items), strict=True):
        assert_equal(engine.run([data])[0], batched, engine.tolerance, name)


def test_order_of_systems_does_not_matter(engine: Engine) -> None:
    items = engine.structures()
    for a, b in zip(engine.run(items), reversed(engine.run(items[::-1])), strict=True):
        assert_equal(a, b, engine.tolerance)


def test_many_small_systems(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    kinds = [engine.structure(name) for name in ("two_atoms", "one_atom", "one_atom_periodic", "open")]
    items = [
        kinds[k].replace(positions=kinds[k].positions + torch.from_numpy(rng.normal(size=3)))
        for k in rng.integers(0, len(kinds), 60)
    ]
    results = engine.run(items)
    for index in range(0, 60, 13):
        assert_equal(results[index], engine.run([items[index]])[0], 10 * engine.tolerance)


def test_rotation_and_translation(engine: Engine) -> None:
    rng = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))  # of either hand: an inversion changes nothing either
    items = engine.structures()
    for data, found in zip(items, engine.run(items), strict=True):
        turned = engine.run([rigid(data, rotation, rng.normal(size=3) * 20)])[0]
        back = {
            "energy": turned["energy"],
            "atomic_energy": turned["atomic_energy"],
            "forces": turned["forces"] @ rotation,
        }
        if "virial" in turned:
            back["virial"] = rotation.T @ turned["virial"] @ rotation
            assert (
                np.abs(found["virial"] - found["virial"].T).max()
                <= engine.tolerance * max(1.0, np.abs(found["virial"]).max()) * 10
            )
        assert_equal(back, found, 10 * engine.tolerance)
        assert np.abs(found["forces"].sum(0)).max() <= 10 * engine.tolerance * max(1.0, np.abs(found["forces"]).max())


def test_permutation(engine: Engine) -> None:
    rng = np.random.default_rng(2)
    items = engine.structures()
    for data, found in zip(items, engine.run(items), strict=True):
        order = rng.permutation(data.n_atoms)
        other = engine.run([data.replace(positions=data.positions[order], atomic_numbers=data.atomic_numbers[order])])[0]
        assert_equal(
            other, {k: v[order] if k in ("forces", "atomic_energy") else v for k, v in found.items()}, 10 * engine.tolerance
        )


def test_atoms_move_by_lattice_vectors(engine: Engine) -> None:
    rng = np.random.default_rng(3)
    for name in ("periodic", "tilted", "left_handed", "slab", "wire", "one_atom_periodic", "tiny_triclinic"):
        data = engine.structure(name)
        assert data.cell is not None
        jumps = torch.from_numpy(rng.integers(-3, 4, (data.n_atoms, 3))) * data.pbc
        assert jumps.any()
        moved = data.replace(positions=data.positions + jumps.double() @ data.cell)
        assert_equal(engine.run([moved])[0], engine.run([data])[0], 100 * engine.tolerance, name)


def test_supercell(engine: Engine) -> None:
    """Twice the cell, twice the energy: images of an atom and copies of it are the same thing."""
    for name in ("tiny_triclinic", "one_atom_periodic", "slab"):
        data = engine.structure(name)
        assert data.cell is not None
        double = AtomicData(
            torch.cat([data.positions, data.positions + data.cell[0]]),
            torch.cat([data.atomic_numbers] * 2),
            data.cell * torch.tensor([[2.0], [1.0], [1.0]], dtype=torch.float64),
            data.pbc,
        )
        one, two = engine.run([data])[0], engine.run([double])[0]
        expected = {key: 2 * one[key] for key in ("energy", "virial") if key in one}
        expected |= {key: np.concatenate([one[key]] * 2) for key in ("forces", "atomic_energy")}
        assert_equal(two, expected, 20 * engine.tolerance, name)


# -- limits


def test_one_atom_and_no_edges(engine: Engine) -> None:
    if engine.long_range:
        pytest.skip(LONG_RANGE)
    items = [engine.structure(name) for name in ("one_atom", "two_far", "one_atom_periodic")]
    one, far, periodic = engine.run(items)
    for found in (one, far):
        assert not found["forces"].any()
        assert not found.get("virial", np.zeros(1)).any()
    assert far["atomic_energy"][0] == pytest.approx(float(one["energy"]), rel=engine.tolerance, abs=1e-15)
    assert np.abs(periodic["forces"]).max() <= engine.tolerance
    if "virial" in periodic:
        assert np.abs(periodic["virial"]).max() > 1e-6


def test_additivity_at_distance(engine: Engine) -> None:
    if engine.long_range:
        pytest.skip(LONG_RANGE)
    first, second = engine.structure("open"), engine.structure("open_with_cell")
    both = AtomicData(
        torch.cat([first.positions, second.positions + 40.0]), torch.cat([first.atomic_numbers, second.atomic_numbers])
    )
    a, b, whole = engine.run([first])[0], engine.run([second])[0], engine.run([both])[0]
    expected = {key: np.concatenate([a[key], b[key]]) for key in ("forces", "atomic_energy")}
    expected["energy"] = a["energy"] + b["energy"]
    if "virial" in a and "virial" in b:
        expected["virial"] = a["virial"] + b["virial"]
    assert_equal(whole, expected, 10 * engine.tolerance)


def test_smooth_at_the_cutoff(engine: Engine) -> None:
    """Two dimers come within reach of each other: energy and forces leave what they were without a step."""
    if engine.long_range:
        pytest.skip(LONG_RANGE)
    dimer = engine.structure("two_atoms")
    apart = dimer.positions[1] - dimer.positions[0]
    axis = -apart / apart.norm()

    def at(distance: float) -> AtomicData:
        """Only the two inner atoms can reach each other."""
        mirrored = dimer.positions[0] + distance * axis - (dimer.positions - dimer.positions[0])
        return AtomicData(torch.cat([dimer.positions, mirrored]), torch.cat([dimer.atomic_numbers] * 2))

    distances = [CUTOFF + delta for delta in (-0.5, -2e-3, -1e-3, 1e-3, 1.0)]
    well_in, two_in, one_in, out, far_out = engine.run([at(distance) for distance in distances])
    assert_equal(out, {key: far_out[key] for key in ("energy", "forces", "atomic_energy")}, 10 * engine.tolerance)

    def changes(found: dict[str, np.ndarray]) -> tuple[float, float]:
        return abs(float(found["energy"] - out["energy"])), float(np.abs(found["forces"] - out["forces"]).max())

    (energy, force), (energy_one, force_one), (energy_two, force_two) = changes(well_in), changes(one_in), changes(two_in)
    assert energy > 1e-7
    # both grow at least as (cutoff - r)^2 here: a five hundredth of the way in, less than a thousandth
    assert energy_one <= 1e-3 * energy + engine.step
    assert force_one <= 1e-3 * force + engine.step
    assert energy_two <= 2e-3 * energy + engine.step
    assert force_two <= 2e-3 * force + engine.step


# -- derivatives


def finite_difference_step(engine: Engine) -> tuple[float, float]:
    """Step, and error that is allowed relative to the largest value."""
    return (3e-5, 1e-6) if engine.exact else (2e-2, 2e-2)


def energies(engine: Engine, items: Sequence[AtomicData]) -> np.ndarray:
    return np.array([found["energy"] for found in engine.run(items)])


@pytest.mark.parametrize("name", SMALL)
def test_forces_are_the_energys_gradient(engine: Engine, name: str) -> None:
    data = engine.structure(name)
    step, tolerance = finite_difference_step(engine)
    moves = step * torch.eye(3 * data.n_atoms, dtype=torch.float64).reshape(-1, data.n_atoms, 3)
    plus, minus = (energies(engine, [data.replace(positions=data.positions + sign * m) for m in moves]) for sign in (1, -1))
    numerical = -(plus - minus).reshape(-1, 3) / (2 * step)
    forces = engine.run([data])[0]["forces"]
    scale = np.abs(forces).max()
    assert scale > 5e-3
    assert np.abs(forces - numerical).max() <= tolerance * max(scale, 1e-2)


@pytest.mark.parametrize("name", [*SMALL, "wire", "one_atom_periodic"])
def test_virial_is_the_energys_derivative_in_the_strain(engine: Engine, name: str) -> None:
    data = engine.structure(name)
    if not engine.has_virial(data):
        pytest.skip("no stress without a volume")
    step, tolerance = finite_difference_step(engine)

    def strained(a: int, b: int, sign: int) -> AtomicData:
        strain = torch.eye(3, dtype=torch.float64)
        strain[a, b] += sign * step
        return data.replace(positions=data.positions @ strain.T, cell=None if data.cell is None else data.cell @ strain.T)

    components = [(a, b) for a in range(3) for b in range(3)]
    plus, minus = (energies(engine, [strained(a, b, sign) for a, b in components]) for sign in (1, -1))
    numerical = -(plus - minus).reshape(3, 3) / (2 * step)
    virial = engine.run([data])[0]["virial"]
    assert np.abs(virial).max() > 1e-3
    assert np.abs(virial - numerical).max() <= 3 * tolerance * max(np.abs(virial).max(), 1e-1)


# -- graphs


def tensors(graph: NeighborGraph) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(graph).items() if value is not None}


def test_input_is_not_changed_and_calls_leave_no_trace(engine: Engine, potential: Potential) -> None:
    graph = graph_of(engine, "tilted", "open")
    graph.positions.requires_grad_()
    before = {name: value.detach().clone() for name, value in tensors(graph).items()}
    first = potential(graph, atomic_virial=True)
    potential(graph_of(engine, "slab", "one_atom"))
    again = potential(graph, atomic_virial=True)
    assert all(torch.equal(value, before[name]) for name, value in tensors(graph).items())
    assert graph.positions.grad is None
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(value.requires_grad for value in first.values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(engine: Engine, potential: Potential, context: type) -> None:
    graph = graph_of(engine, "open")
    expected = potential(graph)
    with context():
        made_outside, made_inside = potential(graph), potential(graph_of(engine, "open"))
    for key, value in expected.items():
        assert torch.equal(made_outside[key], value), key
        assert torch.equal(made_inside[key], value), key


def test_one_system_does_not_feel_another(engine: Engine, potential: Potential) -> None:
    """Not even where the other holds nonsense."""
    good, other = graph_of(engine, "tilted"), graph_of(engine, "open")
    alone = potential(good, atomic_virial=True)
    poisoned = other.replace(positions=torch.full_like(other.positions, torch.nan))
    for neighbor in (other, poisoned):
        for order, rows, index in (([good, neighbor], slice(0, 8), 0), ([neighbor, good], slice(7, 15), 1)):
            found = potential(concatenate(order), atomic_virial=True)
            for key, value in alone.items():
                mine = found[key][index : index + 1] if key in ("energy", "virial") else found[key][rows]
                scale = max(1.0, float(value.abs().max()))
                assert torch.allclose(mine, value, rtol=0, atol=engine.tolerance * scale), key


@pytest.mark.parametrize("names", [("tilted",), ("one_atom_periodic",), ("open", "slab", "tiny_triclinic")], ids=" ".join)
def test_ghosts(engine: Engine, potential: Potential, names: tuple[str, ...]) -> None:
    """Images as ghost rows: the same energies, for local atoms only; forces of ghosts belong to their owners."""
    graph = graph_of(engine, *names)
    ghosted = add_ghosts(graph)
    assert ghosted.n_local == graph.n_atoms < ghosted.n_atoms
    assert ghosted.ghost_owner is not None
    plain, found = potential(graph, atomic_virial=True), potential(ghosted, atomic_virial=True)
    assert found["atomic_energy"].shape == (graph.n_atoms,)
    assert found["forces"].shape == (ghosted.n_atoms, 3)
    assert found["atomic_virial"].shape == (ghosted.n_atoms, 3, 3)
    for key in ("forces", "atomic_virial"):
        local, ghosts = found[key][: graph.n_atoms], found[key][graph.n_atoms :]
        assert bool(ghosts.any())
        found[key] = local.index_add(0, ghosted.ghost_owner, ghosts)
    for key, value in plain.items():
        assert torch.allclose(found[key], value, rtol=0, atol=20 * engine.tolerance * max(1.0, float(value.abs().max()))), key


def test_a_rank_counts_only_its_own_atoms(engine: Engine, potential: Potential) -> None:
    """Split over two ranks: local energies are those of the whole, forces add up."""
    graph = graph_of(engine, "open")
    whole = potential(graph)
    total = torch.zeros_like(whole["forces"])
    virial = torch.zeros_like(whole["virial"])

    def rank(transport: Transport) -> tuple[Share, dict[str, torch.Tensor]]:
        share = split(graph, [0, 0, 0, 0, 1, 1, 1], transport.rank)
        return share, potential(share.on(transport) if potential.spec.message_passing else share.graph)

    for share, out in run_ranks(2, rank):
        assert torch.allclose(
            out["atomic_energy"], whole["atomic_energy"][share.local_ids], rtol=10 * engine.tolerance, atol=1e-14
        )
        total.index_add_(0, torch.cat([share.local_ids, share.ghost_ids]), out["forces"])
        virial += out["virial"]
    assert torch.allclose(total, whole["forces"], rtol=0, atol=10 * engine.tolerance)
    assert torch.allclose(virial, whole["virial"], rtol=0, atol=20 * engine.tolerance)


def test_masked_edges_take_part_in_nothing(engine: Engine, potential: Potential) -> None:
    """Padding: every centre gets two masked edges to itself, of length zero."""
    graph = graph_of(engine, "slab", "one_atom", "wire")
    n = graph.n_atoms
    center = torch.cat([graph.edge_center, torch.arange(n), torch.arange(n)])
    order = center.argsort(stable=True)
    none = torch.zeros(2 * n, 3, dtype=graph.edge_shift.dtype)
    padded = graph.replace(
        edge_center=center[order],
        edge_neighbor=torch.cat([graph.edge_neighbor, torch.arange(n), torch.arange(n)])[order],
        edge_shift=torch.cat([graph.edge_shift, none])[order],
        edge_mask=torch.cat([graph.edge_mask, torch.zeros(2 * n, dtype=torch.bool)])[order],
        ptr=pointer(center[order], n),
    )
    plain, found = potential(graph, atomic_virial=True), potential(padded, atomic_virial=True)
    for key, value in plain.items():
        assert torch.allclose(found[key], value, rtol=0, atol=10 * engine.tolerance * max(1.0, float(value.abs().max()))), key


def test_an_empty_graph(engine: Engine, potential: Potential) -> None:
    graph = graph_of(engine, "one_atom")
    nothing = graph.replace(
        positions=graph.positions[:0], atom_types=graph.atom_types[:0], system=graph.system[:0], ptr=graph.ptr[:1]
    )
    out = potential(nothing, atomic_virial=True)
    assert out["energy"].tolist() == [0.0]
    assert out["forces"].shape == (0, 3)
    assert not out["virial"].any()


def test_types_beyond_the_type_map_are_an_error(engine: Engine, potential: Potential) -> None:
    graph = graph_of(engine, "open")
    with pytest.raises((InputError, IndexError)):
        potential(graph.replace(atom_types=graph.atom_types + 7))


# -- engines against each other


@pytest.mark.parametrize(
    "name", [name for name in ENGINES if name in ("dpa1_pte", "ase")] + [pytest.param("dpa1_pt2", marks=pytest.mark.compile)]
)
def test_engines_of_one_model_agree(name: str, request: pytest.FixtureRequest) -> None:
    """Eager is the reference: every structure of the suite, alone and in one batch, to 1e-10."""
    reference, other = ENGINES["dpa1"](request), ENGINES[name](request)
    assert reference.model == other.model
    items = structures(reference.symbols)
    expected = reference.run(items)
    for geometry, a, b in zip(geometries(), other.run(items), expected, strict=True):
        assert_equal(a, b, 1e-10, geometry)
        assert {"energy", "forces", "atomic_energy"} <= a.keys()
    for geometry, data, b in zip(geometries(), items, expected, strict=True):
        assert_equal(other.run([data])[0], b, 1e-10, geometry)


def test_float32_is_near_float64(request: pytest.FixtureRequest) -> None:
    items = structures(("O", "H"))
    exact, single = ENGINES["dpa1"](request).run(items), ENGINES["dpa1_float32"](request).run(items)
    worst = max(np.abs(a["forces"] - b["forces"]).max() for a, b in zip(exact, single, strict=True))
    assert 1e-10 < worst < 1e-5
