"""What a pipeline over two ranks saves, and what it costs beside the steps.

    python benchmarks/pipeline.py [--quick] [--out benchmarks/pipeline.md]

500 crystals of copper with a vacancy are relaxed and then moved 200 steps at 300 K: by one process with both stages fused, and
by a pipeline in turn on one rank, with a stage on each of two ranks, and with ranks that help each other. Every process has
one thread; all give the same energies. Then two stages whose model call takes 10 ms, as a pipeline and one after the other
without one. Wants two idle cores; takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import carryall

HERE = Path(__file__).parent
CASES = {
    "work-fused": (1, "fused stages, one process"),
    "work-turn": (1, "pipeline in turn, one rank"),
    "work-split": (2, "pipeline, a stage on each of 2 ranks"),
    "work-helping": (2, "pipeline, 2 ranks that help each other"),
    "overhead-plain": (1, "stages in flight, one after the other"),
    "overhead-turn": (1, "pipeline in turn, one rank"),
    "overhead-split": (2, "pipeline, 2 ranks"),
}
Result = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few systems: whether it runs, not what it takes")
    parser.add_argument("--out", type=Path, help="file to write the page to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {case: run(case, arguments.quick, Path(folder)) for case in CASES}
    expected = found["work-fused"]["energies"]
    for case in ("work-turn", "work-split", "work-helping"):
        if found[case]["energies"] != expected:
            raise SystemExit(f"{case} gives other energies than work-fused")
    text = page(found)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def run(case: str, quick: bool, folder: Path) -> Result:
    """What rank 0 measures of a case."""
    out, ranks = folder / f"{case}.json", CASES[case][0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    launcher = [sys.executable] if ranks == 1 else torchrun
    command = [*launcher, str(HERE / "pipeline_worker.py"), case, "quick" if quick else "full", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    result: Result = json.loads(out.read_text())
    return result


def page(found: dict[str, Result]) -> str:
    """The report."""
    fused, plain = found["work-fused"]["seconds"], found["overhead-plain"]
    work = [row(found[case], CASES[case][1], fused) for case in CASES if case.startswith("work")]
    cost = [row(found[case], CASES[case][1], plain["seconds"]) for case in CASES if case.startswith("overhead")]
    return f"""# Pipelines

{platform.machine()}, {os.cpu_count()} cores, one thread a rank; torch {torch.__version__}, carryall {carryall.__version__}; \
{datetime.now(tz=UTC).date()}.
Made by `benchmarks/pipeline.py`, whose head says what is measured.

## {len(found["work-fused"]["energies"])} relaxations, then 200 steps of dynamics each

All cases end with the same energies, bit for bit. The limit of two ranks is 0.5. Beside: what rank 0 does that is neither a
step nor waiting: the ledger, messages, systems that enter and leave.

|  | s | to fused | steps of rank 0, s | waits of rank 0, s | beside, of rank 0's time |
|---|---|---|---|---|---|
{chr(10).join(work)}

## Beside model calls of 10 ms

Two stages of 100 steps, batches saved every second. Ratio: to the same stages without a pipeline, which has no ledger.

|  | s | ratio | steps of rank 0, s | waits of rank 0, s | beside, of rank 0's time |
|---|---|---|---|---|---|
{chr(10).join(cost)}
"""


def row(result: Result, name: str, reference: float) -> str:
    """A line of a table."""
    seconds = result["seconds"]
    cells = [name, f"{seconds:.2f}", f"{seconds / reference:.3f}"]
    if "steps" in result:
        beside = seconds - result["steps"] - result["waits"]
        cells += [f"{result['steps']:.2f}", f"{result['waits']:.2f}", f"{100 * beside / (seconds - result['waits']):.1f} %"]
    else:
        cells += ["", "", ""]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
