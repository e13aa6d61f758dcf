"""From any file that holds a model to another, and to what deepmd-kit reads.

A model dict of ours is DeePMD's where it has the model, but for two fields: `neighbor_graph_method`, and the `neighbor_margin`
of spin models. It refuses or loses them; written for deepmd-kit, they stand beside the model, where only carryall looks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

import carryall
from carryall.errors import InputError
from carryall.package.sources import (
    BESIDE,
    PACKED_SUFFIXES,
    SOURCE_SUFFIXES,
    is_source,
    model_parts,
    read_root,
    write_source,
)

Target = Literal["deepmd", "carryall"]
OF_DEEPMD = {"standard", "zbl", "linear", "linear_ener", "pairtab", "spin_ener"}
"""Types of model dicts that deepmd-kit has, too."""
INSTEAD = {
    "ziegler_biersack_littmark": "write it as a table with carryall.models.zbl.write_zbl_table, and read that as a PairTable",
}
RUNS_ANYWAY = "carryall pack --target deepmd makes a .pt2 of it that deepmd-kit runs, and .json keeps its dict"
DEFAULT: dict[str, Any] = {"neighbor_graph_method": "graph", "neighbor_margin": 0.0}
LINEAR_VERSION = 3


def convert(
    source: str | Path,
    path: str | Path,
    *,
    target: Target | None = None,
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Write the model of `source` (any file, checkpoint or built-in name) to `path`, by its suffix; returns the path.

    `.json`, `.json.gz`, `.dp`, `.yaml`, `.yml` hold the dict, `.pt2` and `.pte` a program. `target` "deepmd" writes for
    deepmd-kit, "carryall" everything that carryall has; None: "deepmd" for `.dp` and `.yaml`, else "carryall". InputError when
    deepmd-kit has no such model.
    """
    path = Path(path)
    if path.suffix in PACKED_SUFFIXES:
        from carryall.package.pack import pack

        return pack(source, path, dtype=None, target=target or "carryall", notify=notify)
    if not is_source(path):
        known = ", ".join((*SOURCE_SUFFIXES, *PACKED_SUFFIXES))
        raise InputError(f"{path}: the suffix says what to write: expected one of {known}")
    target = target or ("carryall" if path.name.endswith((".json", ".json.gz")) else "deepmd")
    root = root_of(source)
    if target == "deepmd":
        root = for_deepmd(root)
    return write_source(path, root, digits=target == "deepmd")


def root_of(source: str | Path) -> dict[str, Any]:
    """The root dict of any file or name that holds a model, as carryall writes it: what is there twice or by default is told.

    The dict goes through the model, so that it is complete, of the newest versions, and checked.
    """
    from carryall.models.registry import model_from_source
    from carryall.package.export import source_of
    from carryall.package.from_source import load_model, read_checkpoint

    path, config = Path(source), dict[str, Any]()
    if path.is_file() and (is_source(path) or path.suffix in PACKED_SUFFIXES):
        root = read_root(path)
        model = model_from_source(root.get("model", root))
        config = root.get("model_def_script") or {}
    else:
        model = load_model(path)
        if path.suffix == ".pt":
            config = read_checkpoint(path).get("config", {})
    return {**source_of(model), "model_def_script": config}


def for_deepmd(root: dict[str, Any]) -> dict[str, Any]:
    """The root as deepmd-kit reads it; InputError names a model that it does not have. Changes nothing of `root`."""
    model = copy.deepcopy(root["model"])
    beside: dict[str, set[Any]] = {name: set() for name in BESIDE}
    for part in parts(model):
        kind = part.get("type")
        if kind not in OF_DEEPMD:
            raise InputError(f"deepmd-kit has no model of type {kind!r}: {INSTEAD.get(str(kind), RUNS_ANYWAY)}")
        for name, owner in BESIDE.items():
            if kind == owner:
                beside[name].add(part.pop(name, DEFAULT[name]))
        if kind == "linear_ener":
            part["type"] = "linear"
    if model["type"] == "pairtab":
        model = alone(model)
    if model["type"] == "linear":
        # as a whole model deepmd.pt knows it by this name only, its other two routes by both; as a part, by the other
        model["type"] = "linear_ener"
    for name, values in beside.items():
        if len(values) > 1:
            raise InputError(f"the models of the combination differ in {name}: give all of them one")
    found = {
        "software": "carryall",
        "version": carryall.__version__,
        "backend": "dpmodel",
        "model": model,
        "model_def_script": root.get("model_def_script") or {},
    }
    return found | {name: values.pop() for name, values in beside.items() if values - {DEFAULT[name]}}


def alone(part: dict[str, Any]) -> dict[str, Any]:
    """A combination of one: deepmd-kit has a pair table as a part of others only."""
    n_types = len(part["type_map"])
    rules = {"type_map": part["type_map"], "atom_exclude_types": [], "pair_exclude_types": [], "rcond": None}
    variables = {"out_bias": np.zeros((1, n_types, 1)), "out_std": np.ones((1, n_types, 1))}
    head = {"@class": "Model", "type": "linear", "@version": LINEAR_VERSION, **rules, "preset_out_bias": None}
    return {**head, "@variables": variables, "models": [part], "weights": "sum"}


def is_of_deepmd(root: dict[str, Any]) -> bool:
    """Whether deepmd-kit has the model."""
    return all(part.get("type") in OF_DEEPMD for part in parts(root["model"]))


def parts(model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A model dict, and those inside it."""
    yield model
    for one in model_parts(model):
        yield from parts(one)
