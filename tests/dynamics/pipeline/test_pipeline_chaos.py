"""Twenty times in a row a rank drawn by chance is killed at a moment drawn by chance: the end is that of an undisturbed run."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from pipeline_nursery import Nursery, Run
from screening_samples import ledger_rows

from carryall.dynamics import read_hdf5

N_KILLS = 20
COUNT = 60
# each rank sleeps for 30 ms a call, and so has not done its work when the last kill comes, however fast the machine is
PLAN: dict[str, Any] = {
    "count": COUNT,
    "room": 4,
    "n_steps": 20,
    "relax_steps": 60,
    "frequency": 3,
    "checkpoint_seconds": 0.0,
    "timeout": 5.0,
    "velocities": True,
}
SLOW = {"0": 0.03, "1": 0.03}
SAME = ("index", "outcome", "steps", "energy", "fmax", "positions", "velocities", "cell", "forces", "atomic_numbers", "stages")


def n_finished(folder: Path) -> int:
    """Results in a ledger that another process is writing; 0 before there is one."""
    try:
        return sum(row[1] == "finished" for row in ledger_rows(folder))
    except sqlite3.OperationalError:
        return 0


def wait_for_results(run: Run, folder: Path, count: int) -> None:
    end = time.monotonic() + 60.0
    while n_finished(folder) < count:
        assert time.monotonic() < end, run.logs()
        time.sleep(0.01)


@pytest.mark.parametrize(("seed", "n_ranks", "helping"), [(7, [1, 1], False), (8, [2, 1], True)])
def test_twenty_kills_lose_nothing(nursery: Nursery, tmp_path: Path, seed: int, n_ranks: list[int], helping: bool) -> None:
    size, chance, folder = sum(n_ranks), random.Random(seed), tmp_path / "killed"
    plan = {**PLAN, "n_ranks": n_ranks, "helping": helping}
    whole = nursery.run(size=size, out=str(tmp_path / "whole"), folder=str(tmp_path / "whole"), **plan)
    plan |= {"out": str(tmp_path / "out"), "folder": str(folder), "resume": True, "sinks": [["h5", None]]}
    n_done = 0
    for number in range(N_KILLS):
        started = str(tmp_path / f"started {number}")
        run = nursery.start(size=size, slow=SLOW, started=started, **plan)
        for rank in range(size if number % 2 else 0):
            run.wait_for(Path(f"{started}.{rank}"))
        if number % 6 == 5:
            wait_for_results(run, folder, n_done + 1)
        time.sleep(chance.uniform(0.02, 0.9))
        killed = chance.randrange(size)
        run.signal(killed, signal.SIGKILL)
        run.wait(killed)
        assert run.codes[killed] == -signal.SIGKILL
        assert set(run.codes.values()) & {0} == set(), run.logs()  # nobody had come to an end
        if number % 4 != 1:
            # as torchrun does; else they find out by themselves
            for rank in range(size):
                if rank not in run.codes:
                    run.signal(rank, signal.SIGTERM)
        run.wait(timeout=30.0)
        assert 0 not in run.codes.values(), run.logs()
        assert n_finished(folder) >= n_done
        n_done = n_finished(folder)
    assert 0 < n_done < COUNT
    found = nursery.run(size=size, **plan)
    assert [[one[key] for key in SAME] for one in found] == [[one[key] for key in SAME] for one in whole]
    assert [row[0] for row in ledger_rows(folder)] == list(range(COUNT))
    assert ledger_rows(folder, "travelling") == ledger_rows(folder, "in_flight") == []
    batch = read_hdf5(f"{plan['out']}.None.h5")
    assert sorted(batch.system_id.tolist()) == list(range(COUNT))
    batch = batch.index_select(batch.system_id.argsort())
    for place, one in enumerate(whole):
        rows = slice(int(batch.ptr[place]), int(batch.ptr[place + 1]))
        assert batch.positions[rows].numpy().tobytes().hex() == one["positions"][1]
        assert batch.velocities[rows].numpy().tobytes().hex() == one["velocities"][1]
        assert batch.energy[place].double().numpy().tobytes().hex() == one["energy"]
