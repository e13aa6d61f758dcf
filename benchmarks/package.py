"""The packed file: time to pack and to load beside deepmd-kit, and what packing gives over eager PyTorch.

    python benchmarks/package.py [--peer PEER_VENV/bin/python] [--out benchmarks/package.md]

The models are DPA-1 with the constructor's defaults (cutoff 6 Å, 78 neighbours an atom in the crystal of benchmarks/dpa1.py,
neuron 25/50/100, attention width 128), with and without attention, float64. Each pack is a process of its own with an empty
cache of torch's compiler; on carryall's side it includes the check against eager. Loading is timed in a fresh process, from
after `import torch` to a potential that can be called, imports included; the first call is timed apart. Evaluations are the
best of several calls on a graph that is there (no neighbour search), energy, forces and virial. Eager and packed run by the
same blocks of centres; what limits both is the matrix-product rate (with attention) and, without, memory bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from dpa1 import SIZES, best, crystal, product_rate

HERE = Path(__file__).parent
LAYERS = (2, 0)
PEER_KINDS = ("nlist", "graph")
N_ATOMS = {1: None, 16: (2, 2, 1), **{n: SIZES[n] for n in (64, 512, 4096)}}
Result = dict[str, Any]

PEER_MAKE = """
import sys; sys.path.insert(0, {here!r})
from pathlib import Path
import dpa1_peer
dpa1_peer.make_model(Path({source!r}), {layers}, "float64")
"""
PEER_PACK = """
import sys, time; sys.path.insert(0, {here!r})
from pathlib import Path
import dpa1_peer, torch
began = time.perf_counter()
dpa1_peer.make_artifact(Path({source!r}), Path({path!r}), "pt2_{kind}")
print('{{"seconds": %f}}' % (time.perf_counter() - began))
"""
PEER_LOAD = """
import time, torch
began = time.perf_counter()
from deepmd.infer import DeepPot
potential = DeepPot({path!r})
print('{{"seconds": %f}}' % (time.perf_counter() - began))
"""
PACK = """
import time, torch
began = time.perf_counter()
import carryall
carryall.pack({source!r}, {path!r}, neighbor_graph_method="graph", compress={compress})
print('{{"seconds": %f}}' % (time.perf_counter() - began))
"""
LOAD = """
import time, torch
began = time.perf_counter()
import carryall
potential = carryall.load({path!r})
loaded = time.perf_counter()
from carryall.package.check import check_graphs
graph = check_graphs(potential.spec)[0]
first = time.perf_counter()
potential(graph)
print('{{"seconds": %f, "first_call": %f}}' % (loaded - began, time.perf_counter() - first))
"""


def run(code: str, python: str, threads: int, **values: Any) -> Result:
    """What a process of its own prints last, with an empty cache for the compiler."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(threads)}
        text = code.format(here=str(HERE), **{k: str(v) if isinstance(v, Path) else v for k, v in values.items()})
        done = subprocess.run([python, "-c", text], capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: Result = json.loads(lines[-1]) if lines else {}
    return found


def evaluations(paths: dict[str, str], threads: int) -> dict[str, dict[str, float]]:
    """Seconds a call by number of atoms and by form; run in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    import carryall
    from carryall import AtomicData
    from carryall.graph.neighbor_search import graph_from_structures

    forms = {name: carryall.load(path) for name, path in paths.items() if name != "eager"}
    eager = carryall.load(paths["eager"], neighbor_graph_method="graph")
    found: dict[str, dict[str, float]] = {}
    for n_atoms, repeat in N_ATOMS.items():
        data = AtomicData([[0.0, 0, 0]], [8], torch.eye(3) * 3.2) if repeat is None else crystal(repeat)
        graph = graph_from_structures([data], eager.spec.cutoff, eager.spec.type_map)
        calls = {name: partial(potential, graph) for name, potential in {"eager": eager, **forms}.items()}
        calls["per-atom virial"] = partial(forms["pt2"], graph, atomic_virial=True)
        for call in calls.values():
            call()
        found[str(n_atoms)] = {name: best(call, 5 if n_atoms > 512 else 12) for name, call in calls.items()}
    found["limit"] = {"flops": product_rate(torch.float64)}
    return found


def two_ranks(path: Path) -> tuple[float, float]:
    """Seconds a call of one process of one thread, and of the slower of two at the same time."""
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import carryall
from dpa1 import SIZES, best, crystal
from carryall.graph.neighbor_search import graph_from_structures
potential = carryall.load({str(path)!r})
graph = graph_from_structures([crystal(SIZES[512])], potential.spec.cutoff, potential.spec.type_map)
potential(graph)
print(best(lambda: potential(graph), 10))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def together(count: int) -> float:
        command = [sys.executable, "-c", code]
        running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        return max(float(one.communicate()[0].split()[-1]) for one in running)

    return together(1), together(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", nargs=2, metavar=("PATHS", "THREADS"), help=argparse.SUPPRESS)
    parser.add_argument("--peer", help="python of an environment with deepmd-kit 3.2; without it, carryall alone")
    parser.add_argument("--layers", type=int, nargs="*", default=LAYERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "package.md")
    arguments = parser.parse_args()
    if arguments.evaluations:
        print(json.dumps(evaluations(json.loads(arguments.evaluations[0]), int(arguments.evaluations[1]))))
        return
    with tempfile.TemporaryDirectory() as name:
        text = report(arguments, Path(name))
    arguments.out.write_text(text)
    print(text)


def report(arguments: argparse.Namespace, folder: Path) -> str:
    """The page."""
    import torch

    import carryall
    from carryall.models import DPA1, DescriptorConfig
    from carryall.package.export import source_of
    from carryall.package.serialization import deserialize_to_file

    threads, made, speed = arguments.threads, [], []
    for layers in arguments.layers:
        source = folder / f"attention{layers}.dp"
        if arguments.peer:
            run(PEER_MAKE, arguments.peer, threads, source=source, layers=layers)
        else:
            deserialize_to_file(source, source_of(DPA1(("O", "H"), DescriptorConfig(attn_layer=layers), seed=1)))
        theirs: dict[str, Result] = {}
        for kind in PEER_KINDS if arguments.peer else ():
            path = folder / f"peer-{kind}{layers}.pt2"
            packed = run(PEER_PACK, arguments.peer, threads, source=source, path=path, kind=kind)
            theirs[kind] = {"pack": packed["seconds"], "load": run(PEER_LOAD, arguments.peer, threads, path=path)["seconds"]}
        paths = {"eager": str(source)}
        for form, compress in (("pt2", False), ("pte", False), ("compressed", True)):
            path = folder / f"{form}{layers}.{'pte' if form == 'pte' else 'pt2'}"
            packed = run(PACK, sys.executable, threads, source=source, path=path, compress=compress)
            loaded = run(LOAD, sys.executable, threads, path=path)
            paths[form] = str(path)
            peers = theirs if form == "pt2" else {}
            made.append(made_row(layers, form, packed["seconds"], loaded, path.stat().st_size, peers))
            print(made[-1], flush=True)
        command = [sys.executable, __file__, "--evaluations", json.dumps(paths), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        limit = found.pop("limit")["flops"]
        speed += [speed_row(layers, int(n), times) for n, times in found.items()]
        one, two = two_ranks(Path(paths["pt2"]))
        speed.append(
            f"\n{layers} layers: two processes of one thread at the same time take {two * 1e3:.1f} ms a call at 512 atoms, one "
            f"alone {one * 1e3:.1f} ms; matrix products {limit / 1e9:.0f} GFLOP/s.\n"
        )
        print("\n".join(speed), flush=True)
    columns = ("attention layers", "atoms", "eager, ms", ".pte, ms", ".pt2, ms", "eager / .pt2", "compressed .pt2, ms")
    head = "| " + " | ".join((*columns, "with per-atom virial, ms", "more")) + " |"
    rule = "|---|---|---|---|---|---|---|---|---|"
    return f"""# Packing, loading, and packed evaluation

{platform.machine()}, {threads} threads, torch {torch.__version__}, carryall {carryall.__version__}.
Made by `benchmarks/package.py`, whose head says what is measured.

| layers | form | pack, s | load, s | first call, s | MB | deepmd-kit packs, s | loads, s | pack, ratio | load, ratio |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(made)}

{tables(speed, head, rule)}
"""


def tables(rows: list[str], head: str, rule: str) -> str:
    """Rows with a head before each run of them."""
    out, inside = [], False
    for row in rows:
        if row.startswith("|") and not inside:
            out += [head, rule]
        inside = row.startswith("|")
        out.append(row)
    return "\n".join(out)


def made_row(layers: int, form: str, seconds: float, loaded: Result, size: int, theirs: dict[str, Result]) -> str:
    """Packing and loading of one file; ratios to the peer's faster form."""
    own = {"pack": seconds, "load": loaded["seconds"]}
    cells = [str(layers), form, f"{seconds:.1f}", f"{own['load']:.2f}", f"{loaded['first_call']:.3f}", f"{size / 1e6:.1f}"]
    if theirs:
        cells += [", ".join(f"{one[what]:.1f} ({kind})" for kind, one in theirs.items()) for what in own]
        cells += [f"{mine / min(one[what] for one in theirs.values()):.2f}" for what, mine in own.items()]
    else:
        cells += [""] * 4
    return "| " + " | ".join(cells) + " |"


def speed_row(layers: int, n_atoms: int, times: dict[str, float]) -> str:
    """Evaluation of one size."""
    eager, packed, virial = times["eager"], times["pt2"], times["per-atom virial"]
    cells = [str(layers), f"{n_atoms:,}", f"{eager * 1e3:.2f}", f"{times['pte'] * 1e3:.2f}", f"{packed * 1e3:.2f}"]
    cells += [f"**{eager / packed:.1f}×**", f"{times['compressed'] * 1e3:.2f}"]
    cells += [f"{virial * 1e3:.2f}", f"{100 * (virial / packed - 1):+.0f} %"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
