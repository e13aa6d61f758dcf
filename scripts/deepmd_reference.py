"""Build and run DPA-1 models with deepmd-kit 3.2.0 itself; needs its environment, not carryall's.

`build` makes a model dict from settings (see dpa1_reference_models.py), `evaluate` runs it on one system by both routes:
`dense` is deepmd.pt with padded neighbours, `graph` is deepmd.pt_expt on its neighbour graph.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# deepmd-kit wraps positions by matrix products; with fused multiply-adds their last bits would depend on the processor
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import deepmd.pt  # noqa: F401, registers deepmd-kit's operators
import deepmd.pt_expt.utils.env as graph_environment
import h5py
import numpy as np
import torch
from deepmd.dpmodel.descriptor.dpa1 import DescrptDPA1
from deepmd.dpmodel.descriptor.se_atten_v2 import DescrptSeAttenV2
from deepmd.dpmodel.fitting.ener_fitting import EnergyFittingNet
from deepmd.dpmodel.model.ener_model import EnergyModel
from deepmd.dpmodel.utils.serialization import traverse_model_dict
from deepmd.pt.model.model.ener_model import EnergyModel as DenseModel
from deepmd.pt_expt.model.ener_model import EnergyModel as GraphModel

System = tuple[np.ndarray, np.ndarray, np.ndarray | None]
QUANTITIES = ("energy", "force", "virial", "atom_energy", "atom_virial")
KINDS = {"dpa1": DescrptDPA1, "se_atten_v2": DescrptSeAttenV2}
graph_environment.DEVICE = torch.device("cpu")


def build(settings: dict[str, Any], systems: dict[str, System], seed: int = 1, exact: bool = False) -> dict[str, Any]:
    """The serialised model; `systems` holds those that settings["statistics"] names. Numbers are rounded unless `exact`."""
    type_map = list(settings["type_map"])
    precision = {"precision": "float64"}
    descriptor = KINDS[settings["kind"]](
        settings["rcut"], settings["rcut_smth"], settings["sel"], len(type_map), type_map=type_map, seed=seed,
        **(precision | settings["descriptor"]),
    )  # fmt: skip
    if settings["statistics"]:
        chosen = [systems[name] for name in settings["statistics"]]
        descriptor.compute_input_stats(
            [{"coord": x[None], "atype": t[None], "box": np.reshape(b, (1, 9))} for x, t, b in chosen]
        )
    fitting = EnergyFittingNet(
        len(type_map), descriptor.get_dim_out(), type_map=type_map, seed=seed + 1,
        **({"mixed_types": True} | precision | settings["fitting"]),
    )  # fmt: skip
    model = EnergyModel(descriptor, fitting, type_map=type_map, **settings["model"])
    source = randomize(model.serialize(), seed + 2)
    for part in (source["descriptor"]["embeddings"], source["fitting"]["nets"]):
        for layer in (layer for net in part["networks"] for layer in net["layers"]):
            layer["@variables"]["w"] = layer["@variables"]["w"] * settings["gain"]
    return source if exact else rounded(source)


def randomize(source: dict[str, Any], seed: int) -> dict[str, Any]:
    """Layer norms, biases, statistics of inputs and gains start at one or zero: make them count."""
    rng = np.random.default_rng(seed)
    for layer in source["descriptor"]["attention_layers"]["attention_layers"]:
        norm = layer["attn_layer_norm"]["@variables"]
        norm["w"] = (1 + 0.2 * rng.normal(size=norm["w"].shape)).astype(norm["w"].dtype)
        norm["b"] = (0.2 * rng.normal(size=norm["b"].shape)).astype(norm["b"].dtype)
    source["@variables"]["out_bias"] = rng.normal(size=source["@variables"]["out_bias"].shape)
    fitting = source["fitting"]["@variables"]
    fitting["bias_atom_e"] = rng.normal(size=fitting["bias_atom_e"].shape)
    for name, middle in (("fparam_avg", 0.0), ("fparam_inv_std", 1.0), ("aparam_avg", 0.0), ("aparam_inv_std", 1.0)):
        if fitting.get(name) is not None:
            fitting[name] = (middle + 0.3 * rng.normal(size=fitting[name].shape)).astype(fitting[name].dtype)
    if fitting.get("case_embd") is not None:
        fitting["case_embd"] = rng.normal(size=fitting["case_embd"].shape).astype(fitting["case_embd"].dtype)
    descriptor = source["descriptor"]["@variables"]
    if "degree_gain_raw" in descriptor:
        gain = descriptor["degree_gain_raw"]
        descriptor["degree_gain_raw"] = (1 + 0.3 * rng.normal(size=gain.shape)).astype(gain.dtype)
    return source


def rounded(source: dict[str, Any], bits: int = 10) -> dict[str, Any]:
    """Every weight to `bits` of mantissa: zeros at the end compress well. davg and dstd stay as they were measured."""

    def one(value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            return value
        mantissa, exponent = np.frexp(value)
        return np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent).astype(value.dtype)

    found = traverse_model_dict(copy.deepcopy(source), one)
    found["descriptor"]["@variables"] = source["descriptor"]["@variables"]
    return found


def save(path: Path, source: dict[str, Any]) -> None:
    """deepmd-kit's HDF5 form, with compressed arrays and without the time of writing."""
    with h5py.File(path, "w", libver="latest", fs_strategy="none") as file:
        count = 0

        def store(value: Any) -> Any:
            nonlocal count
            if not isinstance(value, np.ndarray):
                return value
            packing = {"compression": "gzip", "compression_opts": 9, "shuffle": True} if value.nbytes > 256 else {}
            name = file.create_dataset(f"variable_{count:04d}", data=value, **packing).name
            count += 1
            return name

        tree = traverse_model_dict(copy.deepcopy(source), store)
        root = {"software": "deepmd-kit", "version": "3.2.0", "backend": "dpmodel", "model": tree, "model_def_script": {}}
        file.attrs["json"] = json.dumps(root, separators=(",", ":"))


def evaluate(
    source: dict[str, Any],
    systems: dict[str, System],
    inputs: dict[str, dict[str, np.ndarray]],
    routes: Sequence[str] = ("dense", "graph"),
) -> dict[str, np.ndarray]:
    """`<system>/<route>/<quantity>` of every system, in float64."""
    found: dict[str, np.ndarray] = {}
    for route in routes:
        model_class, run = {"dense": (DenseModel, run_dense), "graph": (GraphModel, run_graph)}[route]
        model = model_class.deserialize(copy.deepcopy(source)).to("cpu").eval()
        for name, system in systems.items():
            values = run(model, system, inputs.get(name, {}))
            found |= {f"{name}/{route}/{key}": np.asarray(values[key], dtype=np.float64) for key in QUANTITIES}
    return found


def _tensors(system: System, extra: dict[str, np.ndarray]) -> tuple[Any, ...]:
    x, types, box = system
    cell = None if box is None else torch.tensor(box.reshape(1, 9))
    more = {key: torch.tensor(value[None]) for key, value in extra.items()}
    return torch.tensor(x[None]), torch.tensor(types[None].astype(np.int64)), cell, more


def run_dense(model: Any, system: System, extra: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """deepmd.pt: padded neighbours."""
    x, types, cell, more = _tensors(system, extra)
    out = model.forward(x.requires_grad_(), types, cell, do_atomic_virial=True, **more)
    found = {key: out[key].detach().numpy()[0] for key in QUANTITIES}
    return {**found, "atom_virial": found["atom_virial"].reshape(-1, 9)}


def run_graph(model: Any, system: System, extra: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """deepmd.pt_expt: neighbour graph."""
    x, types, cell, more = _tensors(system, extra)
    out = model.call_common(x, types, cell, do_atomic_virial=True, neighbor_graph_method="dense", **more)
    values = {key: value.detach().numpy() for key, value in out.items() if value is not None}
    return {
        "energy": values["energy_redu"][0],
        "force": values["energy_derv_r"].reshape(-1, 3),
        "virial": values["energy_derv_c_redu"].reshape(9),
        "atom_energy": values["energy"].reshape(-1, 1),
        "atom_virial": values["energy_derv_c"].reshape(-1, 9),
    }
