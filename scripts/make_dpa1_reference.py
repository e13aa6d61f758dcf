"""Reference outputs of DPA-1 for tests/reference_data/dpa1, from deepmd-kit itself.

    pip install "torch==2.11.0" "deepmd-kit==3.2.0" "e3nn>=0.5.9" mpich
    python scripts/make_dpa1_reference.py tests/reference_data/dpa1 [MODEL ...]
    python scripts/make_dpa1_reference.py --check FOLDER        compare with files that were made elsewhere

The files in the repository were made with deepmd-kit 3.2.0, torch 2.11.0 and numpy 2.4.6 on a CPU. All weights are from
deepmd-kit's own seeded initialiser; layer norms, biases, atomic energies and whatever else starts at one or zero, and would
hide errors, are random; weights are rounded to 10 bits, so that the files stay small. No trained weights are included. It
writes

    systems.npz       <system>/coord (n, 3) Å, <system>/atype (n,), <system>/cell (3, 3), empty where there is none
    <model>.dp        the model in deepmd-kit's HDF5 form
    <model>_ref.npz   <system>/<route>/<quantity>: energy (1,), force (n, 3), virial (9,), atom_energy (n, 1),
                      atom_virial (n, 9); <system>/input/<name> of models that take fparam (width,) or aparam (n, width)

`graph` is deepmd.pt_expt on its neighbour graph; `dense` is deepmd.pt with padded neighbours. The models and systems are in
dpa1_reference_models.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from dpa1_reference_models import GROUPS, MODELS, ORIGINALS, System, make_inputs, make_systems

SAFE = 1e-3  # Å; closer to the cutoff, the angular gate of attention that is not smooth amplifies last bits


def main(folder: Path, names: list[str]) -> None:
    """Write everything into `folder`, or the models in `names`."""
    from deepmd_reference import build, evaluate, save

    folder.mkdir(parents=True, exist_ok=True)
    systems = make_systems()
    geometry: dict[str, np.ndarray] = {}
    for name, (x, types, box) in systems.items():
        cell = np.zeros(0) if box is None else box
        geometry |= {f"{name}/coord": x, f"{name}/atype": types.astype(np.int64), f"{name}/cell": cell}
    np.savez_compressed(folder / "systems.npz", **geometry)
    for name in names or MODELS:
        settings = MODELS[name]
        chosen = {key: systems[key] for key in GROUPS[settings["systems"]]}
        if settings["systems"] not in ("all", "nine"):
            check_gaps(chosen, settings["rcut"])
        source = build(settings, systems)
        inputs = make_inputs(settings["inputs"], chosen)
        reference = evaluate(source, chosen, inputs, settings["routes"])
        for system, extra in inputs.items():
            reference |= {f"{system}/input/{key}": value for key, value in extra.items()}
        save(folder / f"{name}.dp", source)
        np.savez_compressed(folder / f"{name}_ref.npz", **reference)
        print(name, flush=True)


def check(folder: Path) -> None:
    """Print the largest difference from the `<model>_ref.npz` in `folder` of each route and quantity."""
    from deepmd_reference import build, evaluate

    systems = make_systems()
    chosen = {key: systems[key] for key in GROUPS["all"]}
    for name, settings in ORIGINALS.items():
        path = folder / f"{name}_ref.npz"
        if not path.is_file():
            continue
        found = evaluate(build(settings, systems, exact=True), chosen, {})
        worst: dict[str, float] = {}
        with np.load(path) as file:
            assert sorted(file.files) == sorted(found), name
            for key in file.files:
                system, route, quantity = key.split("/")
                place = f"{'tri ' if system == 'cu64_tri' else ''}{route} {quantity}"
                worst[place] = max(worst.get(place, 0.0), float(np.abs(file[key] - found[key]).max()))
        print(name, {key: f"{value:.1e}" for key, value in worst.items()}, flush=True)


def check_gaps(systems: dict[str, System], cutoff: float) -> None:
    """Every neighbour is well inside or well outside the cutoff: cu64_tri alone is there to see what happens otherwise."""
    for name, (x, _, box) in systems.items():
        shifts = np.zeros((1, 3))
        if box is not None:
            reach = range(-7, 8)
            shifts = np.array([[i, j, k] for i in reach for j in reach for k in reach]) @ box
            x = np.remainder(x @ np.linalg.inv(box), 1.0) @ box
        distance = np.linalg.norm(x[None, :, None] - x[:, None, None] + shifts, axis=-1)
        gap = np.abs(distance - cutoff).min()
        assert gap > SAFE, (name, gap)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--check":
        check(Path(sys.argv[2]))
    elif len(sys.argv) >= 2 and not sys.argv[1].startswith("-"):
        main(Path(sys.argv[1]), sys.argv[2:])
    else:
        sys.exit(__doc__)
