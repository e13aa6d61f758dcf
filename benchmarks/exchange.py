"""What an exchange between ranks costs: serial, MPI and gloo; and what it saves against a halo of layers times the cutoff.

    python benchmarks/exchange.py [--quick] [--out benchmarks/exchange.md]

Each transport runs in processes of its own with one thread, 2 ranks of `mpirun` and of `torchrun` (one where the package is
absent is left out). Each rank owns 1,000 or 10,000 atoms and sees 1,500 or 6,000 ghosts of the other's, of which each atom is
sent once. A time is the slowest rank's of the best of 60 repeats of 10 calls, all of which begin together. Wants two idle
cores; takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exchange_common import CUTOFF, FEATURES, LAYERS, NEIGHBORS, PEERS, edge, grown, layers_atoms, step

import carryall

HERE = Path(__file__).parent
ATOMS = 10**6
LARGE = 1 << 30  # bytes, much more than caches hold
Result = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats: whether it runs, not what it costs")
    parser.add_argument("--out", type=Path, help="file to write the page to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {kind: run(kind, arguments.quick, Path(folder)) for kind in ("serial", "mpi", "gloo")}
    text = page({kind: result for kind, result in found.items() if result}, LARGE / copy_seconds(LARGE))
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def run(kind: str, quick: bool, folder: Path) -> Result | None:
    """What the ranks of one transport find; None when there is no such transport here."""
    out = folder / f"{kind}.json"
    mpirun = Path(sys.executable).parent / "mpirun"
    if kind == "mpi" and not mpirun.exists():
        print("no mpirun beside this Python: pip install mpi4py mpich; left out", file=sys.stderr)
        return None
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher = {"serial": [sys.executable], "mpi": [str(mpirun), "-n", "2", sys.executable], "gloo": torchrun}[kind]
    command = [*launcher, str(HERE / "exchange_worker.py"), kind, "quick" if quick else "full", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    result: Result = json.loads(out.read_text())
    return result


def copy_seconds(n_bytes: int) -> float:
    """Seconds in which one thread reads and writes so many bytes, half of them each; small copies stay in caches."""
    source = np.ones(n_bytes // 2, dtype=np.uint8)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(5 if n_bytes > 1 << 24 else 200):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def fit(rows: list[Result]) -> tuple[float, float]:
    """Seconds a message and seconds a byte, of least squared relative error over forward and reverse."""
    size = np.array([row["message"] for row in rows for _ in range(2)], dtype=float)
    seconds = np.array([row[name] for row in rows for name in ("forward", "reverse")])
    matrix = np.stack([1 / seconds, size / seconds], 1)
    message, byte = np.linalg.lstsq(matrix, np.ones(len(seconds)), rcond=None)[0]
    return max(0.0, float(message)), max(0.0, float(byte))


def page(found: dict[str, Result], rate: float) -> str:
    """The report."""
    names = {"serial": "one process, images", "mpi": "MPI, 2 ranks", "gloo": "gloo, 2 ranks"}
    rows, costs = [], []
    fits = {kind: fit(result["rows"]) for kind, result in found.items() if kind != "serial"}
    for kind, result in found.items():
        for row in result["rows"]:
            least = copy_seconds(row["limit"])
            cells = [names[kind], f"{row['local']:,}", f"{row['ghost']:,}", str(row["width"]), f"{row['message']:,}"]
            cells += [f"{row[name] * 1e3:.3f}" for name in ("forward", "reverse", "op")]
            cells += [f"{least * 1e3:.4f}", f"{100 * least / row['forward']:.0f} %"]
            rows.append("| " + " | ".join(cells) + " |")
        cells = [names[kind], f"{result['call'] * 1e6:.0f}", f"{result['plan'] * 1e3:.2f}", f"{result['sum'] * 1e6:.0f}"]
        message, byte = fits.get(kind, (0.0, 0.0))
        cells += [f"{message * 1e6:.0f}", f"{byte * 1e9:.3f}", f"{1e9 * 2 / rate:.3f}"] if byte else ["", "", ""]
        costs.append("| " + " | ".join(cells) + " |")
    return f"""# Exchange between ranks

{platform.machine()}, {os.cpu_count()} cores, one thread a rank; torch {torch.__version__}, carryall {carryall.__version__}; \
{datetime.now(tz=UTC).date()}.
Made by `benchmarks/exchange.py`, whose head says what is measured. Memory: a copy moves {rate / 1e9:.1f} GB/s.

## An exchange, ms

Of rows of float64. The message is what a rank sends and receives in a call. The op is the forward exchange as a program calls
it. The limit: rows are packed, carried and put in their places, each read and written once in the time of a copy of as many
bytes, which may lie in cache.

|  | local | ghosts | width | message, bytes | forward | reverse | op | limit, forward | reached |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

## Costs of its parts

A message and a byte are fitted to the table above (least squared relative error) and hold packing and placing; the limit of a
byte is one copy.

|  | op of one row, µs | plan of 1,000 + 1,500 atoms, ms | sum of one number, µs | a message, µs | a byte, ns | limit, ns |
|---|---|---|---|---|---|---|
{chr(10).join(costs)}

{on_paper(fits, names)}
{saved()}"""


def on_paper(fits: dict[str, tuple[float, float]], names: dict[str, str]) -> str:
    """A step of a million atoms."""
    rows = []
    for ranks in (64, 512):
        n_local = ATOMS / ranks
        ghosts, messages, features, total = step(n_local)
        cells = [str(ranks), f"{n_local:,.0f}", f"{edge(n_local):.1f}", f"{ghosts:,.0f}", str(PEERS)]
        cells += [f"{messages:,}", f"{features / 1e6:.1f}", f"{total / 1e6:.1f}", f"{total / 2e6:.1f}"]
        cells += [f"{(messages * message + total * byte) * 1e3:.1f}" for message, byte in fits.values()]
        rows.append(cells)
    columns = ["ranks", "atoms", "edge, Å", "ghosts", "neighbouring ranks", "messages", "of features, MB"]
    columns += ["all, float64, MB", "all, float32, MB", *(f"{names[kind].split(',')[0]}, ms" for kind in fits)]
    return f"""## A million atoms of copper, on paper

Per rank and step: {LAYERS} layers of {FEATURES} features, cutoff {CUTOFF:g} Å ({NEIGHBORS:.0f} neighbours an atom), cubic
bricks.
Every layer sends features before it and gradients after it; positions go out once and forces come back once:
{2 * LAYERS + 2} exchanges. The last columns: messages and bytes at the costs above, which are of one machine; a network adds
its own.

{table(columns, rows)}
"""


def saved() -> str:
    """Work against a wide halo."""
    rows = []
    for n_local in (500, 1000, ATOMS / 512, 4000, ATOMS / 64, 100_000):
        exchange, needed, every = layers_atoms(n_local)
        ghosts = [grown(n_local, depth) - n_local for depth in (CUTOFF, LAYERS * CUTOFF)]
        cells = [f"{n_local:,.0f}", f"{ghosts[0]:,.0f}", f"{ghosts[1]:,.0f}", f"{exchange * NEIGHBORS / 1e3:,.0f}"]
        cells += [f"{needed * NEIGHBORS / 1e3:,.0f}", f"{needed / exchange:.1f}×"]
        cells += [f"{every * NEIGHBORS / 1e3:,.0f}", f"{every / exchange:.1f}×"]
        rows.append(cells)
    columns = ["atoms of a rank", "ghosts, exchange", "ghosts, halo", "edges, exchange, 10³"]
    columns += ["edges, halo, needed, 10³", "to exchange", "edges, halo, all, 10³", "to exchange"]
    return f"""## Work saved

Against a halo of layers times the cutoff ({LAYERS * CUTOFF:g} Å), in which a rank evaluates atoms of others again: "needed"
stops each layer where nobody needs it any more, "all" evaluates every layer for all whose neighbours are there. Edges are
summed over layers.

{table(columns, rows)}
"""


def table(columns: list[str], rows: list[list[str]]) -> str:
    """In markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
