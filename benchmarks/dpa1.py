"""DPA-1 beside deepmd-kit: same model, same structure, same machine, same run.

    python benchmarks/dpa1.py --peer PEER_VENV/bin/python [--large] [--out benchmarks/dpa1.md]

Energy, forces and virial of a jittered fcc crystal (3.6 Å, two types in turn) with the constructor's defaults: cutoff 6 Å,
78 neighbours an atom, neuron 25/50/100, attention width 128, fitting net 120/120/120. Each figure comes from a fresh process;
times are the best of several calls. The ratio compares what a user calls, from the structure to the numbers, with the
neighbour search on both sides; "model" is carryall's share without the search. Memory is the process's peak (VmHWM) with what
importing takes, and its growth over the state before the first call. FLOPs are those of all matrix products of the eager
model, forward and backward, and the limit beside their rate is that of a large matrix product in the same process and dtype.
`--large` adds 100,000 and 1,000,000 atoms on carryall's side.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {64: (4, 2, 2), 512: (8, 4, 4), 4096: (16, 8, 8), 102400: (32, 32, 25), 1000188: (63, 63, 63)}
# the fastest of each, by size; its graph form with attention is 4 to 7 times slower than these and needs 17 GB for 512 atoms
PEER_FORMS = {0: ("pt2_graph", "pth"), 2: ("pt2_nlist", "pt_eager")}
LARGEST_EAGER = 512  # above, the peer's eager form with attention needs more than 9 GB
HERE = Path(__file__).parent
Result = dict[str, Any]


def measure(path: str, n_atoms: int, repeats: int, threads: int) -> Result:
    """carryall's half, in the process that it is called in."""
    import torch

    torch.set_num_threads(threads)
    import carryall
    from carryall.graph.neighbor_search import graph_from_structures

    potential = carryall.load(path, notify=lambda _: None)
    box = crystal(SIZES[n_atoms])
    before = memory("VmRSS")
    began = time.perf_counter()
    graph = graph_from_structures([box], potential.spec.cutoff, potential.spec.type_map)
    search_seconds = time.perf_counter() - began
    model_seconds = best(lambda: potential(graph), repeats)
    once = search_seconds + model_seconds  # minutes each
    seconds = best(lambda: carryall.evaluate(potential, [box]), repeats) if repeats > 1 else once
    dtype = getattr(torch, potential.spec.dtype)
    return {
        "seconds": seconds,
        "model_seconds": model_seconds,
        "peak_memory_gb": memory("VmHWM"),
        "growth_gb": max(memory("VmHWM") - before, 0.0),
        "limit_flops": product_rate(dtype),
        "degree": graph.n_edges / graph.n_atoms,
    }


def best(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of at least `repeats` calls; with one alone, that of the first."""
    times: list[float] = []
    while len(times) < repeats or (repeats > 1 and sum(times) < 3 and len(times) < 50):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def crystal(repeat: tuple[int, int, int]) -> Any:
    """fcc of 3.6 Å, displaced by 0.05 Å, two types in turn."""
    import numpy as np

    from carryall import AtomicData

    rng = np.random.default_rng(0)
    basis = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    corners = np.stack(np.meshgrid(*[np.arange(n) for n in repeat], indexing="ij"), -1).reshape(-1, 3)
    places = (corners[:, None] + basis).reshape(-1, 3) * 3.6
    places = places + 0.05 * rng.normal(size=places.shape)
    return AtomicData(places, np.where(np.arange(len(places)) % 2, 1, 8), np.diag(np.array(repeat) * 3.6))


def memory(field: str) -> float:
    """GB of this process; the peak is its own, since it was started afresh."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 2**20


def product_rate(dtype: Any, n: int = 2048) -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    import torch

    a = torch.randn(n, n, dtype=dtype)
    rates = []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        rates.append(2 * n**3 / (time.perf_counter() - began))
    return max(rates)


def flops_per_atom(model: Any) -> float:
    """Of all matrix products for energy and its gradient, at 64 atoms."""
    from torch.profiler import ProfilerActivity, profile

    from carryall.graph.neighbor_search import graph_from_structures
    from carryall.models import evaluate_model

    graph = graph_from_structures([crystal(SIZES[64])], model.spec.cutoff, model.spec.type_map)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as counted:
        evaluate_model(model, graph)
    products = ("aten::mm", "aten::bmm", "aten::addmm")
    return sum(event.flops for event in counted.key_averages() if event.key in products) / graph.n_atoms


def in_a_process(command: list[str]) -> Result | None:
    """The JSON that a process of its own prints last; None when it failed (out of memory, mostly)."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"failed: {' '.join(command)}\n{done.stderr[-800:]}", flush=True)
        return None
    found: Result = json.loads(lines[-1])
    return found


def ours(path: Path, n_atoms: int, repeats: int, threads: int) -> Result | None:
    """`measure` in a fresh process."""
    return in_a_process([sys.executable, __file__, "--measure", str(path), str(n_atoms), str(repeats), str(threads)])


def theirs(arguments: argparse.Namespace, folder: Path, layers: int, n_atoms: int, dtype: str) -> list[Result]:
    """The peer in each of its forms."""
    found = []
    for form in PEER_FORMS[layers]:
        if form == "pt_eager" and n_atoms > LARGEST_EAGER:
            continue
        command = [
            str(arguments.peer),
            str(HERE / "dpa1_peer.py"),
            "--attn_layer",
            str(layers),
            "--atoms",
            str(n_atoms),
            "--form",
            form,
        ]
        command += [
            "--dtype",
            dtype,
            "--model",
            str(folder / f"{layers}-{dtype}.dp"),
            "--repeats",
            str(2 if n_atoms > 600 else 5),
        ]
        command += ["--threads", str(arguments.threads), "--artifact-dir", str(folder)]
        if result := in_a_process(command):
            found.append({**result, "form": form})
    return found


def line(layers: int, dtype: str, n_atoms: int, own: Result, peers: list[Result], flops: float) -> str:
    """One row of the table."""
    micro, model = (1e6 * own[key] / n_atoms for key in ("seconds", "model_seconds"))
    rate = 1e6 * flops / model
    cells = [
        str(layers),
        dtype,
        f"{n_atoms:,}",
        f"{micro:.0f}",
        f"{model:.0f}",
        f"{own['peak_memory_gb']:.2f} ({own['growth_gb']:.2f})",
    ]
    cells += [f"{rate / 1e9:.0f}", f"{100 * rate / own['limit_flops']:.0f} % of {own['limit_flops'] / 1e9:.0f}"]
    if peers:
        best = min(peers, key=lambda one: one["seconds"])
        cells += [f"{1e6 * best['seconds'] / n_atoms:.0f} ({best['form']})", f"{best['peak_memory_gb']:.2f}"]
        cells += [f"**{best['seconds'] / own['seconds']:.1f}×**", f"{own['peak_memory_gb'] / best['peak_memory_gb']:.2f}"]
    else:
        cells += ["", "", "", ""]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| attention layers | dtype | atoms | µs/atom | model, µs/atom | peak (growth), GB | GFLOP/s | of the matrix-product rate "
    "| deepmd-kit's best, µs/atom | its peak, GB | faster | memory, ratio |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=4, metavar=("MODEL", "ATOMS", "REPEATS", "THREADS"), help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=Path, help="python of an environment with deepmd-kit 3.2; without it, carryall alone")
    parser.add_argument("--large", action="store_true", help="add 100,000 and 1,000,000 atoms")
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 0])
    parser.add_argument("--dtypes", nargs="*", default=["float64", "float32"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 512, 4096])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--artifacts", type=Path, help="folder that keeps what is compiled; a temporary one without it")
    parser.add_argument("--out", type=Path, default=HERE / "dpa1.md")
    arguments = parser.parse_args()
    if arguments.measure:
        path, *numbers = arguments.measure
        print(json.dumps(measure(path, *map(int, numbers))))
        return
    import torch

    import carryall
    from carryall.models import DPA1, DescriptorConfig, FittingConfig
    from carryall.package.from_source import load_model

    rows = [HEAD]
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.artifacts or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for layers in arguments.layers:
            for dtype in arguments.dtypes:
                peers = {n: theirs(arguments, folder, layers, n, dtype) if arguments.peer else [] for n in arguments.sizes}
                source = folder / f"{layers}-{dtype}.dp"
                if source.exists():
                    model = load_model(source, "graph")
                else:
                    precision = {"precision": dtype}
                    descriptor = DescriptorConfig(attn_layer=layers, **precision)
                    model = DPA1(("O", "H"), descriptor, FittingConfig(**precision), seed=1)
                flops = flops_per_atom(model)
                packed = carryall.pack(model, folder / f"{layers}-{dtype}.pt2", dtype=dtype)
                sizes = [*arguments.sizes, *([102400, 1000188] if arguments.large and dtype == "float64" else [])]
                for n_atoms in sizes:
                    own = ours(packed, n_atoms, 1 if n_atoms > 5000 else 5, arguments.threads)
                    if own is None:
                        continue
                    rows.append(line(layers, dtype, n_atoms, own, peers.get(n_atoms, []), flops))
                    print(rows[-1], flush=True)
    text = f"""# DPA-1, energy + forces + virial

{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, carryall {carryall.__version__} `.pt2`.
Made by `benchmarks/dpa1.py`, whose head says what is measured.
"""
    arguments.out.write_text(text + "\n" + "\n".join(rows) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
