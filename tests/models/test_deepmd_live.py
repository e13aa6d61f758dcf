"""DPA-1 against an installed deepmd-kit, live: random models on random systems that are stored nowhere, by both routes.

deepmd-kit has an environment of its own; CARRYALL_DEEPMD_PYTHON names its Python:

    python -m venv deepmd && deepmd/bin/pip install "torch==2.11.0" "deepmd-kit==3.2.0" "e3nn>=0.5.9" mpich
    CARRYALL_DEEPMD_PYTHON=deepmd/bin/python pytest -m deepmd tests/models/test_deepmd_live.py

The seed is random and stands in every failure; CARRYALL_LIVE_SEED repeats it. CARRYALL_LIVE_CASES is the number of models (8).
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from dpa1_reference import FLOAT64, METHODS, NAMES, difference, evaluate_together
from live_cases import LiveCase, random_case

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
    worst = {
        (system, quantity): difference(found[system, quantity], expected[f"{system}/{route}/{quantity}"])
        for system in case.systems
        for quantity in NAMES
    }
    assert not {key: value for key, value in worst.items() if not value <= FLOAT64}, f"{told}\n{worst}"
