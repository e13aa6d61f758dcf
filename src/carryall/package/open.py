"""One call for whatever holds a potential: packed file, checkpoint, source dict, or built-in name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from carryall.errors import InputError, MissingDependencyError, nearest
from carryall.graph.potential import DTYPES, Potential
from carryall.models.dpa1.model import DPA1
from carryall.models.dpa1.source import set_weight_dtype
from carryall.models.eager import EagerPotential
from carryall.models.pair import LennardJones
from carryall.models.registry import model_from_source
from carryall.models.sutton_chen import SuttonChen
from carryall.package.cache import compiled
from carryall.package.load import load_packed, usable_device
from carryall.package.sources import SOURCE_SUFFIXES, is_source, read_source

BUILT_IN: dict[str, Callable[[], nn.Module]] = {
    "lj-argon": LennardJones.argon,
    "sutton-chen": SuttonChen,
    "water": lambda: model_from_source(read_source(shipped("water.json.gz"))),
}
COMPILED_BUILT_IN = ("water",)  # the others are a few operations each


def load(path: str | Path, device: str = "cpu", dtype: str | None = None, *, notify: Callable[[str], None] | None = None) -> Potential:
    """A potential from a `.pt2`, `.pte`, checkpoint `.pt`, source dict (`.json`, DeePMD `.dp`, `.yaml`) or built-in name.

    `dtype` casts what is run from source; a packed file keeps the one it was packed in. The built-in `water` is compiled into a
    cache on first use; `notify` hears of it, and of running it uncompiled where there is no C++ compiler.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if str(path) in COMPILED_BUILT_IN and dtype is None and usable_device(device).type == "cpu":
        try:
            return load_packed(compiled(shipped(f"{path}.json.gz"), notify or (lambda _: None)))
        except MissingDependencyError as missing:
            if notify:
                notify(f"running {path} uncompiled: {missing}")
    if Path(path).suffix in (".pt2", ".pte"):
        return load_packed(path, device, dtype)
    usable_device(device)
    model = load_model(path)
    if dtype is not None and isinstance(model, DPA1):
        model = set_weight_dtype(model, getattr(torch, dtype))
    model.eval().to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return EagerPotential(model, device)  # type: ignore[arg-type]


def load_model(path: str | Path) -> nn.Module:
    """The model itself, to train or pack: from a checkpoint, a source dict, a packed file's source, or a built-in name."""
    path = Path(path)
    if str(path) in BUILT_IN:
        return BUILT_IN[str(path)]()
    if not path.is_file():
        known = [*BUILT_IN]
        raise InputError(f"no such file, and no built-in potential: {path}{nearest(str(path), known)} (built in: {', '.join(known)})")
    if path.suffix in (".pt2", ".pte") or is_source(path):
        return model_from_source(read_source(path))
    if path.suffix == ".pt":
        return model_from_source(read_checkpoint(path)["model"])
    raise InputError(f"{path}: unknown kind of potential {path.suffix!r}: expected .pt2, .pte, .pt, {', '.join(SOURCE_SUFFIXES)} or a built-in name")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint; only plain values and tensors are ever unpickled."""
    from carryall.training.checkpoint import read

    return read(path)


def shipped(name: str) -> Path:
    """A file that comes with the package."""
    path = Path(str(resources.files("carryall") / "assets" / name))
    if not path.exists():
        raise InputError(f"the installed package lacks {path}: install carryall again")
    return path
