"""Reference outputs of spin models for tests/reference_data/spin, from deepmd-kit itself.

    pip install "torch==2.11.0" "deepmd-kit==3.2.0" "e3nn>=0.5.9" mpich
    python scripts/make_spin_reference.py tests/reference_data/spin [MODEL ...]

The files in the repository were made with deepmd-kit 3.2.0 and torch 2.11.0 on a CPU. All weights are random, as in
make_dpa1_reference.py, and no trained ones are included. It writes

    systems.npz       <system>/coord (n, 3) Å, <system>/atype (n,), <system>/cell (3, 3), empty where there is none, and
                      <system>/spin (n, 3)
    <model>.dp        the model in deepmd-kit's HDF5 form
    <model>_ref.npz   <system>/<route>/<quantity>: energy (1,), force (n, 3), force_mag (n, 3), virial (9,), atom_energy (n, 1),
                      atom_virial (n, 9); <system>/input/<name> of models that take fparam (width,) or aparam (n, width)

The routes are those of deepmd_spin_reference.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from dpa1_reference_models import ROUGH, ZERO, System, make_inputs, make_systems, settings_of

SAFE = 1e-3  # Å; closer to the cutoff, the angular gate of attention that is not smooth amplifies last bits
NAMES = ("cu32_tri", "water24", "two_pbc", "one_nopbc", "one_pbc")
SPINS_SEED = 16
RADIAL = {"set_davg_zero": False}


def spin_settings(
    descriptor: dict[str, Any],
    use_spin: tuple[bool, bool] = (True, True),
    scale: tuple[float, float] = (0.3, 0.2),
    **changes: Any,
) -> dict[str, Any]:
    """Settings of a model of two real types; statistics are those of real and virtual atoms."""
    spin = {"use_spin": list(use_spin), "virtual_scale": list(scale)}
    return {**settings_of(descriptor, type_map=("Fe", "O"), **changes), "spin": spin, "routes": changes.get("routes", ROUTES)}


ROUTES = ("whole", "lower")
MODELS: dict[str, dict[str, Any]] = {
    "both": spin_settings(ZERO),
    "first": spin_settings(ZERO, (True, False)),
    "second_rough": spin_settings({**ROUGH, **ZERO}, (False, True)),
    "no_attention": spin_settings({**ZERO, "attn_layer": 0}, (True, False)),
    "davg": spin_settings(RADIAL),
    "davg_first": spin_settings({**RADIAL, **ROUGH}, (True, False)),
    "strip": spin_settings({**ZERO, "tebd_input_mode": "strip"}),
    "parameters": spin_settings(
        ZERO, (True, False), fitting={"numb_fparam": 1, "numb_aparam": 2}, inputs={"fparam": 1, "aparam": 2}
    ),
    "pairs": spin_settings(ZERO, model={"pair_exclude_types": [(0, 1)], "atom_exclude_types": [1]}),
    # fewer slots than real and virtual neighbours together: with a type without spins, the routes cut off others
    "sel45": spin_settings(ZERO, (True, False), sel=45, routes=("lower",)),
}


def main(folder: Path, names: list[str]) -> None:
    """Write everything into `folder`, or the models in `names`."""
    from deepmd_reference import save
    from deepmd_spin_reference import build, evaluate

    folder.mkdir(parents=True, exist_ok=True)
    every = make_systems()
    systems = {name: every[name] for name in NAMES}
    spins = make_spins(systems)
    geometry: dict[str, np.ndarray] = {}
    for name, (x, types, box) in systems.items():
        cell = np.zeros(0) if box is None else box
        geometry |= {f"{name}/coord": x, f"{name}/atype": types.astype(np.int64), f"{name}/cell": cell}
        geometry |= {f"{name}/spin": spins[name]}
    np.savez_compressed(folder / "systems.npz", **geometry)
    for name in names or MODELS:
        settings = MODELS[name]
        check_gaps(systems, spins, settings)
        source = build(settings, systems, spins)
        inputs = make_inputs(settings["inputs"], systems)
        reference = evaluate(source, systems, spins, inputs, settings["routes"])
        for system, extra in inputs.items():
            reference |= {f"{system}/input/{key}": value for key, value in extra.items()}
        save(folder / f"{name}.dp", source)
        np.savez_compressed(folder / f"{name}_ref.npz", **reference)
        print(name, flush=True)


def make_spins(systems: dict[str, System]) -> dict[str, np.ndarray]:
    """Random spins of lengths of iron's order."""
    rng = np.random.default_rng(SPINS_SEED)
    return {name: rng.normal(size=x.shape) * 1.3 for name, (x, _, _) in systems.items()}


def check_gaps(systems: dict[str, System], spins: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    """Every neighbour, virtual ones too, is well inside or well outside the cutoff."""
    scale = np.array(settings["spin"]["virtual_scale"]) * settings["spin"]["use_spin"]
    for name, (x, types, box) in systems.items():
        shifts = np.zeros((1, 3))
        if box is not None:
            reach = range(-4, 5)
            shifts = np.array([[i, j, k] for i in reach for j in reach for k in reach]) @ box
        atoms = np.concatenate([x, x + spins[name] * scale[types][:, None]])
        distance = np.linalg.norm(atoms[None, :, None] - x[:, None, None] + shifts, axis=-1)
        gap = np.abs(distance - settings["rcut"]).min()
        assert gap > SAFE or settings["descriptor"].get("smooth_type_embedding", True), (name, gap)


if __name__ == "__main__":
    if len(sys.argv) >= 2 and not sys.argv[1].startswith("-"):
        main(Path(sys.argv[1]), sys.argv[2:])
    else:
        sys.exit(__doc__)
