"""Spin models by virtual atoms: what they promise as potentials, and what they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from carryall import evaluate
from carryall.data import AtomicData
from carryall.errors import InputError
from carryall.graph import NeighborGraph, edge_vectors, graph_from_structures, pointer, validate
from carryall.models import EagerPotential, LennardJones, evaluate_model, model_from_source, model_to_source
from carryall.models.combination import LinearEnergyModel
from carryall.models.dpa1.semantics import with_method
from carryall.models.dpa1.source import set_weight_dtype
from carryall.models.spin import SpinModel, full_scale, with_virtual_atoms
from spin_models import SCALE, TYPES, small_spin, with_spins
from structures import CUTOFF, add_ghosts, small_dpa1, small_lj, structure

ALL = ("energy", "forces", "virial", "atomic_energy", "magnetic_forces")
NAMES = ("periodic", "tilted", "slab", "open", "one_atom", "one_atom_periodic", "two_far", "tiny_triclinic")
FORMS = {
    "smooth": {},
    "not smooth": {"smooth_type_embedding": False},
    "no attention": {"attn_layer": 0},
    "strip": {"tebd_input_mode": "strip"},
    "legacy": {"method": "legacy"},
    "legacy, davg": {"method": "legacy", "davg": 0.2},
    "margin": {"margin": 1.5},
}


def items(names: Sequence[str] = NAMES) -> list[AtomicData]:
    return [with_spins(structure(name, TYPES), seed) for seed, name in enumerate(names)]


def run(model: SpinModel, data: AtomicData | list[AtomicData]) -> list[dict[str, np.ndarray]]:
    return evaluate(EagerPotential(model), data, ALL)


def graph_of(model: SpinModel, data: Sequence[AtomicData]) -> NeighborGraph:
    return graph_from_structures(data, model.spec.cutoff, TYPES)


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.abs(found[key] - value).max(initial=0.0) <= tolerance * max(1.0, np.abs(value).max(initial=0.0)), key


# -- as a potential


def test_spec() -> None:
    spec = small_spin(margin=0.7).spec
    assert (spec.cutoff, spec.type_map, spec.spin, spec.extra_inputs) == (CUTOFF + 0.7, TYPES, True, ("spin",))
    assert "magnetic_forces" in spec.outputs
    assert spec.block_edges is not None
    with_all = small_spin(fitting={"numb_fparam": 2, "numb_aparam": 1, "default_fparam": (0.1, 0.2)}).spec
    assert with_all.extra_inputs == ("fparam", "aparam", "spin")
    assert with_all.default_fparam == (0.1, 0.2)
    assert small_spin(method="legacy", davg=0.1).spec.block_edges is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tilted", "open", "tiny_triclinic"])
def test_derivatives_by_finite_differences(form: str, name: str) -> None:
    # spins whose virtual atoms stay 1 mÅ away from the cutoff, where attention that is not smooth is steep
    model, data, step = small_spin(**FORMS[form]), with_spins(structure(name, TYPES), 1), 2e-5  # type: ignore[arg-type]
    assert data.spins is not None
    found = run(model, data)[0]
    moves = step * torch.eye(3 * data.n_atoms, dtype=torch.float64).reshape(-1, data.n_atoms, 3)

    def slope(plus: list[AtomicData], minus: list[AtomicData]) -> np.ndarray:
        energies = [np.array([one["energy"] for one in run(model, side)]) for side in (plus, minus)]
        return -(energies[0] - energies[1]).reshape(-1, 3) / (2 * step)

    def strained(sign: int) -> list[AtomicData]:
        turned = [torch.eye(3, dtype=torch.float64) + sign * one.reshape(3, 3) for one in step * torch.eye(9).double()]
        cells = [None if data.cell is None else data.cell @ one.T for one in turned]
        return [data.replace(positions=data.positions @ a.T, cell=cell) for a, cell in zip(turned, cells, strict=True)]

    numerical = {
        "forces": slope(*([data.replace(positions=data.positions + sign * m) for m in moves] for sign in (1, -1))),
        "magnetic_forces": slope(*([data.replace(spins=data.spins + sign * m) for m in moves] for sign in (1, -1))),
        "virial": slope(strained(1), strained(-1)),
    }
    for key, value in numerical.items():
        scale = np.abs(value).max()
        assert scale > 1e-3, key
        assert np.abs(found[key] - value).max() <= 2e-6 * scale, key


@pytest.mark.parametrize("form", FORMS)
def test_rotation_of_atoms_and_spins_together(form: str) -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    turn, model, plain = torch.from_numpy(rotation), small_spin(**FORMS[form]), items()  # type: ignore[arg-type]
    turned = [
        one.replace(
            positions=one.positions @ turn.T + 3.0,
            cell=None if one.cell is None else one.cell @ turn.T,
            spins=None if one.spins is None else one.spins @ turn.T,
        )
        for one in plain
    ]
    for found, expected in zip(run(model, turned), run(model, plain), strict=True):
        back = {key: value @ rotation if key.endswith("forces") else value for key, value in found.items()}
        back["virial"] = rotation.T @ found["virial"] @ rotation
        assert_equal(back, expected, 1e-11)
    # the spins alone are another state
    alone = run(model, [one.replace(spins=two.spins) for one, two in zip(plain, turned, strict=True)])
    assert abs(alone[0]["energy"] - run(model, plain[0])[0]["energy"]) > 1e-6


def test_permutation_supercell_and_batches() -> None:
    model, plain = small_spin((True, False)), items()
    together = run(model, plain)
    for index, (data, expected) in enumerate(zip(plain, together, strict=True)):
        assert_equal(run(model, data)[0], expected)
        order = np.random.default_rng(index).permutation(data.n_atoms)
        assert data.spins is not None
        other = data.replace(
            positions=data.positions[order], atomic_numbers=data.atomic_numbers[order], spins=data.spins[order]
        )
        per_atom = {key: value[order] if key not in ("energy", "virial") else value for key, value in expected.items()}
        assert_equal(run(model, other)[0], per_atom, 1e-11)
    data = plain[NAMES.index("tiny_triclinic")]
    assert data.cell is not None
    assert data.spins is not None
    double = AtomicData(
        torch.cat([data.positions, data.positions + data.cell[0]]),
        torch.cat([data.atomic_numbers] * 2),
        data.cell * torch.tensor([[2.0], [1.0], [1.0]], dtype=torch.float64),
        spins=torch.cat([data.spins] * 2),
    )
    expected = {key: 2 * v if key in ("energy", "virial") else np.concatenate([v, v]) for key, v in run(model, data)[0].items()}
    assert_equal(run(model, double)[0], expected, 1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_ghosts_blocks_and_ranks(form: str) -> None:
    model = small_spin(**FORMS[form])  # type: ignore[arg-type]
    graph = graph_of(model, items())
    ghosted = add_ghosts(graph)
    assert graph.spin is not None
    assert ghosted.ghost_owner is not None
    ghosted = validate(ghosted.replace(spin=torch.cat([graph.spin, graph.spin[ghosted.ghost_owner]])))
    plain, found = evaluate_model(model, graph, atomic_virial=True), evaluate_model(model, ghosted, atomic_virial=True)
    for key in ("forces", "magnetic_forces", "atomic_virial"):
        local, ghosts = found[key][: graph.n_atoms], found[key][graph.n_atoms :]
        assert bool(ghosts.any()), key
        found[key] = local.index_add(0, ghosted.ghost_owner, ghosts)
    eager = EagerPotential(model)(graph, atomic_virial=True)
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-11)
        torch.testing.assert_close(eager[key], value, rtol=0, atol=1e-12)


def test_ranks_share_magnetic_forces() -> None:
    model = small_spin()
    graph = graph_of(model, items(["open"]))
    whole = evaluate_model(model, graph)
    total = {key: torch.zeros_like(whole[key]) for key in ("forces", "magnetic_forces")}
    for order in (torch.arange(7), torch.tensor([4, 5, 6, 0, 1, 2, 3])):
        n_local = 4 if order[0] == 0 else 3
        place = torch.empty_like(order)
        place[order] = torch.arange(7)
        mine = place[graph.edge_center] < n_local
        center, sort = place[graph.edge_center[mine]], place[graph.edge_center[mine]].argsort(stable=True)
        rank = graph.replace(
            positions=graph.positions[order],
            atom_types=graph.atom_types[order],
            edge_center=center[sort],
            edge_neighbor=place[graph.edge_neighbor[mine]][sort],
            edge_shift=graph.edge_shift[mine][sort],
            edge_mask=graph.edge_mask[mine][sort],
            ptr=pointer(center[sort], n_local),
            spin=None if graph.spin is None else graph.spin[order],
        )
        out = EagerPotential(model)(rank)
        torch.testing.assert_close(out["atomic_energy"], whole["atomic_energy"][order[:n_local]], rtol=1e-12, atol=1e-13)
        for key in total:
            total[key][order] += out[key]
    for key, value in total.items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=1e-12)


def test_magnetic_forces_are_there_for_potentials_with_spins_only() -> None:
    data = items(["open"])
    lj = EagerPotential(LennardJones(TYPES, (0.02, 0.05), (2.1, 2.3), CUTOFF))
    assert "magnetic_forces" not in lj(graph_from_structures(data, CUTOFF, TYPES))
    with pytest.raises(InputError, match="takes no spins, so it has no magnetic_forces"):
        evaluate(lj, data, ["magnetic_forces"])


@pytest.mark.parametrize(("spins", "message"), [(None, "spin is missing for atom 0, 1, 2"), (np.ones(7), "as vectors")])
def test_spins_that_are_not_there(spins: np.ndarray | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(small_spin(), structure("open", TYPES).replace(spins=spins))
    model, graph = small_spin(), graph_from_structures([structure("open", TYPES)], CUTOFF, TYPES)
    with pytest.raises(InputError, match="needs spin, three numbers for each atom"):
        model(graph, edge_vectors(graph))


def test_a_structure_without_spins_is_named_in_a_batch() -> None:
    with pytest.raises(InputError, match="spin is missing for atom 8, 9"):
        run(small_spin(), [items(["tilted"])[0], structure("open", TYPES)])


# -- spins that nobody sees, zero spins, the cutoff


def test_types_without_spins() -> None:
    model, data = small_spin((False, True)), items(["tilted"])[0]
    assert data.spins is not None
    found = run(model, data)[0]
    oxygen = data.atomic_numbers.numpy() == 8
    assert not found["magnetic_forces"][oxygen].any()
    assert found["magnetic_forces"][~oxygen].any(1).all()
    changed = data.spins.clone()
    changed[torch.from_numpy(oxygen)] = 1e3
    assert_equal(run(model, data.replace(spins=changed))[0], found, 0.0)


@pytest.mark.parametrize("attn_layer", [0, 1])
def test_zero_spins_are_finite_and_near_small_ones_without_attention(attn_layer: int) -> None:
    model, data = small_spin(attn_layer=attn_layer), structure("tilted", TYPES)
    spins = np.random.default_rng(3).normal(size=(8, 3))
    spins[:4] = 0
    nearly = spins.copy()
    nearly[:4] = 1e-12
    zero, small = (run(model, data.replace(spins=one))[0] for one in (spins, nearly))
    assert all(np.isfinite(value).all() for value in zero.values())
    for key in ("energy", "forces", "virial"):
        assert (np.abs(zero[key] - small[key]).max() < 1e-8) == (attn_layer == 0), key


@pytest.mark.parametrize("attn_layer", [0, 1])
def test_magnetic_forces_at_zero_spin(attn_layer: int) -> None:
    """The central difference leaves out the cusp, and, for attention, does not exist: there the force is finite."""
    model, data, step = small_spin(attn_layer=attn_layer), structure("tilted", TYPES), 1e-7
    spins = np.random.default_rng(3).normal(size=(8, 3))
    spins[2] = 0

    def energy(change: np.ndarray) -> float:
        moved = spins.copy()
        moved[2] += change
        return float(run(model, data.replace(spins=moved))[0]["energy"])

    found = run(model, data.replace(spins=spins))[0]["magnetic_forces"][2]
    numerical = np.array([-(energy(e) - energy(-e)) / (2 * step) for e in step * np.eye(3)])
    if attn_layer:
        assert np.abs(found).max() < 1e3
    else:
        assert np.abs(found).max() > 1e-4
        assert np.abs(found - numerical).max() < 1e-4 * np.abs(found).max()


def two_at(distance: float, spins: list[list[float]]) -> AtomicData:
    return AtomicData([[0.0, 0, 0], [distance, 0, 0]], [8, 8], spins=spins)


def test_energies_step_at_the_cutoff_unless_the_margin_is_wide_enough() -> None:
    """A virtual atom 0.6 Å inside the cutoff comes and goes with its atom, or does not."""
    spins, eps = [[0.0, 1.0, 0.0], [-2.0, 0.0, 0.0]], 1e-9
    steps = {}
    for margin in (0.0, 1.3):
        model = small_spin(margin=margin, attn_layer=0)
        inside, outside = (float(run(model, two_at(CUTOFF + d, spins))[0]["energy"]) for d in (-eps, eps))
        steps[margin] = abs(inside - outside)
        far = float(run(model, two_at(CUTOFF + 1.3, spins))[0]["energy"])
        alone = sum(float(run(model, AtomicData([[0.0, 0, 0]], [8], spins=[one]))[0]["energy"]) for one in spins)
        assert far == pytest.approx(alone, abs=1e-12)
    assert steps[0.0] > 1e-5
    assert steps[1.3] < 1e-11


def test_edges_beyond_the_cutoff_do_not_count() -> None:
    """A graph may hold more than it has to: real neighbours are cut off where the backbone ends."""
    model = small_spin()
    data = items(["periodic"])
    wide = graph_from_structures(data, CUTOFF + 1.0, TYPES)
    margin = SpinModel(model.backbone, model.use_spin, model.virtual_scale, 1.0)
    a, b = evaluate_model(model, wide), evaluate_model(margin, wide)
    for key in a:
        assert torch.equal(a[key], b[key]), key
    near = evaluate_model(model, graph_of(model, data))
    assert float((a["energy"] - near["energy"]).abs()) > 1e-6


# -- the graph with virtual atoms


def test_with_virtual_atoms() -> None:
    graph = graph_of(small_spin(), items(["open", "slab"])).replace(aparam=torch.arange(15.0).double()[:, None])
    graph = graph.replace(rank=torch.arange(int(graph.ptr.diff().max()) + 2))
    offset = 0.1 * torch.randn(graph.n_atoms, 3, dtype=torch.float64)
    visible = torch.arange(graph.n_atoms) % 3 > 0
    wide, vectors = with_virtual_atoms(graph, edge_vectors(graph), offset, visible, 2)
    validate(wide)
    torch.testing.assert_close(edge_vectors(wide), vectors, rtol=0, atol=1e-14)
    n = graph.n_atoms
    assert (wide.n_local, wide.n_atoms, wide.n_edges) == (n, 2 * n, 2 * graph.n_edges + n)
    assert wide.atom_types.tolist() == [*graph.atom_types.tolist(), *(graph.atom_types + 2).tolist()]
    own = wide.ptr[:-1]
    assert torch.equal(wide.edge_neighbor[own], torch.arange(n) + n)
    assert torch.equal(wide.edge_mask[own], visible)
    virtual = wide.edge_neighbor >= n
    assert torch.equal(wide.edge_mask[virtual], visible[wide.edge_neighbor[virtual] - n])
    assert bool(wide.edge_mask[~virtual].all())
    assert wide.aparam is not None
    assert wide.rank is not None
    assert (wide.aparam[n:].abs().sum(), wide.spin) == (0, None)
    assert wide.rank.tolist() == list(range(2 * (int(graph.ptr.diff().max()) + 2) + 1))


# -- files


@pytest.mark.parametrize("form", FORMS)
def test_the_source_dict_gives_the_model_back(form: str) -> None:
    model = small_spin((True, False), virtual_scale=0.25, **FORMS[form])  # type: ignore[arg-type]
    source = model_to_source(model)
    assert (source["type"], source["spin"]) == ("spin_ener", {"use_spin": [True, False], "virtual_scale": [0.25, 0.25]})
    assert source["backbone_model"]["type_map"] == ["O", "H", "O_spin", "H_spin"]
    assert ("neighbor_margin" in source) == (form == "margin")
    back = model_from_source(source)
    assert isinstance(back, SpinModel)
    assert back.spec == model.spec
    for found, expected in zip(run(back, items()), run(model, items()), strict=True):
        assert_equal(found, expected, 0.0)


def test_models_that_cannot_be_read() -> None:
    source = model_to_source(small_spin())
    with pytest.raises(InputError, match="model dict has 'frozen', which carryall does not know"):
        model_from_source({**source, "frozen": True})
    with pytest.raises(InputError, match="spin of the model dict has 'allow'"):
        model_from_source({**source, "spin": {**source["spin"], "allow": 1}})
    with pytest.raises(InputError, match=r"no spin\.virtual_scale"):
        model_from_source({**source, "spin": {**source["spin"], "virtual_scale": None}})
    with pytest.raises(InputError, match="has no field 'spin'"):
        model_from_source({key: value for key, value in source.items() if key != "spin"})
    with pytest.raises(InputError, match="use_spin is for 1 types, so the backbone needs 2"):
        SpinModel(small_spin().backbone, [True], 0.3)
    with pytest.raises(InputError, match="virtual atoms of type 1, H, have an energy of their own"):
        SpinModel(small_dpa1(), [True], 0.3)
    lj = LennardJones(TYPES, (0.02, 0.05), (2.1, 2.3), CUTOFF)
    with pytest.raises(InputError, match="backbone of a spin model is a LennardJones"):
        model_from_source({**source, "backbone_model": model_to_source(lj)})
    with pytest.raises(InputError, match="neighbor_margin must not be negative"):
        small_spin(margin=-0.1)


def test_forms_of_virtual_scale() -> None:
    assert full_scale(0.3, [True, False]) == (0.3, 0.3)
    assert full_scale([0.1, 0.2], [True, False]) == (0.1, 0.2)
    assert full_scale([0.1, 0.2], [True, False, True]) == (0.1, 0.0, 0.2)
    with pytest.raises(InputError, match=r"virtual_scale has 3 numbers, expected one, 2 .* or 1"):
        full_scale([1, 2, 3], [True, False])


def test_float32_weights_and_methods() -> None:
    model, data = small_spin(), items()
    exact = run(model, data)
    with_method(model, "legacy")
    assert model.neighbor_graph_method == "legacy"
    assert abs(run(model, data)[0]["energy"] - exact[0]["energy"]) > 1e-12
    with_method(model, "graph")
    set_weight_dtype(model.backbone, torch.float32)
    assert model.spec.dtype == "float32"
    worst = max(np.abs(a["magnetic_forces"] - b["magnetic_forces"]).max() for a, b in zip(run(model, data), exact, strict=True))
    assert 1e-10 < worst < 1e-4


def test_scale_is_that_of_the_type() -> None:
    """An atom alone: its energy depends on virtual_scale * |spin| of its type."""
    model = small_spin()

    def energy(number: int, spin: float) -> float:
        return float(run(model, AtomicData([[0.0, 0, 0]], [number], spins=[[0.0, spin, 0.0]]))[0]["energy"])

    other = small_spin(virtual_scale=[0.8 * SCALE, SCALE])
    swapped = float(run(other, AtomicData([[0.0, 0, 0]], [8], spins=[[0.0, 1.0, 0.0]]))[0]["energy"])
    assert energy(8, 0.8) == pytest.approx(swapped, abs=1e-14)
    assert abs(energy(8, 1.0) - swapped) > 1e-6
    assert abs(energy(1, 1.0) - energy(8, 1.0)) > 1e-6


def test_a_combination_hands_spins_on() -> None:
    model, data = small_spin(), items(["tilted"])[0]
    both = LinearEnergyModel([model, small_lj()], TYPES, weights=(0.5, 2.0))
    assert both.spec.spin
    found, alone = (evaluate(EagerPotential(one), data, ALL)[0] for one in (both, model))
    pair = evaluate(EagerPotential(small_lj()), data)[0]
    assert np.abs(alone["magnetic_forces"]).max() > 1e-3
    assert np.abs(found["magnetic_forces"] - 0.5 * alone["magnetic_forces"]).max() < 1e-14
    assert np.abs(found["forces"] - 0.5 * alone["forces"] - 2.0 * pair["forces"]).max() < 1e-12
