"""Programs with deepmd-kit's inputs and outputs, against eager PyTorch and, where it is installed, in deepmd-kit itself."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepmd_cases import BAR, MODELS, PYTHON, call, crystal, expected, graph_of, lammps, peer
from torch import nn

from carryall import load
from carryall.errors import InputError
from carryall.graph import NeighborGraph, concatenate, edge_vectors
from carryall.graph.potential import PotentialSpec
from carryall.models import DPA1, FittingConfig, LennardJones, model_from_source
from carryall.package.check import check_graphs
from carryall.package.deepmd_abi import check_program_against_eager, deepmd_facts, pack_for_deepmd
from carryall.package.deepmd_program import GRAPH_INPUTS, OUTPUTS, chunk_size, deepmd_inputs, trace_for_deepmd
from carryall.package.inspect import inspect
from carryall.package.sources import read_root, read_source
from structures import small_dpa1

LIVE = [
    pytest.mark.deepmd,
    pytest.mark.compile,
    pytest.mark.skipif(not PYTHON, reason="CARRYALL_DEEPMD_PYTHON names no Python with deepmd-kit"),
]
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Traced:
    """A model and its program, run by PyTorch."""

    model: nn.Module
    run: Any


@pytest.fixture(scope="module")
def traced() -> Traced:
    """DPA-1 with attention, which goes through the loop."""
    model = MODELS["dpa1"]()
    return Traced(model, trace_for_deepmd(model).module())


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == torch.float64
        scale = value.abs().max().clamp_min(1.0) if value.numel() else 1.0
        assert bool(((found[name] - value).abs() <= TOLERANCE * scale).all()), name


# -- the program


@pytest.mark.parametrize("name", sorted(MODELS))
def test_equals_eager_on_graphs_of_all_kinds(name: str) -> None:
    model = MODELS[name]()
    run = trace_for_deepmd(model).module()
    first = check_graphs(model.spec)[0]
    assert list(run(*deepmd_inputs(first, edge_vectors(first), model.spec))) == list(OUTPUTS)
    assert check_program_against_eager(lambda *inputs: run(*inputs).values(), model) <= TOLERANCE


def test_frames_of_different_sizes(traced: Traced) -> None:
    n_types = len(traced.model.spec.type_map)
    x, types, cell = crystal(n_types)
    cutoff = traced.model.spec.cutoff
    frames = [
        graph_of(x, types, cell, cutoff),
        graph_of(x[:1], types[:1], None, cutoff),
        graph_of(x[:17], types[:17], None, cutoff),
    ]
    together = concatenate(frames)
    found = call(traced.run, traced.model, together)
    assert_equal(found, expected(traced.model, together))
    assert found["mask"].tolist() == [1] * together.n_atoms
    alone = [call(traced.run, traced.model, frame) for frame in frames]
    assert torch.allclose(found["energy"], torch.cat([one["energy"] for one in alone]), rtol=0, atol=1e-12)


def halo(graph: NeighborGraph, n_local: int) -> NeighborGraph:
    """Only the first atoms owned: the others are ghosts, which have no edges towards them."""
    n_edges = int(graph.ptr[n_local])
    names = ("edge_center", "edge_neighbor", "edge_shift", "edge_mask")
    return graph.replace(ptr=graph.ptr[: n_local + 1], **{name: getattr(graph, name)[:n_edges] for name in names})


@pytest.mark.parametrize("n_local", [0, 1, 13, 48])
def test_ghosts(traced: Traced, n_local: int) -> None:
    x, types, cell = crystal(len(traced.model.spec.type_map))
    graph = halo(graph_of(x, types, cell, traced.model.spec.cutoff), n_local)
    found = call(traced.run, traced.model, graph)
    wanted = expected(traced.model, graph)
    assert_equal(found, wanted)
    assert bool((found["atom_energy"][n_local:] == 0).all())
    assert found["mask"].tolist() == [1] * n_local + [0] * (48 - n_local)
    assert n_local == 0 or float(found["energy"]) != 0


def test_ghosts_in_several_frames(traced: Traced) -> None:
    """Each frame has its owned nodes first, so that owned nodes of the second lie behind ghosts of the first."""
    x, types, cell = crystal(len(traced.model.spec.type_map))
    spec = traced.model.spec
    frames = [
        halo(graph_of(x, types, cell, spec.cutoff), 5),
        halo(graph_of(x[::-1].copy(), types[::-1].copy(), cell, spec.cutoff), 40),
    ]
    alone = [dict(zip(GRAPH_INPUTS, deepmd_inputs(*with_vectors(one), spec), strict=True)) for one in frames]
    edges = [len(one["edge_vec"]) - 2 for one in alone]
    rows = [slice(0, edges[0]), slice(0, None)]  # guard edges are at the very end
    joined = {
        name: torch.cat([one[name][rows[k]] for k, one in enumerate(alone)])
        for name in ("edge_vec", "edge_mask", "destination_order", "source_order")
    }
    joined |= {name: torch.cat([one[name] for one in alone]) for name in ("atype", "n_node", "n_local")}
    shifted = alone[1]["edge_index"] + 48 * alone[1]["edge_mask"]
    joined["edge_index"] = torch.cat([alone[0]["edge_index"][:, : edges[0]], shifted], dim=1)
    for name in ("destination_row_ptr", "source_row_ptr"):
        joined[name] = torch.cat([alone[0][name], alone[1][name][1:] + edges[0]])
    found = traced.run(*(joined[name] for name in GRAPH_INPUTS))
    wanted = [expected(traced.model, one) for one in frames]
    assert_equal(found, {name: torch.cat([one[name] for one in wanted]) for name in wanted[0]})
    assert found["mask"].sum() == 45


def test_nodes_beyond_the_frames_are_not_there(traced: Traced) -> None:
    x, types, cell = crystal(len(traced.model.spec.type_map))
    graph = graph_of(x, types, cell, traced.model.spec.cutoff)
    inputs = list(deepmd_inputs(*with_vectors(graph), traced.model.spec))
    for index in (GRAPH_INPUTS.index(name) for name in ("destination_row_ptr", "source_row_ptr")):
        inputs[index] = torch.cat([inputs[index], inputs[index][-1:].expand(3)])
    inputs[0] = torch.cat([inputs[0], torch.zeros(3, dtype=torch.int64)])
    # a frame may claim more owned nodes than it has
    inputs[GRAPH_INPUTS.index("n_local")] = torch.tensor([51])
    found = traced.run(*inputs)
    kept = {key: found[key][:48] for key in ("atom_energy", "force", "atom_virial")}
    assert_equal({**found, **kept}, expected(traced.model, graph))
    assert found["mask"].tolist() == [1] * 48 + [0] * 3


def test_ranks_add_up(traced: Traced) -> None:
    """Two ranks of one system, each with the other's atoms as ghosts: their forces and energies make those of the whole."""
    x, types, cell = crystal(len(traced.model.spec.type_map))
    cutoff = traced.model.spec.cutoff
    whole = call(traced.run, traced.model, graph_of(x, types, cell, cutoff))
    order = np.r_[20:48, 0:20]
    first = call(traced.run, traced.model, halo(graph_of(x, types, cell, cutoff), 20))
    second = call(traced.run, traced.model, halo(graph_of(x[order], types[order], cell, cutoff), 28))
    back = np.argsort(order)
    assert torch.allclose(first["force"] + second["force"][back], whole["force"], rtol=0, atol=1e-12)
    assert torch.allclose(first["energy"] + second["energy"], whole["energy"], rtol=0, atol=1e-12)
    assert torch.allclose(first["virial"] + second["virial"], whole["virial"], rtol=0, atol=1e-12)


def test_guard_edges_only(traced: Traced) -> None:
    """One atom alone has no edges but the two that stand for none, whatever they hold."""
    graph = graph_of(np.zeros((1, 3)), np.array([1]), None, traced.model.spec.cutoff)
    inputs = list(deepmd_inputs(graph, edge_vectors(graph), traced.model.spec))
    assert inputs[GRAPH_INPUTS.index("edge_vec")].shape == (2, 3)
    found = traced.run(*inputs)
    assert_equal(found, expected(traced.model, graph))
    inputs[GRAPH_INPUTS.index("edge_vec")] = torch.tensor([[torch.nan] * 3, [0.1, 0.2, 0.3]], dtype=torch.float64)
    again = traced.run(*inputs)
    assert torch.equal(again["energy"], found["energy"])
    assert torch.equal(again["force"], found["force"])


def test_masked_edges_and_absent_atoms_take_part_in_nothing(traced: Traced) -> None:
    x, types, cell = crystal(len(traced.model.spec.type_map))
    spec = traced.model.spec
    graph = graph_of(x, types, cell, spec.cutoff)
    hidden = graph.replace(edge_mask=(graph.edge_center != 7) & (graph.edge_neighbor != 7))
    inputs = list(deepmd_inputs(hidden, edge_vectors(hidden), spec))
    by_mask = traced.run(*inputs)
    assert_equal(by_mask, expected(traced.model, hidden))
    inputs[5] = torch.cat([graph.edge_mask, torch.zeros(2, dtype=torch.bool)])
    inputs[0] = torch.where(torch.arange(48) == 7, -1, graph.atom_types)
    absent = traced.run(*inputs)
    assert torch.allclose(absent["force"], by_mask["force"], rtol=0, atol=1e-13)
    lone = by_mask["atom_energy"][7]
    assert torch.allclose(absent["energy"][0], by_mask["energy"][0] - lone, rtol=0, atol=1e-12)
    assert float(absent["atom_energy"][7]) == 0
    assert float(lone) != 0


def test_parameters(tmp_path: Path) -> None:
    fitting = FittingConfig(neuron=(8, 8), numb_fparam=2, numb_aparam=3, default_fparam=(0.1, 0.2))
    base = small_dpa1()
    model = DPA1(base.type_map, base.descriptor.config, fitting)
    assert deepmd_facts(model)["has_default_fparam"]
    run = trace_for_deepmd(model).module()
    assert len(deepmd_inputs(*with_vectors(check_graphs(model.spec)[0]), model.spec)) == 12
    assert check_program_against_eager(lambda *inputs: run(*inputs).values(), model) <= TOLERANCE
    first = check_graphs(model.spec)[0]
    changed = first.replace(aparam=first.aparam + 1)  # type: ignore[operator]
    assert float((call(run, model, first)["energy"] - call(run, model, changed)["energy"]).abs()) > 1e-6


def with_vectors(graph: NeighborGraph) -> tuple[NeighborGraph, torch.Tensor]:
    return graph, edge_vectors(graph)


def test_a_program_that_is_wrong_is_noticed(traced: Traced) -> None:
    def wrong(*inputs: torch.Tensor) -> list[torch.Tensor]:
        return [value * (1 + 1e-9) if name == "force" else value for name, value in traced.run(*inputs).items()]

    with pytest.raises(Exception, match="force of graph"):
        check_program_against_eager(wrong, traced.model)


def test_loops_are_for_models_that_lay_out_neighbors() -> None:
    assert chunk_size(small_dpa1().spec) is not None
    assert chunk_size(LennardJones.argon().spec) is None
    assert chunk_size(PotentialSpec(cutoff=5.0, type_map=("H",), block_edges=40)) == 1


# -- what cannot be packed


def test_energies_that_depend_on_the_order_of_atoms_are_refused(tmp_path: Path) -> None:
    model = small_dpa1()
    model.neighbor_graph_method = "legacy"
    model.descriptor.davg += 0.1
    with pytest.raises(InputError, match=r"first.*--neighbor-graph-method graph"):
        pack_for_deepmd(model, tmp_path / "model.pt2")


def test_only_pt2(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.pt2"):
        pack_for_deepmd(LennardJones.argon(), tmp_path / "model.pte")
    assert not list(tmp_path.iterdir())


# -- the file


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DPA-1, compiled; it has been compared with the model."""
    return pack_for_deepmd(MODELS["dpa1"](), tmp_path_factory.mktemp("abi") / "dpa1.pt2", training_config={"steps": 3})


@pytest.mark.compile
def test_the_file(packed: Path) -> None:
    model = MODELS["dpa1"]()
    facts = inspect(packed)["metadata"]
    assert facts["target"] == "deepmd"
    assert facts["output_keys"] == list(OUTPUTS)
    for key in ("type_map", "rcut", "sel", "nnei", "dim_fparam", "dim_aparam", "do_atomic_virial", "mixed_types"):
        assert key in facts
    with zipfile.ZipFile(packed) as archive:
        assert all(name.startswith("model/") for name in archive.namelist())
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        root = json.loads(archive.read("model/extra/model.json"))
    assert root["model"]["@variables"]["out_bias"]["@is_variable"]  # deepmd-kit's form of an array
    again = model_from_source(read_source(packed)).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    assert read_root(packed)["model_def_script"] == {"steps": 3}
    with pytest.raises(InputError, match="carryall rebuild"):
        load(packed)


@pytest.fixture(scope="module")
def analytic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that deepmd-kit has no dict for."""
    return pack_for_deepmd(MODELS["sutton_chen"](), tmp_path_factory.mktemp("abi") / "metal.pt2")


LIVE_FILES = {"dpa1": "packed", "sutton_chen": "analytic"}

PEER = """
import sys
import numpy as np
from deepmd.infer import DeepPot
folder, out = sys.argv[1], {}
given = dict(np.load(f"{folder}/given.npz"))
potential = DeepPot(f"{folder}/model.pt2")
assert potential.get_type_map() == list(given["type_map"]) and potential.get_rcut() == given["cutoff"]
for name, cell in (("pbc", given["cell"].reshape(3, 9)), ("open", None)):
    values = potential.eval(given["x"], cell, given["types"], atomic=True)
    out |= {f"{name}/{key}": value for key, value in zip(("energy", "force", "virial", "atom_energy", "atom_virial"), values)}
out["one/energy"], out["one/force"], _ = potential.eval(given["x"][:1, :1], None, given["types"][:1])
np.savez(f"{folder}/found.npz", **out)
"""


@pytest.mark.parametrize("name", sorted(LIVE_FILES))
class TestLive:
    """The stock deepmd-kit runs the file with our numbers."""

    pytestmark = LIVE

    def test_python(self, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        """Three frames, periodic and open, and one atom."""
        path, model = request.getfixturevalue(LIVE_FILES[name]), MODELS[name]()
        (tmp_path / "model.pt2").symlink_to(path)
        spec = model.spec
        x, types, cell = crystal(len(spec.type_map))  # type: ignore[arg-type]
        frames = np.stack([x, x * 1.01, x + 0.05 * np.sin(np.arange(144)).reshape(48, 3)])
        cells = np.stack([cell, cell * 1.01, cell])
        np.savez(tmp_path / "given.npz", x=frames, cell=cells, types=types, type_map=spec.type_map, cutoff=spec.cutoff)
        (tmp_path / "peer.py").write_text(PEER)
        peer([PYTHON, "peer.py", str(tmp_path)], tmp_path)
        with np.load(tmp_path / "found.npz") as file:
            found = {key: torch.tensor(file[key]) for key in file.files}
        for kind in ("pbc", "open"):
            graph = concatenate(
                [graph_of(frames[k], types, cells[k] if kind == "pbc" else None, spec.cutoff) for k in range(3)]  # type: ignore[arg-type]
            )
            wanted = expected(model, graph)
            assert_equal({key: found[f"{kind}/{key}"].reshape(value.shape) for key, value in wanted.items()}, wanted)
        lone = expected(model, graph_of(frames[0, :1], types[:1], None, spec.cutoff))  # type: ignore[arg-type]
        assert float(found["one/energy"]) == pytest.approx(float(lone["energy"]), abs=TOLERANCE)
        assert float(found["one/force"].abs().max()) == 0

    @pytest.mark.parametrize("kind", ["crystal", "corner", "open"])
    def test_lammps(self, name: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        """1, 2 and 4 ranks; of a corner of a large cell, three ranks have no atoms."""
        path, model = request.getfixturevalue(LIVE_FILES[name]), MODELS[name]()
        spec = model.spec
        x, types, cell = crystal(len(spec.type_map))  # type: ignore[arg-type]
        if kind != "crystal":
            x, types, cell = x[:20] + 0.5, types[:20], np.eye(3) * 50.0
        for ranks in (1, 2, 4):
            elements: tuple[str, ...] = spec.type_map  # type: ignore[assignment]
            rows, line = lammps(path, elements, x, types, cell, kind != "open", ranks, tmp_path / str(ranks))
            # positions of the last step, since LAMMPS has moved the atoms
            graph = graph_of(rows[:, :3], types, None if kind == "open" else cell, spec.cutoff)  # type: ignore[arg-type]
            wanted = {key: value.numpy() for key, value in expected(model, graph).items()}
            force, energies = wanted["force"], wanted["atom_energy"][:, 0]
            assert np.abs(rows[:, 3:6] - force).max() <= TOLERANCE * max(1.0, np.abs(force).max()), ranks
            assert np.abs(rows[:, 6] - energies).max() <= TOLERANCE * max(1.0, np.abs(energies).max()), ranks
            assert line[1] == pytest.approx(wanted["energy"][0, 0], rel=TOLERANCE), ranks

    def test_pressure_in_lammps(self, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        """Without motion, all of the pressure is the virial's."""
        path, model = request.getfixturevalue(LIVE_FILES[name]), MODELS[name]()
        x, types, cell = crystal(len(model.spec.type_map))  # type: ignore[arg-type]
        elements: tuple[str, ...] = model.spec.type_map  # type: ignore[assignment]
        for ranks in (1, 2):
            _, line = lammps(path, elements, x, types, cell, True, ranks, tmp_path / str(ranks), steps=0, moving=False)
            virial = expected(model, graph_of(x, types, cell, model.spec.cutoff))["virial"].view(3, 3)  # type: ignore[arg-type]
            pressure = virial.numpy() / np.linalg.det(cell) * BAR
            wanted = [pressure[a, b] for a, b in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))]
            assert line[2:] == pytest.approx(wanted, rel=1e-9, abs=1e-9 * np.abs(wanted).max())
