"""Reference outputs of combined models for tests/reference_data/bridging, from deepmd-kit itself.

    pip install "torch==2.11.0" "deepmd-kit==3.2.0" "e3nn>=0.5.9" mpich
    python scripts/make_bridging_reference.py tests/reference_data/bridging

The files in the repository were made with deepmd-kit 3.2.0, torch 2.11.0 and numpy 2.4.6 on a CPU, in float64. Weights are from
deepmd-kit's seeded initialiser, rounded to few bits. It writes

    zbl.txt, tail.txt     pair tables: the universal repulsion, switched off from 1.1 to 1.5 Å; an attraction that ends at 3 Å
    systems.npz           <system>/coord (n, 3) Å, <system>/atype (n,), <system>/cell (3, 3), empty where there is none
    tables.npz            <case>/rows, <case>/cutoff, and what deepmd-kit's PairTab makes of them: <case>/vdata, <case>/tab_data
    <model>.dp, .json.gz  models of type `zbl` and `linear` in deepmd-kit's HDF5 and JSON forms
    <model>_ref.npz       <system>/<route>/<quantity>: energy (1,), force (n, 3), and for the first of the model's routes virial
                          (9,), atom_energy (n, 1), atom_virial (n, 9); routes are pt and pt_expt (padded neighbours) and graph
                          (pt_expt's neighbour graph)

pt adds the biases of the models within a combination, and pt_expt's padded route does not: where they are not zero, it is left
out. A graph route exists for combinations of learned models only.
"""

from __future__ import annotations

import copy
import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from deepmd_reference import QUANTITIES, build, run_dense, run_graph, save
from dpa1_reference_models import ZERO, settings_of

System = tuple[np.ndarray, np.ndarray, np.ndarray | None]
CUTOFF = 5.0
TYPES = ["O", "H"]
SWITCH = {"sw_rmin": 0.7, "sw_rmax": 1.2, "smin_alpha": 0.1}


def make_systems() -> dict[str, System]:
    """Pairs from 0.3 to 2 Å, molecules, crystals with an atom knocked out of its place, atoms without near neighbours."""
    rng = np.random.default_rng(7)
    lengths = [0.3, 0.5, 0.69, 0.71, 0.8, 0.95, 1.1, 1.19, 1.21, 1.5, 2.0]
    turns = rng.normal(size=(len(lengths), 3))
    turns /= np.linalg.norm(turns, axis=1)[:, None]
    origins = np.stack([20.0 * np.arange(len(lengths)), *np.zeros((2, len(lengths)))], axis=1)
    ends = origins + np.array(lengths)[:, None] * turns
    kinds = [(0, 1), (0, 0), (1, 1)]
    pairs = np.array([kinds[k % 3] for k in range(len(lengths))])
    corners = np.array([[i, j, 0] for i in range(2) for j in range(2)])
    basis = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    crystal = (corners[:, None] + basis).reshape(-1, 3) * 3.6 + 0.1 * rng.normal(size=(16, 3))
    box = np.diag([7.2, 7.2, 3.6])
    crystal[5] = crystal[0] + [0.5, 0.3, 0.35]
    crystal[11] = crystal[8] + [0.6, -0.7, 0.4]
    tilt = np.array([[7.2, 0.0, 0.0], [1.1, 3.6, 0.3], [-0.7, 0.4, 3.7]])
    tilted = (crystal[8:] @ np.linalg.inv(box)) @ tilt + [9.0, -7.0, 0.0]
    water = np.array([[0.0, 0.0, 0.0], [0.757, 0.586, 0.0], [-0.757, 0.586, 0.0]])
    molecules = np.concatenate([water * scale + shift for scale, shift in ((1.0, 0.0), (0.85, 2.6), (0.6, [2.7, -0.3, 0.4]))])
    lonely = np.array([[0, 0, 0], [4.8, 0, 0], [30, 0, 0], [34.7, 0, 0], [34.7, 4.9, 0], [80, 0, 0.0]])
    return {
        "pairs": (np.concatenate([origins, ends]), pairs.T.reshape(-1), None),
        "crystal": (crystal, np.arange(16) % 2, box),
        "tilted": (tilted, np.arange(8) % 2, tilt),
        "molecules": (molecules, np.array([0, 1, 1] * 3), None),
        "lonely": (lonely, np.array([0, 1, 1, 0, 0, 1]), None),
    }


def write_tables(folder: Path) -> None:
    """Text files with columns O-O, O-H, H-H."""
    r = np.arange(1, 31) * 0.05
    u = np.clip((r - 1.1) / 0.4, 0, 1)
    columns = [r]
    for a, b in ((8, 8), (8, 1), (1, 1)):
        x = r * (a**0.23 + b**0.23) / (0.88534 * 0.52917721)
        terms = ((0.18175, 3.1998), (0.50986, 0.94229), (0.28022, 0.4029), (0.02817, 0.20162))
        columns.append(14.39964 * a * b / r * sum(c * np.exp(-d * x) for c, d in terms) * (1 - u**3 * (10 - 15 * u + 6 * u**2)))
    np.savetxt(folder / "zbl.txt", np.stack(columns, axis=1), fmt=["%.2f", "%.9e", "%.9e", "%.9e"], header="r O-O O-H H-H")
    r = np.arange(1, 61) * 0.05
    tail = [-(c**6) / (r**6 + 2.0**6) for c in (1.7, 1.3, 1.1)]
    np.savetxt(folder / "tail.txt", np.stack([r, *tail], axis=1), fmt=["%.2f", "%.9e", "%.9e", "%.9e"], header="r O-O O-H H-H")


def table_cases() -> dict[str, np.ndarray]:
    """What PairTab makes of tables that end before, at and after the cutoff, at zero or not."""
    from deepmd.utils.pair_tab import PairTab

    rng = np.random.default_rng(3)
    r = 0.3 + 0.1 * np.arange(12)
    falling = np.stack([r, *(rng.uniform(1, 3) / r**3 for _ in range(3))], axis=1)
    ending = falling.copy()
    ending[-1, 1:] = 0
    cases = {
        "at_zero": (ending, 1.4), "zeros": (ending, 2.03), "zeros_little": (ending, 1.43), "cut": (falling, 0.97),
        "tail": (falling, 2.03), "short_tail": (falling, 1.43), "middle_tail": (falling, 1.57), "at_end": (falling, 1.4),
        "one_type": (falling[:, :2], 2.5), "two_rows": (falling[:2], 0.4),
    }  # fmt: skip
    found = {}
    for name, (rows, cutoff) in cases.items():
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            np.savetxt(file, rows, fmt="%.17g")
            file.flush()
            table = PairTab(file.name, cutoff)
        found |= {f"{name}/rows": rows, f"{name}/cutoff": np.array(cutoff)}
        found |= {f"{name}/vdata": table.vdata, f"{name}/tab_data": table.tab_data}
    return found


def learned(systems: dict[str, System], seed: int, *, bias: bool = False, **changes: Any) -> dict[str, Any]:
    """A small DPA-1; its `out_bias` is zero unless `bias`, as in what deepmd-kit trains."""
    descriptor = {"neuron": [4, 8], "axis_neuron": 3, "tebd_dim": 3, "attn": 6, **changes.pop("descriptor")}
    settings = settings_of(descriptor, fitting={"neuron": [8, 8]}, **{"rcut": CUTOFF, "sel": 80, **changes})
    source = build({**settings, "statistics": ("crystal",)}, systems, seed)
    if not bias:
        source["@variables"]["out_bias"] *= 0
    return source


def tabulated(path: Path, cutoff: float, sel: int, type_map: list[str]) -> dict[str, Any]:
    """A pair table."""
    from deepmd.dpmodel.atomic_model.pairtab_atomic_model import PairTabAtomicModel

    return PairTabAtomicModel(str(path), cutoff, sel, type_map).serialize()


def combine(kind: str, models: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """The serialised combination, with random biases."""
    rng = np.random.default_rng(len(str(options)))
    variables = {"out_bias": rng.normal(size=(1, 2, 1)), "out_std": np.ones((1, 2, 1))}
    head = {"@class": "Model", "type": kind, "@version": {"zbl": 2, "linear": 3}[kind], "type_map": TYPES, "rcond": None}
    rules = {"atom_exclude_types": [], "pair_exclude_types": [], "preset_out_bias": None, "@variables": variables}
    return {**head, **rules, "weights": "mean", "models": models, **options}


def make_models(folder: Path, systems: dict[str, System]) -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
    """Serialised models, and the routes that each has."""
    padded = ("pt", "pt_expt")
    plain, smooth = {"attn_layer": 0, **ZERO}, {"attn_layer": 2, **ZERO}
    repulsion = tabulated(folder / "zbl.txt", CUTOFF, 80, TYPES)
    with_bias = learned(systems, 4, bias=True, descriptor=plain)
    with_bias["pair_exclude_types"] = [[0, 1]]
    other = learned(systems, 6, descriptor=plain, type_map=["H", "C", "O"], rcut=3.5, sel=40)
    return {
        "zbl": (combine("zbl", [learned(systems, 1, descriptor=plain), repulsion], **SWITCH), padded),
        "zbl_attention": (
            combine("zbl", [learned(systems, 2, descriptor=smooth), repulsion], **{**SWITCH, "smin_alpha": 0.3}),
            padded,
        ),
        "zbl_stat": (combine("zbl", [learned(systems, 3, descriptor={"attn_layer": 0}), repulsion], **SWITCH), padded),
        "zbl_few": (
            combine(
                "zbl",
                [learned(systems, 3, descriptor=plain, sel=10), tabulated(folder / "tail.txt", CUTOFF, 12, TYPES)],
                **{**SWITCH, "sw_rmax": 2.5, "smin_alpha": 1.0, "pair_exclude_types": [[1, 1]]},
            ),
            ("pt",),
        ),
        "zbl_rules": (
            combine("zbl", [with_bias, repulsion], **SWITCH, atom_exclude_types=[0]),
            ("pt",),
        ),
        "linear": (
            combine(
                "linear",
                [
                    learned(systems, 5, descriptor=plain),
                    other,
                    tabulated(folder / "tail.txt", 4.33, 60, ["H", "O"]),
                ],
                weights=[0.7, -0.4, 1.3],
                atom_exclude_types=[],
            ),
            padded,
        ),
        "linear_mean": (
            combine("linear", [learned(systems, s, bias=True, descriptor=d) for s, d in ((8, plain), (9, smooth))]),
            ("graph", "pt"),
        ),
    }


def save_json(path: Path, source: dict[str, Any]) -> None:
    """deepmd-kit's JSON form."""

    def encode(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: encode(one) for key, one in value.items()}
        if isinstance(value, list):
            return [encode(one) for one in value]
        if isinstance(value, np.ndarray):
            return {"@class": "np.ndarray", "@is_variable": True, "dtype": value.dtype.name, "value": value.tolist()}
        return value.item() if isinstance(value, np.generic) else value

    root = {"software": "deepmd-kit", "version": "3.2.0", "backend": "dpmodel", "model": encode(source)}
    path.write_bytes(gzip.compress(json.dumps(root).encode(), 9, mtime=0))


def evaluate(source: dict[str, Any], systems: dict[str, System], routes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """`<system>/<route>/<quantity>` of every system."""
    from deepmd.pt.model.model.dp_linear_model import LinearEnergyModel as PtLinear
    from deepmd.pt.model.model.dp_zbl_model import DPZBLModel as PtBridged
    from deepmd.pt_expt.model.dp_linear_model import LinearEnergyModel as ExptLinear
    from deepmd.pt_expt.model.dp_zbl_model import DPZBLModel as ExptBridged

    kinds = {"zbl": (PtBridged, ExptBridged), "linear": (PtLinear, ExptLinear)}[source["type"]]
    pt, expt = (kind.deserialize(copy.deepcopy(source)).to("cpu").eval() for kind in kinds)
    found = {}
    for name, system in systems.items():
        for route in routes:
            padded = pt if route == "pt" else expt
            values = run_graph(expt, system, {}) if route == "graph" else run_dense(padded, system, {})
            for key in QUANTITIES if route == routes[0] else ("energy", "force"):
                found[f"{name}/{route}/{key}"] = np.asarray(values[key], dtype=np.float64)
    return found


def main(folder: Path) -> None:
    """Write everything into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    systems = make_systems()
    geometry: dict[str, np.ndarray] = {}
    for name, (x, types, box) in systems.items():
        cell = np.zeros(0) if box is None else box
        geometry |= {f"{name}/coord": x, f"{name}/atype": types.astype(np.int64), f"{name}/cell": cell}
    np.savez_compressed(folder / "systems.npz", **geometry)
    write_tables(folder)
    np.savez_compressed(folder / "tables.npz", **table_cases())
    for name, (source, routes) in make_models(folder, systems).items():
        if name in ("zbl", "linear"):
            save(folder / f"{name}.dp", source)
        else:
            save_json(folder / f"{name}.json.gz", source)
        np.savez_compressed(folder / f"{name}_ref.npz", **evaluate(source, systems, routes))
        print(name, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
