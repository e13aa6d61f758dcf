"""Spin models against an installed deepmd-kit, live: random models, systems and spins that are stored nowhere, by both routes.

See test_deepmd_live.py for the environment: CARRYALL_DEEPMD_PYTHON, CARRYALL_LIVE_SEED, CARRYALL_LIVE_CASES (8).
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_cases import System, coin, random_settings, random_systems
from spin_reference import evaluate_together, potential, worst_error

from carryall.package.sources import read_source

PEER = Path(__file__).with_name("deepmd_live_spin_peer.py")
PYTHON = os.environ.get("CARRYALL_DEEPMD_PYTHON", "")
N_CASES = int(os.environ.get("CARRYALL_LIVE_CASES", "8"))
FARTHEST = 0.5  # Å from an atom to its virtual one
MARGINS = {"lower": 0.0, "whole": 2 * FARTHEST}

pytestmark = [
    pytest.mark.deepmd,
    pytest.mark.skipif(not PYTHON, reason="CARRYALL_DEEPMD_PYTHON names no Python with deepmd-kit"),
]


@dataclass(frozen=True)
class SpinCase:
    """One model with random weights, and systems to evaluate it on."""

    settings: dict[str, Any]
    seed: int
    systems: dict[str, tuple[System, np.ndarray]]
    inputs: dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Live:
    """Cases, and the folder with deepmd-kit's models and answers to them."""

    seed: int
    folder: Path
    cases: tuple[SpinCase, ...]


def random_case(rng: np.random.Generator) -> SpinCase:
    """Settings of DPA-1, made fit for virtual atoms, and spins that keep these within FARTHEST."""
    n_types = int(rng.integers(1, 4))
    settings = random_settings(rng, n_types)
    use_spin = [coin(rng, 0.6) for _ in range(n_types)]
    use_spin[int(rng.integers(n_types))] = True
    scale = rng.uniform(0.1, 0.4, size=n_types)
    settings["spin"] = {"use_spin": use_spin, "virtual_scale": scale.tolist()}
    # with binding sel the routes cut off different neighbours, and ties are frequent
    settings["sel"] = [90, 90]
    descriptor = settings["descriptor"]
    descriptor["use_econf_tebd"] = False
    if descriptor["env_protection"] == 0:
        del descriptor["env_protection"]
    if "smooth_type_embedding" in descriptor:
        # otherwise a virtual atom close to the cutoff has forces of few digits
        descriptor["smooth_type_embedding"] |= descriptor["attn_layer"] > 0
    systems = random_systems(rng, n_types, settings["rcut"])
    spins = {}
    for name, (x, types, _) in systems.items():
        direction = rng.normal(size=x.shape)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        spins[name] = direction * rng.uniform(0.1, FARTHEST, size=(len(x), 1)) / scale[types][:, None]
    widths = {"fparam": settings["fitting"]["numb_fparam"], "aparam": settings["fitting"]["numb_aparam"]}
    inputs = {
        name: {key: rng.normal(size=(width,) if key == "fparam" else (len(x), width)) for key, width in widths.items() if width}
        for name, (x, _, _) in systems.items()
    }
    return SpinCase(settings, int(rng.integers(1 << 30)), {k: (v, spins[k]) for k, v in systems.items()}, inputs)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    given = os.environ.get("CARRYALL_LIVE_SEED")
    seed = int(given) if given else int(np.random.SeedSequence().generate_state(1)[0])
    print(f"CARRYALL_LIVE_SEED={seed}")
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("live_spin")
    cases = tuple(random_case(rng) for _ in range(N_CASES))
    for index, case in enumerate(cases):
        (folder / f"case{index}.json").write_text(json.dumps({"settings": case.settings, "seed": case.seed}))
        geometry: dict[str, np.ndarray] = {}
        for name, ((x, types, cell), spins) in case.systems.items():
            geometry |= {f"{name}/coord": x, f"{name}/atype": types, f"{name}/cell": np.zeros(0) if cell is None else cell}
            geometry |= {f"{name}/spin": spins, **{f"{name}/{key}": value for key, value in case.inputs[name].items()}}
        np.savez(folder / f"case{index}_systems.npz", **geometry)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [PYTHON, str(PEER), str(folder)], capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, f"CARRYALL_LIVE_SEED={seed}\n{done.stderr[-3000:]}"
    return Live(seed, folder, cases)


@pytest.mark.parametrize("route", sorted(MARGINS))
@pytest.mark.parametrize("index", range(N_CASES))
def test_equals_deepmd(index: int, route: str, live: Live) -> None:
    case = live.cases[index]
    told = f"CARRYALL_LIVE_SEED={live.seed}, case {index}, {route}: {case.settings}"
    with np.load(live.folder / f"case{index}_ref.npz") as file:
        expected: dict[Any, np.ndarray] = {tuple(key.split("/")): file[key] for key in file.files}
    model = potential(read_source(live.folder / f"case{index}.dp"), "legacy", MARGINS[route])
    errors = worst_error(evaluate_together(model, case.systems, case.inputs), expected, route)
    assert {key: value for key, value in errors.items() if not value <= 1e-10} == {}, told
