"""A worker of benchmarks/lammps.py, alone or under torchrun: NVE over domains. Prints a JSON line as lammps_worker.py does."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from lammps_common import SKIN, TEMPERATURE, TIMESTEP, WARM, Crystal, steps_for

from carryall.data import AtomicData, Batch
from carryall.data.elements import atomic_number
from carryall.dynamics import NVE, initialize_velocities
from carryall.engines.domain.group import joined
from carryall.engines.domain.system import spread
from carryall.package.load import load_packed


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    crystal = Crystal(tuple(request["repeats_of_cell"]), request["lattice"], tuple(request["symbols"]))
    with joined() as transport:

        def total(values: list[float]) -> list[float]:
            found: list[float] = transport.all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()
            return found

        def clock(steps: int) -> float:
            total([0.0])  # all start together
            began = time.perf_counter()
            dynamics.run(part, steps)
            mine = [0.0] * transport.size
            mine[transport.rank] = time.perf_counter() - began
            return max(total(mine)) / steps

        dynamics = NVE(load_packed(request["model"]), TIMESTEP, skin=SKIN)
        part = spread(structure(crystal), dynamics, transport)
        dynamics.run(part, WARM)
        step = clock(WARM)
        # ranks agree on the number
        steps = int(total([steps_for(request["budget"], step) if transport.rank == 0 else 0.0])[0])
        times: list[float] = []
        began = time.perf_counter()
        # the first rank decides, so that all make the same number
        while total([goes_on(request, len(times), time.perf_counter() - began) if transport.rank == 0 else 0.0])[0]:
            times.append(clock(steps))
        seconds = min(times)
        if transport.rank == 0:
            print(json.dumps({"seconds": seconds, "steps": steps}), flush=True)


def goes_on(request: dict[str, Any], repeats: int, seconds: float) -> bool:
    """Whether another repeat is due."""
    return repeats < 2 or (repeats < request["repeats"] and seconds < request["patience"])


def structure(crystal: Crystal) -> Batch:
    """With velocities."""
    numbers = np.array([atomic_number(symbol) for symbol in crystal.symbols])[crystal.kinds]
    batch = Batch.from_data_list([AtomicData(crystal.positions(), numbers, np.diag(crystal.lengths))])
    return initialize_velocities(batch, TEMPERATURE, seed=1)


main()
