"""Reference files of spin models (tests/reference_data/spin, by scripts/make_spin_reference.py), and carryall's answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dpa1_reference import NAMES as DPA1_NAMES
from dpa1_reference import System, structure

from carryall.data import AtomicData
from carryall.graph.neighbor_search import graph_from_structures
from carryall.graph.potential import Potential
from carryall.models import EagerPotential, model_from_source
from carryall.models.dpa1.semantics import with_method
from carryall.package.sources import read_source

FOLDER = Path(__file__).parents[1] / "reference_data" / "spin"
MODELS = sorted(path.stem for path in FOLDER.glob("*.dp"))
NAMES = {**DPA1_NAMES, "force_mag": "magnetic_forces"}
MARGINS = {"lower": 0.0, "whole": 2.5}
"""The `neighbor_margin` of each of deepmd-kit's routes: 0, or twice the largest virtual_scale * |spin| of the files (1.2 Å)."""


@cache
def reference(model: str) -> dict[tuple[str, str, str], np.ndarray]:
    """(system, route or "input", quantity) to its values."""
    with np.load(FOLDER / f"{model}_ref.npz") as file:
        return {tuple(key.split("/")): file[key] for key in file.files}  # type: ignore[misc]


@cache
def systems() -> dict[str, tuple[System, np.ndarray]]:
    """((coord, atype, cell), spins) by name."""
    with np.load(FOLDER / "systems.npz") as file:
        names = sorted({key.split("/")[0] for key in file.files})
        cells = {name: file[f"{name}/cell"] for name in names}
        return {
            name: (
                (file[f"{name}/coord"], file[f"{name}/atype"], cell if cell.size else None),
                file[f"{name}/spin"],
            )
            for name, cell in cells.items()
        }


def potential(source: dict[str, Any], method: str, margin: float) -> EagerPotential:
    """The model of a dict."""
    return EagerPotential(with_method(model_from_source({**source, "neighbor_margin": margin}), method).eval())  # type: ignore[arg-type]


@cache
def answers(model: str, route: str, method: str = "legacy") -> dict[tuple[str, str], np.ndarray]:
    """(system, quantity) to carryall's values, all systems in one graph."""
    inputs = {name: {key[2]: v for key, v in reference(model).items() if key[:2] == (name, "input")} for name in systems()}
    return evaluate_together(potential(read_source(FOLDER / f"{model}.dp"), method, MARGINS[route]), systems(), inputs)


def evaluate_together(
    potential: Potential, chosen: Mapping[str, tuple[System, np.ndarray]], inputs: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[tuple[str, str], np.ndarray]:
    """(system, quantity) to values; `inputs` holds `fparam` (width,) and `aparam` (n, width) of each system, or neither."""
    spec = potential.spec
    items = [with_inputs(structure(one, spec.type_map), spins, inputs[name]) for name, (one, spins) in chosen.items()]
    graph = graph_from_structures(items, spec.cutoff, spec.type_map, wrap=True)
    out = {key: value.numpy() for key, value in potential(graph, atomic_virial=True).items()}
    found, start = {}, 0
    for index, (name, (_, spins)) in enumerate(chosen.items()):
        rows = slice(start, start + len(spins))
        for quantity, ours in NAMES.items():
            found[name, quantity] = out[ours][index] if quantity in ("energy", "virial") else out[ours][rows]
        start += len(spins)
    return found


def with_inputs(data: AtomicData, spins: np.ndarray, inputs: Mapping[str, np.ndarray]) -> AtomicData:
    """The structure as a user would have it."""
    system = {key: value for key, value in inputs.items() if key == "fparam"}
    return data.replace(
        spins=torch.tensor(spins), system_extras=system, atom_extras={k: v for k, v in inputs.items() if k == "aparam"}
    )


def worst_error(
    found: Mapping[tuple[str, str], np.ndarray], expected: Mapping[tuple[str, str, str], np.ndarray], route: str
) -> Any:
    """Largest error by (system, quantity), relative to the largest of the terms that make up a sum."""
    errors = {}
    for (system, quantity), value in found.items():
        wanted = expected[system, route, quantity]
        terms = {"energy": "atom_energy", "force": "atom_virial", "virial": "atom_virial"}.get(quantity, quantity)
        scale = max(np.abs(wanted).max(), np.abs(expected[system, route, terms]).max(), 1e-6)
        errors[system, quantity] = float(np.abs(value.reshape(wanted.shape) - wanted).max() / scale)
    return errors
