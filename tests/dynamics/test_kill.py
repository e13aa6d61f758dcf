"""A relaxation that is killed at any moment and resumed gives every input exactly once, and the same bits.

CARRYALL_KILL_STRUCTURES sets the number of structures: 1000 for the long form.
"""

import os
import random
import signal
import subprocess
import sys
import time

from screening_samples import argon_structures, ledger_rows, n_done

import carryall
from carryall.data import read_structures, write_structures

COUNT = int(os.environ.get("CARRYALL_KILL_STRUCTURES", "120"))
FLAGS = ["--model", "lj-argon", "--fmax", "0.005", "--max-atoms-per-batch", "200", "--checkpoint-seconds", "0.05"]


def start(source, out, *flags):
    command = [sys.executable, "-m", "carryall", "relax", str(source), "-o", str(out), *FLAGS, *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_until(condition, process, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_three_kills_lose_nothing(tmp_path):
    source = tmp_path / "in.extxyz"
    write_structures(source, argon_structures(COUNT))
    whole = carryall.relax(
        read_structures(source),
        carryall.load("lj-argon"),
        0.005,
        out=tmp_path / "whole",
        max_atoms_per_batch=3000,
        progress=False,
    )
    assert len(whole) == COUNT
    out, rng, flags = tmp_path / "killed", random.Random(7), []
    for part in range(3):
        process = start(source, out, *flags)
        goal = rng.randint(part * COUNT // 4 + 1, (part + 1) * COUNT // 4)
        wait_until(lambda goal=goal: n_done(out) >= goal, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        assert n_done(out) < COUNT
        flags = ["--resume"]
    process = start(source, out, *flags)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    assert [row[0] for row in ledger_rows(out)] == list(range(COUNT))
    by_source = slice(6, None)  # outcome, reason, steps, energy, fmax, structure with every bit of every tensor
    assert [row[by_source] for row in ledger_rows(out)] == [row[by_source] for row in ledger_rows(tmp_path / "whole")]
    frames = read_structures(out / "relaxed.extxyz")
    assert [one.info["frame"] for one in frames] == list(range(COUNT))
    assert len((out / "results.csv").read_text().splitlines()) == COUNT + 2
