"""Packing and loading: what comes back, what is refused, and what is left behind when it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

import carryall
from carryall import evaluate, load, pack
from carryall.data import AtomicData
from carryall.errors import InputError, MissingDependencyError
from carryall.graph import graph_from_structures
from carryall.models import DPA1, EagerPotential, LennardJones, SuttonChen
from carryall.package import cache, export
from carryall.package.check import PackError, check_against_eager, check_graphs, deviation
from carryall.package.compile import require_compiler
from carryall.package.from_source import load_model
from carryall.package.load import UnfitError, load_packed
from structures import CUTOFF, fcc, small_dpa1, small_lj, structure, structures

TYPES = ("O", "H")


@pytest.fixture(scope="module")
def lj_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(small_lj(), tmp_path_factory.mktemp("lj") / "deep" / "folder" / "lj.pte")


def test_an_analytic_model_packs_too(lj_pte: Path) -> None:
    assert [path.name for path in lj_pte.parent.iterdir()] == ["lj.pte"]
    items = structures(TYPES)
    for a, b in zip(evaluate(load(lj_pte), items), evaluate(EagerPotential(small_lj()), items), strict=True):
        for key in b:
            assert np.abs(a[key] - b[key]).max() <= 1e-12 * max(1.0, np.abs(b[key]).max())


def test_the_model_comes_back_out_of_the_file(dpa1: DPA1, dpa1_pte: Path, lj_pte: Path) -> None:
    again = load_model(dpa1_pte)
    state, restored = dpa1.state_dict(), again.state_dict()
    assert state.keys() == restored.keys()
    assert all(torch.equal(state[key], restored[key]) for key in state)
    assert isinstance(load_model(lj_pte), LennardJones)


def test_packing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = small_dpa1(attn_layer=0).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pack(model, tmp_path / "a0.pte", dtype="float32", check=False)
    assert model.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float64 for parameter in model.parameters())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    packed = load(tmp_path / "a0.pte")
    assert packed.spec.dtype == "float32"
    data = structure("slab", TYPES)
    single, double = evaluate(packed, data)[0], evaluate(EagerPotential(model), data)[0]
    assert 1e-9 < np.abs(single["forces"] - double["forces"]).max() < 1e-5
    with pytest.raises(InputError, match="packed in float32, not float64: pack it again with --dtype float64"):
        load(tmp_path / "a0.pte", dtype="float64")


def test_wrong_dtype_and_device_and_type(lj_pte: Path) -> None:
    packed = load(lj_pte, dtype="float64")
    with pytest.raises(InputError, match="packed in float64, not float32"):
        load(lj_pte, dtype="float32")
    with pytest.raises(InputError, match="dtype must be one of float32, float64, got 'half'"):
        load(lj_pte, dtype="half")
    for what in (lj_pte, "lj-argon"):
        with pytest.raises(InputError, match="device 'gpu' cannot be used here"):
            load(what, device="gpu")
        if not torch.cuda.is_available():
            with pytest.raises(InputError, match="device 'cuda' cannot be used here"):
                load(what, device="cuda")
    with pytest.raises(InputError, match="structure 0: atom 0 is Cu"):
        evaluate(packed, structure("open", ("Cu",)))


@pytest.mark.compile
def test_compiled_file(dpa1_pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert carryall.inspect(dpa1_pt2)["metadata"]["kind"] == "pt2"
    assert {path.suffix for path in dpa1_pt2.parent.iterdir()} <= {".pt2", ".pte"}  # no temporary folder is left

    def fail(*_: object) -> None:
        raise RuntimeError("built for another machine\nmore")

    monkeypatch.setattr("torch._C._aoti.AOTIModelPackageLoader", fail)
    with pytest.raises(
        UnfitError, match=r"does not fit here: torch .* cannot load it \(built for another machine\)\. Its source"
    ):
        load(dpa1_pt2)


def test_load_names() -> None:
    assert isinstance(load_model("lj-argon"), LennardJones)
    assert isinstance(load_model("sutton-chen"), SuttonChen)
    with pytest.raises(
        InputError, match="no such file, and no built-in potential: sutton-chan, perhaps you meant 'sutton-chen'"
    ):
        load("sutton-chan")


def test_load_casts_what_runs_from_source() -> None:
    reference = Path(__file__).parents[1] / "reference_data" / "dpa1" / "a0.dp"
    assert load(reference).spec.dtype == "float64"
    assert load(reference, dtype="float32").spec.dtype == "float32"


def test_unknown_kinds_of_file(tmp_path: Path) -> None:
    path = tmp_path / "model.xyz"
    path.write_text("")
    with pytest.raises(InputError, match=r"unknown kind of potential '\.xyz'"):
        load(path)
    with pytest.raises(InputError, match="the suffix says what to write"):
        pack(small_lj(), tmp_path / "model.pth")
    with pytest.raises(InputError, match="dtype must be one of"):
        pack(small_lj(), tmp_path / "model.pte", dtype="bfloat16")


# -- failure


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return export.trace(small_lj())


def test_a_failed_pack_leaves_nothing(program: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "trace", lambda *_: program)
    for target, error in (("carryall.package.export.check_against_eager", PackError), ("torch.export.save", OSError)):
        with monkeypatch.context() as patch:

            def fail(*_: object, error: type[Exception] = error) -> None:
                raise error("no")

            patch.setattr(target, fail)
            with pytest.raises(error):
                pack(small_lj(), tmp_path / "lj.pte")
        assert not list(tmp_path.iterdir())


def test_a_failed_pack_keeps_the_earlier_file(
    program: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "trace", lambda *_: program)
    path = tmp_path / "lj.pte"
    path.write_bytes(b"earlier")
    monkeypatch.setattr("torch.export.save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack(small_lj(), path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_program_that_does_not_reproduce_the_model_is_refused(lj_pte: Path) -> None:
    other = LennardJones(TYPES, (0.02, 0.05), (2.1, 2.3 + 1e-8), CUTOFF, "switch")
    packed = load_packed(lj_pte)
    assert check_against_eager(packed, small_lj()) < 1e-12
    with pytest.raises(PackError, match=r"differs from the model by \d\.\de-\d+ in \w+ of graph \d"):
        check_against_eager(packed, other)


def test_a_nan_counts_as_a_deviation(lj_pte: Path) -> None:
    packed = load_packed(lj_pte)

    def broken(graph: object, *, atomic_virial: bool = False) -> dict[str, torch.Tensor]:
        out = packed(graph, atomic_virial=atomic_virial)  # type: ignore[arg-type]
        return out | {"virial": out["virial"] * torch.nan}

    worst, where = deviation(broken, packed, check_graphs(packed.spec)[:1])  # type: ignore[arg-type]
    assert (worst > 1, where) == (True, "virial of graph 0")


def test_checks_see_atoms_with_and_without_neighbours() -> None:
    graphs = check_graphs(EagerPotential(small_dpa1()).spec)
    assert any(graph.n_edges == 0 for graph in graphs)
    assert any(graph.n_systems > 1 for graph in graphs)
    assert any(graph.n_local < graph.n_atoms for graph in graphs)
    assert max(graph.n_edges for graph in graphs) > 100


def test_without_a_compiler_pte_still_works(program: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "trace", lambda *_: program)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingDependencyError, match=r"no C\+\+ compiler.*apt install g\+\+.*xcode-select --install.*\.pte"):
        pack(small_lj(), tmp_path / "out" / "lj.pt2")
    assert not list(tmp_path.iterdir())
    packed = load(pack(small_lj(), tmp_path / "lj.pte"))
    data = structure("open", TYPES)
    assert float(evaluate(packed, data)[0]["energy"]) == pytest.approx(
        float(evaluate(EagerPotential(small_lj()), data)[0]["energy"])
    )


def test_the_named_compiler_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "my-compiler"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("CXX", str(own))
    assert require_compiler() == str(own)


# -- cache


def test_compiled_built_ins_are_made_once_and_mended(dpa1_pte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def fake_export(_: object, path: Path) -> Path:
        made.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(dpa1_pte, path))

    monkeypatch.setenv("CARRYALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "export_model", fake_export)
    monkeypatch.setattr(cache, "require_compiler", lambda: "c++")
    source = Path(__file__).parents[1] / "reference_data" / "dpa1" / "a0.dp"
    notes: list[str] = []
    path = cache.compiled(source, notes.append).path
    assert path.parent == tmp_path / "cache"
    assert cache.compiled(source, notes.append).path == path
    assert (len(made), len(notes)) == (1, 1)
    path.write_bytes(path.read_bytes()[:-10])
    assert cache.compiled(source, notes.append).path == path
    assert len(made) == 2
    monkeypatch.setattr("carryall.__version__", "another")
    assert cache.compiled(source, notes.append).path != path


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CARRYALL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "carryall"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "carryall"


# -- independence of the model's source

RUN_WITHOUT_SOURCE = """
import json, sys
import carryall
from carryall.data import AtomicData
from carryall.package.load import load_packed
assert carryall.__file__.startswith(sys.argv[1]), carryall.__file__
try:
    import carryall.models
except ImportError:
    pass
else:
    raise SystemExit("carryall.models is there")
data = json.loads(sys.argv[3])
(found,) = carryall.evaluate(carryall.load(sys.argv[2]), AtomicData(**data), ("energy", "forces", "virial"))
print(json.dumps({key: value.tolist() for key, value in found.items()}))
"""


def test_a_packed_file_runs_where_the_models_source_is_absent(dpa1: DPA1, dpa1_pte: Path, tmp_path: Path) -> None:
    copy = tmp_path / "site" / "carryall"
    shutil.copytree(Path(carryall.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for name in ("models", "training", "cli"):
        shutil.rmtree(copy / name, ignore_errors=True)
    for name in ("export", "trace", "compile", "pack", "rebuild", "from_source", "check", "cache"):
        (copy / "package" / f"{name}.py").unlink()
    data = structure("tilted", TYPES)
    assert data.cell is not None
    plain = {"positions": data.positions.tolist(), "atomic_numbers": data.atomic_numbers.tolist(), "cell": data.cell.tolist()}
    command = [sys.executable, "-c", RUN_WITHOUT_SOURCE, str(tmp_path / "site"), str(dpa1_pte), json.dumps(plain)]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, (expected,) = json.loads(done.stdout), evaluate(EagerPotential(dpa1), data)
    for key, value in expected.items():
        assert np.abs(np.array(found[key]) - value).max() <= 1e-12, key


@pytest.mark.compile
def test_a_compiled_file_gives_the_same_bits_each_time(dpa1_pt2: Path) -> None:
    positions, cell = fcc((5, 4, 4))
    crystal = AtomicData(positions, np.where(np.arange(len(positions)) % 2, 1, 8), cell)
    graph = graph_from_structures([crystal], CUTOFF, TYPES)
    packed, threads = load_packed(dpa1_pt2), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for call in (lambda: packed(graph, atomic_virial=True), lambda: packed.evaluate_whole(graph, True)):
            first = call()
            for _ in range(10):
                again = call()
                assert all(torch.equal(again[key], value) for key, value in first.items())
    finally:
        torch.set_num_threads(threads)
