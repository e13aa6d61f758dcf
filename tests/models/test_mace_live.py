"""MACE itself through carryall's LAMMPS driver on 1 to 4 MPI ranks, against MACE's own ASE calculator; random weights.

MACE has an environment of its own; CARRYALL_MACE_PYTHON names its Python:

    python -m venv mace && mace/bin/pip install "torch==2.13.0" "mace-torch==0.3.16" carryall lammps mpich mpi4py
    CARRYALL_MACE_PYTHON=mace/bin/python pytest -m peer tests/models/test_mace_live.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import carryall

PEER = Path(__file__).with_name("mace_live_peer.py")
PYTHON = os.environ.get("CARRYALL_MACE_PYTHON", "")
CASES = ["two/small", "two/tilted", "two/cluster", "three/tilted", "three/long", "three/cluster"]
CASES += ["float32/tilted", "wrapped/tilted", "wrapped/cluster"]
RANKS = (1, 2, 3, 4)

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON, reason="CARRYALL_MACE_PYTHON names no Python with mace-torch"),
]

Results = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """MACE's answers ("reference"), and those of each number of ranks; CARRYALL_MACE_RESULTS names a folder of earlier ones."""
    given = os.environ.get("CARRYALL_MACE_RESULTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("mace")
    source = str(Path(carryall.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "10"}
    launcher = str(Path(PYTHON).parent / "mpirun")
    commands = {"reference": [PYTHON, str(PEER), str(folder), "reference"]}
    commands |= {f"ranks_{size}": [launcher, "-n", str(size), PYTHON, str(PEER), str(folder)] for size in RANKS}
    found = {}
    for name, command in commands.items():
        if not (folder / f"{name}.npz").exists():
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
            assert done.returncode == 0, (name, done.stdout[-2000:], done.stderr[-3000:])
        with np.load(folder / f"{name}.npz") as file:
            found[name] = {key: file[key] for key in file.files}
    return found


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_equals_mace_itself(case: str, size: int, live: dict[str, Results]) -> None:
    expected, found = live["reference"], live[f"ranks_{size}"]
    tolerance = 1e-4 if case.startswith("float32") else 1e-10
    names = ["energy", "forces"] if case.endswith("cluster") else ["energy", "forces", "virial"]
    assert np.abs(expected[f"{case}/forces"]).max() > 1e-3
    for name in names:
        value = expected[f"{case}/{name}"]
        scale = max(1.0, float(np.abs(value).max()))
        error = np.abs(found[f"{case}/{name}"] - value).max() / scale
        print(f"{case} on {size} ranks, {name}: {error:.1e}")
        assert error < tolerance, name


def test_some_ranks_have_no_atoms(live: dict[str, Results]) -> None:
    assert live["ranks_4"]["two/cluster/owned"].min() == 0
    assert live["ranks_4"]["two/cluster/owned"].sum() == 8
    assert live["ranks_2"]["two/tilted/owned"].min() > 0


def test_fifty_steps_with_migration_are_those_of_one_rank(live: dict[str, Results]) -> None:
    one, two = live["ranks_1"], live["ranks_2"]
    assert two["moving/migrated"] > 0
    lengths = 3.9 * np.array([4, 2, 2])
    away = two["moving/positions"] - one["moving/positions"]
    assert np.abs(away - np.round(away / lengths) * lengths).max() < 1e-10
    assert np.abs(two["moving/forces"] - one["moving/forces"]).max() < 1e-10
    assert abs(two["moving/energy"] - one["moving/energy"]) < 1e-9
    assert np.abs(two["moving/virial"] - one["moving/virial"]).max() < 1e-9
