"""deepmd-kit's half of the live comparison: run by its own Python, by test_deepmd_live.py.

    python deepmd_live_peer.py FOLDER

For each FOLDER/<case>.json (settings and seed) and FOLDER/<case>_systems.npz it writes the model <case>.dp and the answers
<case>_ref.npz, or the reason <case>_<route>.txt why deepmd-kit has none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from deepmd_reference import build, evaluate, save


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
        source = build(request["settings"], systems, seed=request["seed"], exact=True)
        save(folder / f"{path.stem}.dp", source)
        found: dict[str, np.ndarray] = {}
        for route in ("dense", "graph"):
            try:
                found |= evaluate(source, systems, inputs, (route,))
            except (NotImplementedError, ValueError) as error:
                (folder / f"{path.stem}_{route}.txt").write_text(str(error))
        np.savez(folder / f"{path.stem}_ref.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
