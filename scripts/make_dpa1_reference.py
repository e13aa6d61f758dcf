"""Reference outputs of DPA-1 for tests/reference_data/dpa1, from deepmd-kit itself.

    pip install "torch==2.11.0" "deepmd-kit==3.2.0" "e3nn>=0.5.9" mpich
    python scripts/make_dpa1_reference.py tests/reference_data/dpa1

The files in the repository were made with deepmd-kit 3.2.0, torch 2.11.0 and numpy 2.4.6 on a CPU, in float64. All weights are
from deepmd-kit's own seeded initialiser; layer norms, `out_bias` and `bias_atom_e`, which start at one or zero and would hide
errors, are random. No trained weights are included. It writes

    systems.npz       <system>/coord (n, 3) Å, <system>/atype (n,), <system>/cell (3, 3), empty where there is none
    <model>.dp        the model in deepmd-kit's HDF5 form
    <model>_ref.npz   <system>/<route>/<quantity>: energy (1,), force (n, 3), virial (9,), atom_energy (n, 1),
                      atom_virial (n, 9; graph only)

`graph` is deepmd.pt_expt on its neighbour graph; `dense` is deepmd.pt with padded neighbours, kept where the two agree
(attention off or not smooth, davg = 0, no neighbour cut off by `sel`).
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np

CUTOFF = 4.5
MODELS: dict[str, dict[str, Any]] = {
    "a0": {"descriptor": {"attn_layer": 0}},
    "a2_smooth": {"descriptor": {"attn_layer": 2}},
    "a2_nonsmooth": {"descriptor": {"attn_layer": 2, "smooth_type_embedding": False}},
    "a2_smooth_statzero": {"descriptor": {"attn_layer": 2, "set_davg_zero": True}, "statistics": True},
    "a0_strip": {"descriptor": {"attn_layer": 0, "tebd_input_mode": "strip"}},
    "a0_pairexcl": {"descriptor": {"attn_layer": 0}, "model": {"pair_exclude_types": [(1, 1)]}},
    "a0_atomexcl": {"descriptor": {"attn_layer": 0}, "model": {"atom_exclude_types": [1]}},
}
System = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def fcc(nx: int, ny: int, nz: int, a: float = 3.6, jitter: float = 0.12) -> tuple[np.ndarray, np.ndarray]:
    """A jittered crystal and its box."""
    rng = np.random.default_rng(0)
    basis = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    corners = np.array([[i, j, k] for i in range(nx) for j in range(ny) for k in range(nz)])
    x = ((corners[:, None] + basis[None]).reshape(-1, 3)) * a
    return x + rng.normal(size=x.shape) * jitter, np.diag([nx * a, ny * a, nz * a]).astype(float)


def water(n_molecules: int = 64, length: float = 12.42) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Randomly turned molecules on a grid; types O, H, H."""
    rng = np.random.default_rng(3)
    grid = np.array([[i, j, k] for i in range(4) for j in range(4) for k in range(4)])[:n_molecules] * (length / 4)
    hydrogens = np.array([[0.757, 0.586, 0.0], [-0.757, 0.586, 0.0]])
    positions: list[np.ndarray] = []
    types: list[int] = []
    for site in grid:
        q = rng.normal(size=4)
        w, x, y, z = q / np.linalg.norm(q)
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        oxygen = site + rng.normal(size=3) * 0.2
        positions += [oxygen, oxygen + hydrogens[0] @ rotation.T, oxygen + hydrogens[1] @ rotation.T]
        types += [0, 1, 1]
    return np.array(positions), np.eye(3) * length, np.array(types)


def make_systems() -> dict[str, System]:
    """Periodic, tilted, unwrapped, open, tiny and single-atom cases."""
    x, box = fcc(4, 2, 2)
    types = np.arange(64) % 2
    tilted = np.array([[14.4, 0, 0], [1.1, 7.2, 0], [-0.7, 0.9, 7.2]])
    xw, bw, tw = water()
    pair_cell = np.array([[4.1, 0, 0], [0.3, 3.9, 0], [-0.2, 0.5, 4.4]])
    one_cell = np.array([[3.1, 0, 0], [0.2, 3.3, 0], [0.1, -0.3, 3.2]])
    one = np.array([[0.3, -0.2, 0.9]])
    return {
        "cu64": (x, types, box),
        "cu64_tri": ((x @ np.linalg.inv(box)) @ tilted, types, tilted),
        "cu64_wrapped_out": (x + np.array([100.0, -57.3, 3.3]), types, box),
        "water192": (xw, tw, bw),
        "cluster24_nopbc": (xw[:24] - xw[:24].mean(0), tw[:24], None),
        "two_nopbc": (np.array([[0.0, 0, 0], [1.1, 0.7, -0.4]]), np.array([0, 1]), None),
        "two_far_nopbc": (np.array([[0.0, 0, 0], [50.0, 0, 0]]), np.array([0, 1]), None),
        "two_pbc": (np.array([[0.1, 0.2, 0.3], [1.9, 1.4, 2.2]]), np.array([1, 0]), pair_cell),
        "one_nopbc": (one, np.array([0]), None),
        "one_pbc": (one, np.array([1]), one_cell),
    }


def randomize(source: dict[str, Any], seed: int) -> dict[str, Any]:
    """Layer norms, biases and atomic energies start at one or zero: make them count."""
    rng = np.random.default_rng(seed)
    for layer in source["descriptor"]["attention_layers"]["attention_layers"]:
        norm = layer["attn_layer_norm"]["@variables"]
        norm["w"] = (1 + 0.2 * rng.normal(size=norm["w"].shape)).astype(norm["w"].dtype)
        norm["b"] = (0.2 * rng.normal(size=norm["b"].shape)).astype(norm["b"].dtype)
    source["@variables"]["out_bias"] = rng.normal(size=source["@variables"]["out_bias"].shape)
    fitting = source["fitting"]["@variables"]
    fitting["bias_atom_e"] = rng.normal(size=fitting["bias_atom_e"].shape)
    return source


def build(settings: dict[str, Any], systems: dict[str, System]) -> dict[str, Any]:
    """The serialised model."""
    from deepmd.dpmodel.descriptor.dpa1 import DescrptDPA1
    from deepmd.dpmodel.fitting.ener_fitting import EnergyFittingNet
    from deepmd.dpmodel.model.ener_model import EnergyModel

    type_map = ["O", "H"]
    widths = {"neuron": [8, 16, 32], "axis_neuron": 4, "tebd_dim": 4, "attn": 16}
    descriptor = DescrptDPA1(
        CUTOFF, 0.5, 90, 2, type_map=type_map, seed=1, precision="float64", **widths, **settings["descriptor"]
    )
    if settings.get("statistics"):
        merged = [(systems[name][0], systems[name][1], systems[name][2]) for name in ("cu64", "water192")]
        descriptor.compute_input_stats(
            [{"coord": x[None], "atype": t[None], "box": np.reshape(b, (1, 9))} for x, t, b in merged]
        )
    fitting = EnergyFittingNet(
        2, descriptor.get_dim_out(), neuron=[16, 16, 16], mixed_types=True, type_map=type_map, seed=2, precision="float64"
    )
    return randomize(EnergyModel(descriptor, fitting, type_map=type_map, **settings.get("model", {})).serialize(), 3)


def run_dense(model: Any, system: System) -> dict[str, np.ndarray]:
    """deepmd.pt: padded neighbours."""
    import torch

    x, types, box = system
    coordinates = torch.tensor(x[None], requires_grad=True)
    cell = None if box is None else torch.tensor(box.reshape(1, 9))
    out = model.forward(coordinates, torch.tensor(types[None]), cell, do_atomic_virial=False)
    return {key: out[key].detach().numpy()[0] for key in ("energy", "force", "virial", "atom_energy")}


def run_graph(model: Any, system: System) -> dict[str, np.ndarray]:
    """deepmd.pt_expt: neighbour graph."""
    import torch

    x, types, box = system
    cell = None if box is None else torch.tensor(box.reshape(1, 9))
    out = model.call_common(
        torch.tensor(x[None]), torch.tensor(types[None]), cell, do_atomic_virial=True, neighbor_graph_method="dense"
    )
    values = {key: value.detach().numpy() for key, value in out.items() if value is not None}
    return {
        "energy": values["energy_redu"][0],
        "force": values["energy_derv_r"].reshape(-1, 3),
        "virial": values["energy_derv_c_redu"].reshape(9),
        "atom_energy": values["energy"].reshape(-1, 1),
        "atom_virial": values["energy_derv_c"].reshape(-1, 9),
    }


def main(folder: Path) -> None:
    """Write everything into `folder`."""
    import deepmd.pt  # noqa: F401, registers deepmd-kit's operators
    import deepmd.pt_expt.utils.env as environment
    import torch
    from deepmd.dpmodel.utils.serialization import save_dp_model
    from deepmd.pt.model.model.ener_model import EnergyModel as DenseModel
    from deepmd.pt_expt.model.ener_model import EnergyModel as GraphModel

    environment.DEVICE = torch.device("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    systems = make_systems()
    geometry: dict[str, np.ndarray] = {}
    for name, (x, types, box) in systems.items():
        cell = np.zeros(0) if box is None else box
        geometry |= {f"{name}/coord": x, f"{name}/atype": types.astype(np.int64), f"{name}/cell": cell}
    np.savez_compressed(folder / "systems.npz", **geometry)
    for name, settings in MODELS.items():
        source = build(settings, systems)
        save_dp_model(
            str(folder / f"{name}.dp"), {"backend": "dpmodel", "model": copy.deepcopy(source), "model_def_script": {}}
        )
        dense = DenseModel.deserialize(copy.deepcopy(source)).to("cpu").eval()
        graph = GraphModel.deserialize(copy.deepcopy(source)).to("cpu").eval()
        reference: dict[str, np.ndarray] = {}
        for system, content in systems.items():
            reference |= {f"{system}/graph/{key}": value for key, value in run_graph(graph, content).items()}
            if not name.startswith("a2_smooth"):
                reference |= {f"{system}/dense/{key}": value for key, value in run_dense(dense, content).items()}
        np.savez_compressed(folder / f"{name}_ref.npz", **reference)
        print(name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
