"""deepmd-kit's half of test_deepmd_dicts.py: read what carryall wrote, and evaluate it. Run by deepmd-kit's own Python.

    python deepmd_dict_peer.py FOLDER

For each FOLDER/<name>.dp, with FOLDER/<name>_systems.npz and perhaps FOLDER/<name>.yaml beside it, it writes
FOLDER/<name>_peer.npz: the values of every system by the `routes` named there, and `same`, whether both files hold one tree.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import deepmd_reference as peer
from deepmd.dpmodel.utils.serialization import load_dp_model
from deepmd.pt.model.model.model import BaseModel


def main(folder: Path) -> None:
    """Answer every file in `folder`."""
    for path in sorted(folder.glob("*.dp")):
        root, text = load_dp_model(str(path)), path.with_suffix(".yaml")
        found = {"same": np.array(not text.exists() or same(root, load_dp_model(str(text))))}
        with np.load(folder / f"{path.stem}_systems.npz") as file:
            given = {key: file[key] for key in file.files}
        names = sorted({key.split("/")[0] for key in given if "/" in key})
        inputs = {n: {k: given[f"{n}/{k}"] for k in ("fparam", "aparam") if f"{n}/{k}" in given} for n in names}
        cells = {name: given[f"{name}/cell"] for name in names}
        systems = {n: (given[f"{n}/coord"], given[f"{n}/atype"], cells[n] if cells[n].size else None) for n in names}
        if root["model"]["type"] == "standard":
            for route in given["routes"]:
                found |= peer.evaluate(root["model"], systems, inputs, (str(route),))
        else:
            model = BaseModel.deserialize(root["model"]).to("cpu").eval()
            for name, system in systems.items():
                values = peer.run_dense(model, system, inputs[name])
                found |= {f"{name}/pt/{key}": np.asarray(values[key], dtype=np.float64) for key in peer.QUANTITIES}
        np.savez(folder / f"{path.stem}_peer.npz", **found)


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, arrays bit by bit."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) and type(a) is type(b)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
