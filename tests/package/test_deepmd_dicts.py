"""Every model dict that carryall writes for deepmd-kit, read and evaluated by an installed deepmd-kit.

CARRYALL_DEEPMD_PYTHON names its Python, see tests/models/test_deepmd_live.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from carryall.package.convert import convert

REFERENCE = Path(__file__).parents[1] / "reference_data"
PEER = Path(__file__).with_name("deepmd_dict_peer.py")
PYTHON = os.environ.get("CARRYALL_DEEPMD_PYTHON", "")
SMALL = 33  # atoms; a model without a system so small takes its smallest
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}

pytestmark = [
    pytest.mark.deepmd,
    pytest.mark.skipif(not PYTHON, reason="CARRYALL_DEEPMD_PYTHON names no Python with deepmd-kit"),
]


def files() -> dict[str, Path]:
    """Reference models by name."""
    found = sorted([*REFERENCE.glob("dpa1/*.dp"), *REFERENCE.glob("bridging/*.dp"), *REFERENCE.glob("bridging/*.json.gz")])
    return {f"{path.parent.name}-{stem(path)}": path for path in found}


def stem(path: Path) -> str:
    """The name without what says how it is written; some names have dots of their own."""
    return path.name.removesuffix(".dp").removesuffix(".json.gz")


FILES = files()


def references(name: str) -> dict[str, np.ndarray]:
    """deepmd-kit's numbers of the original file, which carryall's equal (tests/models/test_dpa1_reference.py)."""
    path = FILES[name]
    with np.load(path.with_name(f"{stem(path)}_ref.npz")) as file:
        return {key: file[key] for key in file.files}


def chosen_systems(name: str) -> dict[str, np.ndarray]:
    """Geometry of the small systems of a model, their fparam and aparam, and the routes that deepmd-kit evaluates it by."""
    expected = references(name)
    with np.load(FILES[name].with_name("systems.npz")) as file:
        names = {key.split("/")[0] for key in expected}
        sizes = {one: len(file[f"{one}/coord"]) for one in names}
        kept = {one for one in names if sizes[one] <= max(SMALL, min(sizes.values()))}
        found = {key: file[key] for key in file.files if key.split("/")[0] in kept}
    parameters = {key.replace("/input/", "/"): value for key, value in expected.items() if "/input/" in key}
    found |= {key: value for key, value in parameters.items() if key.split("/")[0] in kept}
    return found | {"routes": np.array(sorted({key.split("/")[1] for key in expected} - {"input"}))}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with deepmd-kit's numbers of all converted files."""
    folder = tmp_path_factory.mktemp("dicts")
    for name, path in FILES.items():
        convert(path, folder / f"{name}.dp")
        convert(path, folder / f"{name}.yaml")
        np.savez(folder / f"{name}_systems.npz", **chosen_systems(name))
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [PYTHON, str(PEER), str(folder)], capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", FILES)
def test_deepmd_reads_what_we_write_and_has_the_same_numbers(name: str, answers: Path) -> None:
    expected = references(name)
    with np.load(answers / f"{name}_peer.npz") as file:
        found = {key: file[key] for key in file.files}
    assert found.pop("same")
    compared = found.keys() & expected.keys()
    routes = {"dense", "graph"} if name.startswith("dpa1") else {"pt"}
    assert {key.split("/")[1] for key in compared} >= {key.split("/")[1] for key in expected} & routes
    tolerance = TOLERANCE["float32" if "float32" in name else "float64"]
    for key in compared:
        prefix = key.rpartition("/")[0]
        terms = [np.abs(expected[one]).max(initial=0.0) for one in (key, f"{prefix}/atom_energy") if one in expected]
        scale = max(*terms, 1e-6) if key.endswith("energy") else max(terms[0], 1e-6)
        assert np.abs(found[key].reshape(expected[key].shape) - expected[key]).max(initial=0.0) <= tolerance * scale, key
