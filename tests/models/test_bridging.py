"""Bridged models and weighted sums against deepmd-kit 3.2.0 (scripts/make_bridging_reference.py), and in themselves.

Of deepmd-kit's routes, pt is padded, pt_expt is too, and graph is pt_expt's neighbour graph, which learned models only have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from carryall import evaluate, load, pack
from carryall.data import AtomicData
from carryall.data.elements import atomic_number
from carryall.errors import InputError
from carryall.graph import edge_vectors, graph_from_structures
from carryall.models import DPA1, EagerPotential, FittingConfig, LennardJones, model_from_source, model_to_source
from carryall.models.bridging import Bridged
from carryall.models.combination import LinearEnergyModel
from carryall.models.dpa1.semantics import with_method
from carryall.models.dpa1.source import set_weight_dtype
from carryall.models.pair_table import PairTable
from carryall.models.zbl import ZBL
from carryall.package.from_source import load_model
from carryall.package.sources import read_source
from combined_models import small_bridged, small_sum, small_table
from structures import small_dpa1, small_lj, structures

FOLDER = Path(__file__).parents[1] / "reference_data" / "bridging"
FILES = {path.name.split(".")[0]: path for path in (*FOLDER.glob("*.dp"), *FOLDER.glob("*.json.gz"))}
NAMES = {
    "energy": "energy",
    "force": "forces",
    "virial": "virial",
    "atom_energy": "atomic_energy",
    "atom_virial": "atomic_virial",
}
ROUTES = {
    "zbl": ("pt", "pt_expt"),
    "zbl_attention": ("pt", "pt_expt"),
    "zbl_stat": ("pt", "pt_expt"),
    "zbl_few": ("pt",),
    "zbl_rules": ("pt",),
    "linear": ("pt", "pt_expt"),
    "linear_mean": ("graph", "pt"),
}
# Atoms without a neighbour within 4.6 Å: with alpha = 0.1, pt has a smooth minimum that is too small there.
LOST_IN_PT = {(name, "lonely") for name in ("zbl", "zbl_stat", "zbl_rules")}
# The graph has no padding, which these learned models feel; the others agree with the padded routes.
PADDING_MATTERS = {"zbl_attention", "zbl_stat", "zbl_few", "linear_mean"}


def read_systems() -> dict[str, AtomicData]:
    with np.load(FOLDER / "systems.npz") as file:
        found = {}
        for name in sorted({key.split("/")[0] for key in file.files}):
            cell = file[f"{name}/cell"]
            numbers = [atomic_number("OH"[kind]) for kind in file[f"{name}/atype"]]
            found[name] = AtomicData(file[f"{name}/coord"], numbers, cell if cell.size else None)
    return found


SYSTEMS = read_systems()


def deviations(name: str, method: str) -> dict[tuple[str, str, str], float]:
    """Of every system, route and quantity, relative to its largest value."""
    pot = load(FILES[name], neighbor_graph_method=method)
    results = dict(zip(SYSTEMS, evaluate(pot, list(SYSTEMS.values()), tuple(NAMES.values())), strict=True))
    with np.load(FOLDER / f"{name}_ref.npz") as file:
        expected = {tuple(key.split("/")): file[key] for key in file.files}
    assert {key[1] for key in expected} == set(ROUTES[name])
    assert {key[0] for key in expected} == set(SYSTEMS)
    found = {}
    for (system, route, quantity), value in expected.items():
        ours = results[system][NAMES[quantity]].reshape(value.shape)
        found[system, route, quantity] = float(np.abs(ours - value).max() / max(np.abs(value).max(), 1e-6))
    return found


# -- as DeePMD has them


def test_the_models_are_there() -> None:
    assert sorted(FILES) == sorted(ROUTES)
    assert sorted(SYSTEMS) == ["crystal", "lonely", "molecules", "pairs", "tilted"]
    distances = (SYSTEMS["pairs"].positions[11:] - SYSTEMS["pairs"].positions[:11]).norm(dim=1)
    assert distances.tolist() == pytest.approx([0.3, 0.5, 0.69, 0.71, 0.8, 0.95, 1.1, 1.19, 1.21, 1.5, 2.0])


@pytest.mark.parametrize("name", ROUTES)
def test_padded_semantics_equal_deepmd(name: str) -> None:
    """Every padded route, but for the atoms that pt gives a wrong minimum."""
    for (system, route, quantity), error in deviations(name, "legacy").items():
        if route == "graph":
            continue
        if route == "pt" and (name, system) in LOST_IN_PT:
            assert quantity not in ("force", "energy") or error > 1e-3
        else:
            assert error <= 1e-10, (system, route, quantity)


@pytest.mark.parametrize("name", ROUTES)
def test_graph_semantics_equal_deepmd(name: str) -> None:
    """The graph route where there is one, and padded routes where padding does not matter."""
    worst = 0.0
    for (system, route, quantity), error in deviations(name, "graph").items():
        if route != "graph" and name in PADDING_MATTERS:
            worst = max(worst, error)
        elif (name, system) not in LOST_IN_PT or route != "pt":
            assert error <= 1e-10, (system, route, quantity)
    assert (worst > 1e-7) == (name in PADDING_MATTERS)


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(5))
def test_random_structures_against_deepmd(seed: int) -> None:
    """Against deepmd-kit's numpy form, which is pt_expt's padded route."""
    pytest.importorskip("deepmd")
    from deepmd.dpmodel.model.dp_linear_model import LinearEnergyModel as PeerLinear
    from deepmd.dpmodel.model.dp_zbl_model import DPZBLModel

    rng = np.random.default_rng(seed)
    cell = np.eye(3) * 6.0 + rng.uniform(-1, 1, (3, 3))
    positions, kinds = rng.uniform(0, 1, (14, 3)) @ cell, rng.integers(0, 2, 14)
    atoms = AtomicData(positions, [atomic_number("OH"[kind]) for kind in kinds], cell)
    for name, peer in (("zbl", DPZBLModel), ("zbl_attention", DPZBLModel), ("linear", PeerLinear)):
        source = read_source(FILES[name])
        pot = load(FILES[name], neighbor_graph_method="legacy")
        (found,) = evaluate(pot, [atoms], ("energy", "atomic_energy"))
        # what we write is what deepmd-kit reads
        model = peer.deserialize(model_to_source(with_method(model_from_source(source), "graph")))
        expected = model.call_common(positions[None], kinds[None], cell.reshape(1, 9))["energy"].reshape(-1)
        assert np.abs(found["atomic_energy"] - expected).max() <= 1e-10 * max(1.0, np.abs(expected).max()), name


# -- bridging


def run(model: nn.Module, structure: AtomicData) -> dict[str, np.ndarray]:
    return evaluate(EagerPotential(model), [structure], ("energy", "atomic_energy", "forces"))[0]  # type: ignore[arg-type]


def dimer(distance: float, symbols: Sequence[int] = (8, 1)) -> AtomicData:
    return AtomicData(np.array([[0.0, 0, 0], [0.6 * distance, 0.8 * distance, 0]]), list(symbols))


def weights(model: Bridged, structure: AtomicData) -> torch.Tensor:
    graph = graph_from_structures([structure], model.spec.cutoff, model.spec.type_map)
    return model.short_range_weight(graph, edge_vectors(graph))


def test_close_atoms_have_the_short_range_energy_and_far_ones_the_learned() -> None:
    model = small_bridged()
    learned, table = model.parts.models
    for distance, part in ((0.5, table), (1.599, table), (3.001, learned), (3.9, learned)):
        whole, alone = run(model, dimer(distance)), run(part, dimer(distance))
        assert np.array_equal(whole["atomic_energy"], alone["atomic_energy"])
        assert np.abs(whole["forces"] - alone["forces"]).max() <= 1e-14
    middle = run(model, dimer(2.3))["energy"]
    assert middle == pytest.approx((run(learned, dimer(2.3))["energy"] + run(table, dimer(2.3))["energy"]) / 2, abs=1e-12)


def test_the_weight_is_that_of_the_smooth_minimum() -> None:
    """The formula as it is published, where nothing underflows."""
    model = Bridged(small_lj(), small_table(), 1.0, 3.5, 0.7)
    for structure in structures(("O", "H")):
        graph = graph_from_structures([structure], 4.0, ("O", "H"))
        length = edge_vectors(graph).norm(dim=1).numpy()
        for atom, found in enumerate(model.short_range_weight(graph, edge_vectors(graph)).tolist()):
            r = length[(graph.edge_center == atom).numpy()]
            if not len(r):
                assert found == 0
                continue
            u = np.clip(((r * np.exp(-r / 0.7)).sum() / np.exp(-r / 0.7).sum() - 1.0) / 2.5, 0, 1)
            assert found == pytest.approx(1 - 10 * u**3 + 15 * u**4 - 6 * u**5, abs=1e-13)


def test_atoms_far_from_others_keep_their_learned_energy() -> None:
    """Nothing underflows: not at 4 Å with a decay of 0.001 Å, nor where there is no neighbour."""
    for alpha in (0.1, 0.001, 1e-6):
        model = Bridged(small_dpa1(), small_table(), 0.5, 1.5, alpha)
        for distance in (3.99, 50.0):
            whole, alone = run(model, dimer(distance)), run(model.parts.models[0], dimer(distance))
            assert np.array_equal(whole["atomic_energy"], alone["atomic_energy"])
            assert np.abs(whole["forces"] - alone["forces"]).max() <= 1e-15
        assert weights(model, dimer(1.0)).tolist() == pytest.approx([0.5, 0.5], abs=1e-12)


def test_smooth_at_both_ends_of_the_switch() -> None:
    """Energy, force and the derivative of the force, of two atoms at sw_rmin and sw_rmax; a step in any would show."""
    model = small_bridged()

    def curve(distance: float) -> tuple[float, float]:
        found = run(model, dimer(distance))
        return float(found["energy"]), float(found["forces"][1] @ [0.6, 0.8, 0])

    assert abs(np.diff([curve(r)[1] for r in (1.7, 2.3, 2.9)])).min() > 1e-2
    for end in (model.sw_rmin, model.sw_rmax):
        below, at, above = (curve(end + delta) for delta in (-1e-5, 0.0, 1e-5))
        assert abs(above[0] - below[0] + (above[1] + below[1]) * 1e-5) < 1e-11
        left, right = (at[1] - below[1]) / 1e-5, (above[1] - at[1]) / 1e-5
        assert abs(right - left) < 1e-2 * max(1.0, abs(left))


@pytest.mark.parametrize(("sel", "reach"), [(19, 4.0), (20, 2.0), (200, 2.0)])
def test_each_model_sees_its_own_cutoff(sel: int, reach: float) -> None:
    """Only the nearest atom is within the table's; the smooth minimum has that of the larger `sel`, like DeePMD."""
    short = PairTable(("O", "H"), small_table(cutoff=2.0).table, 2.0, sel)
    atoms = AtomicData(np.array([[0, 0, 0], [1.7, 0, 0], [0, 3.1, 0]]), [8, 1, 8])
    model = Bridged(small_dpa1(), short, 1.2, 2.4, 0.5)
    assert model.spec.cutoff == 4.0
    found, learned, table = (run(one, atoms)["atomic_energy"] for one in (model, model.parts.models[0], short))
    graph = graph_from_structures([atoms], reach, ("O", "H"))
    w = model.short_range_weight(graph, edge_vectors(graph)).numpy()
    assert 0.1 < w[0] < 0.9
    assert np.abs(found - ((1 - w) * learned + w * table)).max() <= 1e-13


def test_a_sum_reaches_as_far_as_its_longest_part() -> None:
    short, atoms = small_table(cutoff=2.0), AtomicData(np.array([[0, 0, 0], [1.7, 0, 0], [0, 5.1, 0]]), [8, 1, 8])
    reach = LennardJones(("O", "H"), (0.02, 0.05), (2.1, 2.3), 6.0)
    total = LinearEnergyModel([short, reach], weights="sum")
    assert total.spec.cutoff == 6.0
    assert run(total, atoms)["energy"] == pytest.approx(run(short, atoms)["energy"] + run(reach, atoms)["energy"], abs=1e-13)


def test_an_analytic_repulsion_bridges_as_its_table_does(tmp_path: Path) -> None:
    from carryall.models.zbl import write_zbl_table

    table = PairTable.from_file(write_zbl_table(tmp_path / "zbl.txt", ["O", "H"]), ["O", "H"], 4.0)
    by_formula, by_table = (Bridged(small_dpa1(), part, 0.7, 1.4) for part in (ZBL(("O", "H")), table))
    for distance in (0.3, 0.8, 1.05, 1.3, 1.6):
        first, second = run(by_formula, dimer(distance)), run(by_table, dimer(distance))
        assert first["energy"] == pytest.approx(second["energy"], rel=1e-6)
        assert np.abs(first["forces"] - second["forces"]).max() <= 1e-4 * np.abs(second["forces"]).max()


def test_weights_in_float32() -> None:
    model, exact = small_bridged(), small_bridged()
    set_weight_dtype(model.parts.models[0], torch.float32)  # type: ignore[arg-type]
    assert (model.spec.dtype, exact.spec.dtype) == ("float32", "float64")
    error = np.abs(run(model, dimer(2.3))["forces"] - run(exact, dimer(2.3))["forces"]).max()
    assert 1e-12 < error < 1e-5


# -- sums


def test_weights() -> None:
    parts = [small_lj(), small_table()]
    atoms = dimer(2.6)
    lj, table = (float(run(part, atoms)["energy"]) for part in parts)
    for chosen, expected in (("sum", lj + table), ("mean", (lj + table) / 2), ([0.3, -2.0], 0.3 * lj - 2 * table)):
        assert run(LinearEnergyModel(parts, weights=chosen), atoms)["energy"] == pytest.approx(expected, abs=1e-14)
    assert abs(lj) > 1e-3
    assert abs(table) > 1e-3


def test_type_maps_are_translated() -> None:
    """The same models under other orders of types, and with types that the sum does not have."""
    one = LinearEnergyModel([small_table(("O", "H")), small_lj()], ("O", "H"))
    other = LinearEnergyModel(
        [small_table(("H", "O")), LennardJones(("H", "Ar", "O"), (0.05, 9.0, 0.02), (2.3, 9.0, 2.1), 4.0, "switch")], ("O", "H")
    )
    for structure in structures(("O", "H")):
        first, second = run(one, structure), run(other, structure)
        assert np.abs(first["forces"] - second["forces"]).max(initial=0) <= 1e-13
        assert first["energy"] == pytest.approx(second["energy"], abs=1e-12)


def test_exclusions_and_biases_of_a_combination() -> None:
    source = model_to_source(small_sum())
    plain = model_from_source(source)
    changed = model_from_source(source | {"pair_exclude_types": [[0, 1]], "atom_exclude_types": [1]})
    changed.get_submodule("rules").get_buffer("out_bias").copy_(torch.tensor([0.25, 7.0]))
    atoms = AtomicData(np.array([[0, 0, 0], [1.9, 0, 0], [0, 2.3, 0]]), [8, 1, 8])
    alone = AtomicData(atoms.positions[[0, 2]], [8, 8])
    found = run(changed, atoms)["atomic_energy"]
    assert found[[0, 2]] == pytest.approx(run(plain, alone)["atomic_energy"] + 0.25, abs=1e-13)
    assert found[1] == 0
    assert np.abs(run(plain, atoms)["atomic_energy"][[0, 2]] - found[[0, 2]] + 0.25).min() > 1e-3


def test_parameters_of_systems_reach_the_models_that_take_them() -> None:
    def learned(width: int) -> DPA1:
        fitting = FittingConfig(neuron=(8, 8), numb_fparam=width)
        return DPA1(("O", "H"), small_dpa1().descriptor.config, fitting, seed=3)

    model = LinearEnergyModel([learned(2), small_lj()])
    assert model.spec.extra_inputs == ("fparam",)
    assert model.spec.dim_fparam == 2
    graph = graph_from_structures([dimer(2.0)], 4.0, ("O", "H"))
    first, second = (
        EagerPotential(model)(graph.replace(fparam=torch.tensor([row], dtype=torch.float64)))["energy"].item()
        for row in ([0.1, 0.2], [0.1, 0.9])
    )
    assert first != second
    with pytest.raises(InputError, match="share fparam, but take 2 and 3 numbers"):
        LinearEnergyModel([learned(2), learned(3)])


# -- source and packed files


@pytest.mark.parametrize("name", ROUTES)
def test_the_source_dict_gives_the_model_back(name: str) -> None:
    model = load_model(FILES[name], "graph")
    source = model_to_source(model)
    assert source["type"] == name.split("_")[0]
    again = model_from_source(source)
    assert type(again) is type(model)
    for structure in SYSTEMS.values():
        first, second = run(model, structure), run(again, structure)
        assert all(np.array_equal(first[key], second[key]) for key in first)
    original = read_source(FILES[name])
    assert {key for key in source if key not in original} == set()
    assert {key for key in original if key not in source} == set()


def test_padded_semantics_are_kept_and_switched() -> None:
    model = load_model(FILES["zbl_few"], "legacy")
    assert model.neighbor_graph_method == "legacy"
    again = model_from_source(model_to_source(model))
    assert again.neighbor_graph_method == "legacy"
    assert run(again, SYSTEMS["crystal"])["energy"] == run(model, SYSTEMS["crystal"])["energy"]
    assert with_method(again, "graph").neighbor_graph_method == "graph"
    assert abs(run(again, SYSTEMS["crystal"])["energy"] - run(model, SYSTEMS["crystal"])["energy"]) > 1e-3


@pytest.mark.parametrize(("name", "method"), [("zbl_few", "legacy"), ("linear", "graph")])
def test_packed(name: str, method: str, tmp_path: Path) -> None:
    path = pack(FILES[name], tmp_path / "model.pte", neighbor_graph_method=method)
    packed, eager = load(path), load(FILES[name], neighbor_graph_method=method)
    first, second = (evaluate(one, list(SYSTEMS.values())) for one in (packed, eager))
    for a, b in zip(first, second, strict=True):
        for key in b:
            assert np.abs(a[key] - b[key]).max() <= 1e-12 * max(1.0, np.abs(b[key]).max()), key


# -- errors


def test_bad_input() -> None:
    lj, table = small_lj(), small_table()
    for arguments, message in (
        ((1.2, 0.7), "0 <= sw_rmin < sw_rmax"),
        ((1.0, 1.0), "0 <= sw_rmin < sw_rmax"),
        ((0.7, 1.2, 0.0), "smin_alpha must be positive"),
        ((0.7, 4.5), "sw_rmax, 4.5 Å, is beyond the cutoff, 4 Å"),
    ):
        with pytest.raises(InputError, match=message):
            Bridged(lj, table, *arguments)
    with pytest.raises(InputError, match=r"model 1 of the combination \(PairTable\) knows O, H, not Cu"):
        Bridged(LennardJones(("O", "Cu"), (0.1, 0.1), (2.0, 2.0), 4.0), table, 0.7, 1.2)
    with pytest.raises(InputError, match="a combination of models needs one at least"):
        LinearEnergyModel([])
    with pytest.raises(InputError, match="weights must be 'mean', 'sum' or one number for each model, got 'average'"):
        LinearEnergyModel([lj, table], weights="average")
    with pytest.raises(InputError, match="weights has 3 numbers for 2 models"):
        LinearEnergyModel([lj, table], weights=[1, 2, 3])


def test_bad_dicts() -> None:
    source = model_to_source(small_bridged())
    for changes, message in (
        ({"models": source["models"][:1]}, "has 1 models, expected two"),
        ({"models": [source["models"][0], {"type": "pairtable"}]}, "'pairtable', perhaps you meant 'pairtab'"),
        ({"surprise": 1}, "type 'zbl' has 'surprise', which carryall does not know"),
        ({"@version": 7}, "version 7, carryall reads 1 to 2"),
        ({"@variables": {"out_bias": np.zeros((1, 3, 1))}}, r"out_bias has shape \(1, 3, 1\), expected \(1, 2, 1\)"),
    ):
        with pytest.raises(InputError, match=message):
            model_from_source(source | changes)
    with pytest.raises(InputError, match="no field 'sw_rmax'"):
        model_from_source({key: value for key, value in source.items() if key != "sw_rmax"})
