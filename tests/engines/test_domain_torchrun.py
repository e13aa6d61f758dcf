"""Ranks of real torchrun against plain periodic torch: energies, forces, virials, per-atom values, and whole trajectories."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from domain_peer import SPREADS, STEPS, dynamics_of, hot_crystal

from carryall.graph import graph_from_structures
from carryall.models import EagerPotential
from message_passing import small_message_passing
from structures import CUTOFF, geometries, structure

PEER = Path(__file__).with_name("domain_peer.py")
SIZES = (1, 2, 3, 4)


def torchrun(size: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("domain")
    for size in SIZES:
        done = torchrun(size, str(PEER), "results", str(folder))
        assert done.returncode == 0, done.stderr[-3000:]
    return {size: pickle.loads((folder / f"{size}.pkl").read_bytes()) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", geometries())
def test_single_points_are_those_of_one_process(found: dict[int, Any], name: str, size: int) -> None:
    graph = graph_from_structures([structure(name, ("Cu", "Au"))], CUTOFF, ("Cu", "Au"))
    expected = EagerPotential(small_message_passing())(graph, atomic_virial=True)
    for balance in (one for one, names in SPREADS.items() if name in names):
        out = found[size]["points"][name, balance]
        for key, value in expected.items():
            wanted = value.detach().numpy().reshape(out[key].shape)
            assert np.abs(out[key] - wanted).max(initial=0.0) < 1e-10, (balance, key)


@pytest.mark.parametrize("name", ["nve", "langevin"])
def test_trajectories_are_those_of_one_process(found: dict[int, Any], name: str) -> None:
    dynamics, batch = dynamics_of(name), hot_crystal()
    start = batch.positions.clone()
    dynamics.run(batch, STEPS)
    assert float((batch.positions - start).norm(dim=1).max()) > 0.8
    for size in SIZES:
        out = found[size]["trajectories"][name]
        for key in ("positions", "velocities", "forces", "virial"):
            assert np.abs(out[key] - batch.get(key).numpy()).max() < 1e-10, (size, key)
        assert abs(out["conserved"] - float(dynamics.conserved_energy(batch)[0])) < 1e-10
        assert 3 < out["rebuilds"] < STEPS / 2
        assert (out["migrations"] > 5) == (size > 1)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raise", "the disk of rank 1 is full"),
        ("kill", "another rank has ended"),
        ("nan", "rank 1: position of atom"),
    ],
)
def test_trouble_on_one_rank_ends_all_within_ten_seconds(tmp_path: Path, kind: str, words: str) -> None:
    done = torchrun(2, str(PEER), kind, str(tmp_path))
    ended = time.time()
    assert done.returncode != 0
    assert words in done.stderr
    assert ended - float((tmp_path / "began").read_text()) < 10.0
