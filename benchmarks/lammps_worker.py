"""A worker of benchmarks/lammps.py, alone or under mpirun: MD in LAMMPS by the driver, by the plugin, or by LAMMPS alone.

    python benchmarks/lammps_worker.py '{"engine": "driver", "model": "m.pt2", "data": "c.data", "symbols": ["Cu"], ...}'

Prints one JSON line: seconds a step, and of these inside the potential, on each rank, of the best repeat; with "sections" also
those of rank 0 in parts of the driver.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lammps_common import WARM, after_pair, before_pair, steps_for

from carryall.engines.lammps.library import mpi, new_lammps
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.potential import Potential, PotentialSpec

sys.path.pop(0)  # this folder, whose lammps.py would be taken for LAMMPS
QUIET = ("-screen", "none", "-log", "none", "-nocite")


class Timed:
    """A potential that adds up the seconds spent in its calls."""

    def __init__(self, potential: Potential) -> None:
        self.potential, self.spec, self.seconds = potential, potential.spec, 0.0

    def __call__(self, graph: NeighborGraph, **options: Any) -> dict[str, torch.Tensor]:
        """What the potential returns."""
        began = time.perf_counter()
        out = self.potential(graph, **options)
        self.seconds += time.perf_counter() - began
        return out


class Null:
    """No forces: what is left is the driver and LAMMPS."""

    def __init__(self, cutoff: float, symbols: tuple[str, ...]) -> None:
        self.spec = PotentialSpec(cutoff, symbols)

    def __call__(self, graph: NeighborGraph, **options: Any) -> dict[str, torch.Tensor]:
        """Zeros."""
        zeros = torch.zeros
        found = {"energy": zeros(1), "atomic_energy": zeros(graph.n_local), "forces": zeros(graph.n_atoms, 3)}
        found |= {"virial": zeros(1, 3, 3), "atomic_virial": zeros(graph.n_atoms, 3, 3)}
        return {name: value.double() for name, value in found.items()}


def timed_sections() -> dict[str, float]:
    """Has parts of the driver add their seconds to what is returned."""
    from carryall.engines.lammps import atoms, edges, forces, step

    seconds: dict[str, float] = defaultdict(float)

    def watch(owner: Any, method: str, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, method)

        def watched(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds[name] += time.perf_counter() - began

        setattr(owner, method, watched)

    watch(atoms.AtomReader, "read", "atoms in")
    watch(edges.EdgeReader, "read", "edges")
    watch(step.Part, "graph", "graph")
    watch(Timed, "__call__", "model")
    watch(forces.ForceWriter, "write", "forces out")
    watch(step.Evaluator, "_part_now", "whether ranks' atoms changed")
    watch(step.Evaluator, "_give_totals", "energy and virial")
    watch(step.Evaluator, "evaluate", "driver")
    return seconds


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    comm, timed = mpi().COMM_WORLD, None
    lmp = new_lammps(args=QUIET)
    for line in before_pair(Path(request["data"])):
        lmp.command(line)
    symbols = request["symbols"]
    sections = timed_sections() if request.get("sections") else {}
    if request["engine"] == "driver":
        timed = Timed(potential_of(request))
        from carryall.engines.lammps.attach import attach

        attach(lmp, timed, symbols)
    elif request["engine"] == "plugin":
        lmp.command(f'plugin load "{request["plugin"]}"')
        lmp.command(f'pair_style carryall "{request["model"]}"')
        lmp.command(f"pair_coeff * * {' '.join(symbols)}")
    else:
        lmp.command(f"pair_style zero {request['cutoff']} nocoeff")
        lmp.command("pair_coeff * *")
    for line in after_pair():
        lmp.command(line)
    lmp.command(f"run {WARM} post no")
    best: dict[str, Any] = {}
    steps = request.get("steps") or comm.bcast(steps_for(request["budget"], clock(lmp, comm, WARM, None)[0]))
    began, repeats = time.perf_counter(), 0
    # the first rank decides, so that all make the same number
    while comm.bcast(repeats < 2 or (repeats < request["repeats"] and time.perf_counter() - began < request["patience"])):
        sections.clear()
        seconds, inside = clock(lmp, comm, steps, timed)
        repeats += 1
        if not best or seconds < best["seconds"]:
            best = {"seconds": seconds, "inside": inside, "steps": steps}
            best["sections"] = {name: value / steps for name, value in sections.items()}
    lmp.close()
    if comm.Get_rank() == 0:
        print(json.dumps(best), flush=True)


def potential_of(request: dict[str, Any]) -> Potential:
    """A packed file, or none."""
    if not request.get("model"):
        return Null(request["cutoff"], tuple(request["symbols"]))
    from carryall.package.load import load_packed

    return load_packed(request["model"])


def clock(lmp: Any, comm: Any, steps: int, timed: Timed | None) -> tuple[float, list[float]]:
    """Seconds a step of the slowest rank, and of each rank inside the potential."""
    before = 0.0 if timed is None else timed.seconds
    comm.Barrier()
    began = time.perf_counter()
    lmp.command(f"run {steps} pre no post no")
    seconds = max(comm.allgather(time.perf_counter() - began))
    inside = comm.allgather((0.0 if timed is None else timed.seconds) - before)
    return seconds / steps, [one / steps for one in inside]


main()
