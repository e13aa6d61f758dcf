"""deepmd-kit's half of the live comparison of spin models: run by its own Python, by test_deepmd_live_spin.py.

    python deepmd_live_spin_peer.py FOLDER

For each FOLDER/<case>.json (settings and seed) and FOLDER/<case>_systems.npz it writes the model <case>.dp and the answers
<case>_ref.npz.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from deepmd_reference import save
from deepmd_spin_reference import build, evaluate


def main(folder: Path) -> None:
    """Answer every case in `folder`."""
    for path in sorted(folder.glob("*.json")):
        request = json.loads(path.read_text())
        with np.load(folder / f"{path.stem}_systems.npz") as file:
            geometry = {key: file[key] for key in file.files}
        names = sorted({key.split("/")[0] for key in geometry})
        systems, inputs = {}, {}
        for name in names:
            cell = geometry[f"{name}/cell"]
            systems[name] = (geometry[f"{name}/coord"], geometry[f"{name}/atype"], cell if cell.size else None)
            inputs[name] = {key: geometry[f"{name}/{key}"] for key in ("fparam", "aparam") if f"{name}/{key}" in geometry}
        spins = {name: geometry[f"{name}/spin"] for name in names}
        source = build(request["settings"], systems, spins, seed=request["seed"], exact=True)
        save(folder / f"{path.stem}.dp", source)
        np.savez(folder / f"{path.stem}_ref.npz", **evaluate(source, systems, spins, inputs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
