"""Speed and memory of the shipped water potential, in each of its forms, against size.

    make bench                      # or: python benchmarks/run.py [--out benchmarks/results.md]

Each figure is the best of several calls of energy, forces and virial in float64, without the neighbour search. FLOPs are of the
matrix products that PyTorch counts in the eager model (backward included); the limit beside them is the rate of a large float64
matrix product in the same process. Peak memory is that of a process of its own, less what it takes to load the potential.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

FORMS = ("eager", ".pte", ".pt2")
Result = tuple[int, float, float, int, float, float, int]
COPIES = ((1, 1, 1), (2, 2, 2), (4, 4, 4))


def peak_megabytes() -> float:
    # ru_maxrss would be inherited from the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(path: str, copies: tuple[int, int, int]) -> Result:
    """Time, FLOPs and memory of one form at one size, in a fresh process."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import carryall
    from carryall.cli.inputs import water_frames
    from carryall.graph.neighbor_search import graph_from_structures

    potential = carryall.load(path)
    box = carryall.AtomicData.from_ase(water_frames("test")[0].to_ase().repeat(copies))
    graph = graph_from_structures([box], potential.spec.cutoff, potential.spec.type_map)
    before = peak_megabytes()
    potential(graph)
    times = []
    while len(times) < 3 or (sum(times) < 5 and len(times) < 30):
        began = time.perf_counter()
        potential(graph)
        times.append(time.perf_counter() - began)
    memory = peak_megabytes() - before
    flops = 0
    if path.endswith(".json.gz"):
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as counted:
            potential(graph)
        flops = sum(event.flops for event in counted.key_averages() if event.key in ("aten::mm", "aten::bmm", "aten::addmm"))
    n = 2048
    a = torch.randn(n, n, dtype=torch.float64)
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        rates.append(2 * n**3 / (time.perf_counter() - began))
    return graph.n_atoms, graph.n_edges / graph.n_atoms, min(times), flops, memory, max(rates), torch.get_num_threads()


def in_a_process(path: str, copies: tuple[int, int, int]) -> Result:
    """`measure` in a process of its own, whose peak memory is then its own too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, path, copies).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.md")
    out = parser.parse_args().out
    import torch

    import carryall
    from carryall.package.open import shipped

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {"eager": str(shipped("water.json.gz"))}
        for suffix in FORMS[1:]:
            began = time.perf_counter()
            paths[suffix] = str(carryall.pack("water", f"{folder}/model{suffix}"))
            lines.append(
                f"pack {suffix}: {time.perf_counter() - began:.1f} s, {Path(paths[suffix]).stat().st_size / 1e6:.2f} MB"
            )
        rows = ["| atoms | form | µs/atom | to eager | GFLOP/s | of the limit | memory, MB |", "|---|---|---|---|---|---|---|"]
        for copies in COPIES:
            base = None
            for form in FORMS:
                n_atoms, degree, seconds, flops, memory, limit, threads = in_a_process(paths[form], copies)
                base = base or (seconds, flops)
                rate = base[1] / seconds / 1e9
                rows.append(
                    f"| {n_atoms} | {form} | {1e6 * seconds / n_atoms:.0f} | {base[0] / seconds:.2f}× | {rate:.1f} "
                    f"| {100 * rate * 1e9 / limit:.0f} % of {limit / 1e9:.0f} | {memory:.0f} |"
                )
                print(rows[-1], flush=True)
    head = f"""# Shipped water potential, energy + forces + virial, float64

{platform.machine()}, {threads} threads, torch {torch.__version__}, carryall {carryall.__version__}.
{degree:.0f} neighbours an atom (5 Å). {"; ".join(lines)}.
"""
    out.write_text(head + "\n" + "\n".join(rows) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
