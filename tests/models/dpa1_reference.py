"""Reference files of DPA-1 (tests/reference_data/dpa1, by scripts/make_dpa1_reference.py), and carryall's answer to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carryall import load
from carryall.data import AtomicData
from carryall.data.elements import atomic_number
from carryall.graph.neighbor_search import graph_from_structures
from carryall.graph.potential import Potential
from carryall.package.sources import read_source

FOLDER = Path(__file__).parents[1] / "reference_data" / "dpa1"
MODELS = sorted(path.stem for path in FOLDER.glob("*.dp"))
METHODS = {"dense": "legacy", "graph": "graph"}
"""DeePMD's route, and carryall's `neighbor_graph_method` for it."""
NAMES = {
    "energy": "energy",
    "force": "forces",
    "virial": "virial",
    "atom_energy": "atomic_energy",
    "atom_virial": "atomic_virial",
}
# of the largest value; deepmd-kit's own two routes differ by up to 6e-6 in float32 where they are the same function
FLOAT64, FLOAT32 = 1e-10, 2e-5
# cu64_tri has a neighbour 5.35e-5 Å inside the cutoff, where attention that is not smooth has an angular gate of
# R / max(|R|, 1e-12) with |R| = 5e-15. There the derivative of the switch keeps six digits: deepmd-kit's routes, and its BLAS
# on different processors, differ by this much (eV/Å; an edge of 4.5 Å, from both its ends, makes eV of it). Energies do not.
NEAR_CUTOFF = {"force": 2e-8, "virial": 1e-7, "atom_virial": 2e-7}
System = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@cache
def reference(model: str) -> dict[tuple[str, str, str], np.ndarray]:
    """(system, route or "input", quantity) to its values."""
    with np.load(FOLDER / f"{model}_ref.npz") as file:
        return {tuple(key.split("/")): file[key] for key in file.files}  # type: ignore[misc]


@cache
def systems() -> dict[str, System]:
    """(coord, atype, cell) by name."""
    with np.load(FOLDER / "systems.npz") as file:
        names = sorted({key.split("/")[0] for key in file.files})
        cells = {name: file[f"{name}/cell"] for name in names}
        return {
            name: (file[f"{name}/coord"], file[f"{name}/atype"], cell if cell.size else None) for name, cell in cells.items()
        }


@cache
def source(model: str) -> dict[str, Any]:
    """The model dict."""
    return read_source(FOLDER / f"{model}.dp")


@cache
def answers(model: str, route: str) -> dict[tuple[str, str], np.ndarray]:
    """(system, quantity) to carryall's values, all systems in one graph."""
    chosen = {key[0]: systems()[key[0]] for key in reference(model)}
    inputs = {name: {key[2]: v for key, v in reference(model).items() if key[:2] == (name, "input")} for name in chosen}
    potential = load(FOLDER / f"{model}.dp", neighbor_graph_method=METHODS[route])
    return evaluate_together(potential, chosen, inputs)


def structure(system: System, type_map: Sequence[str]) -> AtomicData:
    """As the structure that a user would have."""
    coordinates, types, cell = system
    return AtomicData(coordinates, [atomic_number(type_map[kind]) for kind in types], cell)


def evaluate_together(
    potential: Potential, chosen: Mapping[str, System], inputs: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[tuple[str, str], np.ndarray]:
    """(system, quantity) to values; `inputs` holds `fparam` (width,) and `aparam` (n, width) of each system, or neither."""
    spec = potential.spec
    graph = graph_from_structures(
        [structure(one, spec.type_map) for one in chosen.values()], spec.cutoff, spec.type_map, wrap=True
    )
    given = {key: [inputs[name][key] for name in chosen] for key in next(iter(inputs.values()), {})}
    if "fparam" in given:
        graph = graph.replace(fparam=torch.tensor(np.stack(given["fparam"])))
    if "aparam" in given:
        graph = graph.replace(aparam=torch.tensor(np.concatenate(given["aparam"])))
    out = {key: value.numpy() for key, value in potential(graph, atomic_virial=True).items()}
    found, start = {}, 0
    for index, (name, (coordinates, _, _)) in enumerate(chosen.items()):
        rows = slice(start, start + len(coordinates))
        for quantity, ours in NAMES.items():
            found[name, quantity] = out[ours][index] if quantity in ("energy", "virial") else out[ours][rows]
        start += len(coordinates)
    return found


def allowed(model: str, route: str, system: str, quantity: str) -> float:
    """How far a value may be from the reference; an energy, a sum that cancels, is measured by its terms."""
    if system == "cu64_tri" and quantity in NEAR_CUTOFF and has_attention(model) and not is_smooth(model):
        return NEAR_CUTOFF[quantity]
    expected = reference(model)[system, route, quantity]
    terms = reference(model)[system, route, "atom_energy"]
    scale = np.abs(terms).sum() if quantity == "energy" else np.abs(expected).max()
    return (FLOAT32 if is_float32(model) else FLOAT64) * max(float(scale), 1e-6)


def has_attention(model: str) -> bool:
    """Whether there are attention layers."""
    return source(model)["descriptor"]["attn_layer"] > 0


def is_smooth(model: str) -> bool:
    """Whether attention fades at the cutoff; se_atten_v2 always does."""
    return source(model)["descriptor"].get("smooth_type_embedding", True)


def is_float32(model: str) -> bool:
    """Whether any part computes in float32."""
    return "float32" in (source(model)["descriptor"]["precision"], source(model)["fitting"]["precision"])


def effects(model: str) -> set[str]:
    """Why the two semantics differ for this model; empty where they must agree."""
    descriptor = source(model)["descriptor"]
    found = set()
    if has_attention(model) and is_smooth(model):
        found.add("smooth")
    if descriptor["@variables"]["davg"].any():
        found.add("davg")
    if sum(np.atleast_1d(descriptor["sel"])) < 30:
        found.add("sel")
    return found
