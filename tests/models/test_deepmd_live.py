"""DPA-1 against an installed deepmd-kit, live: random models on random systems that are stored nowhere, by both routes.

deepmd-kit has an environment of its own; CARRYALL_DEEPMD_PYTHON names its Python:

    python -m venv deepmd && deepmd/bin/pip install "torch==2.11.0" "deepmd-kit==3.2.0" "e3nn>=0.5.9" mpich
    CARRYALL_DEEPMD_PYTHON=deepmd/bin/python pytest -m deepmd tests/models/test_deepmd_live.py

The seed is random and stands in every failure; CARRYALL_LIVE_SEED repeats it. CARRYALL_LIVE_CASES is the number of models (8).
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from dpa1_reference import FLOAT64, METHODS, NAMES, evaluate_together
from live_cases import LiveCase, is_cut_between_equals, random_case

from carryall import load

PEER = Path(__file__).with_name("deepmd_live_peer.py")
PYTHON = os.environ.get("CARRYALL_DEEPMD_PYTHON", "")
N_CASES = int(os.environ.get("CARRYALL_LIVE_CASES", "8"))

pytestmark = [
    pytest.mark.deepmd,
    pytest.mark.skipif(not PYTHON, reason="CARRYALL_DEEPMD_PYTHON names no Python with deepmd-kit"),
]


@dataclass(frozen=True)
class Live:
    """Cases, and the folder with deepmd-kit's models and answers to them."""

    seed: int
    folder: Path
    cases: tuple[LiveCase, ...]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    given = os.environ.get("CARRYALL_LIVE_SEED")
    seed = int(given) if given else int(np.random.SeedSequence().generate_state(1)[0])
    print(f"CARRYALL_LIVE_SEED={seed}")
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("live")
    cases = tuple(random_case(rng) for _ in range(N_CASES))
    for index, case in enumerate(cases):
        (folder / f"case{index}.json").write_text(json.dumps({"settings": case.settings, "seed": case.seed}))
        geometry: dict[str, np.ndarray] = {}
        for name, (x, types, cell) in case.systems.items():
            geometry |= {f"{name}/coord": x, f"{name}/atype": types, f"{name}/cell": np.zeros(0) if cell is None else cell}
            geometry |= {f"{name}/{key}": value for key, value in case.inputs[name].items()}
        np.savez(folder / f"case{index}_systems.npz", **geometry)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [PYTHON, str(PEER), str(folder)], capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, f"CARRYALL_LIVE_SEED={seed}\n{done.stderr[-3000:]}"
    return Live(seed, folder, cases)


@pytest.mark.parametrize("route", sorted(METHODS))
@pytest.mark.parametrize("index", range(N_CASES))
def test_equals_deepmd(index: int, route: str, live: Live) -> None:
    case = live.cases[index]
    told = f"CARRYALL_LIVE_SEED={live.seed}, case {index}, {route}: {case.settings}"
    refused = live.folder / f"case{index}_{route}.txt"
    assert not refused.exists(), f"{told}\ndeepmd-kit: {refused.read_text()}"
    with np.load(live.folder / f"case{index}_ref.npz") as file:
        expected = {key: file[key] for key in file.files if key.split("/")[1] == route}
    assert {key.split("/")[0] for key in expected} == set(case.systems), told
    potential = load(live.folder / f"case{index}.dp", neighbor_graph_method=METHODS[route])
    found = evaluate_together(potential, case.systems, case.inputs)
    compared = list(case.systems)
    if route == "dense":
        sel, cutoff = int(np.sum(case.settings["sel"])), case.settings["rcut"]
        compared = [name for name in compared if not is_cut_between_equals(case.systems[name], sel, cutoff)]
    assert {"crystal", "cluster", "unwrapped", "alone"} & set(compared), told
    worst = {}
    for system, quantity in itertools.product(compared, NAMES):
        value = expected[f"{system}/{route}/{quantity}"]
        error = np.abs(found[system, quantity].reshape(value.shape) - value).max()
        worst[system, quantity] = float(error / max(size(expected, f"{system}/{route}/", quantity), 1e-6))
    assert {key: value for key, value in worst.items() if not value <= FLOAT64} == {}, told


def size(expected: dict[str, np.ndarray], prefix: str, quantity: str) -> float:
    """What an error is measured by: the largest of the terms that make up a sum, as forces and energies may cancel."""
    terms = {"energy": "atom_energy", "force": "atom_virial", "virial": "atom_virial"}.get(quantity, quantity)
    return float(max(np.abs(expected[prefix + quantity]).max(), np.abs(expected[prefix + terms]).max()))
