"""Models from their source: checkpoints, source dicts, the source inside a packed file, built-in names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from carryall.errors import InputError, SemanticsWarning, nearest
from carryall.graph.potential import Potential
from carryall.models.dpa1.model import DPA1
from carryall.models.dpa1.semantics import semantics_note, with_method
from carryall.models.dpa1.source import set_weight_dtype
from carryall.models.eager import EagerPotential
from carryall.models.pair import LennardJones
from carryall.models.registry import model_from_source
from carryall.models.sutton_chen import SuttonChen
from carryall.package.load import usable_device
from carryall.package.open import shipped
from carryall.package.sources import SOURCE_SUFFIXES, is_source, read_root, read_source

BUILT_IN: dict[str, Callable[[], nn.Module]] = {
    "lj-argon": LennardJones.argon,
    "sutton-chen": SuttonChen,
    "water": lambda: model_from_source(read_source(shipped("water.json.gz"))),
}


def run_from_source(
    path: str | Path,
    device: str = "cpu",
    dtype: str | None = None,
    neighbor_graph_method: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> Potential:
    """The model run by PyTorch as it is, with weights in `dtype` (None keeps the model's)."""
    usable_device(device)
    model = load_model(path, neighbor_graph_method, notify)
    if dtype is not None:
        model = with_weight_dtype(model, dtype)
    model.eval().to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return EagerPotential(model, device)  # type: ignore[arg-type]


def load_model(
    path: str | Path, neighbor_graph_method: str | None = None, notify: Callable[[str], None] | None = None
) -> nn.Module:
    """The model itself, to train or pack: from a checkpoint, a source dict, a packed file's source, or a built-in name.

    `neighbor_graph_method` replaces the model's own. A model that DeePMD made, and for which it matters when none is asked
    for, says so to `notify`, or in a SemanticsWarning.
    """
    path = Path(path)
    model = _read_model(path)
    if neighbor_graph_method is not None:
        return with_method(model, neighbor_graph_method)
    foreign = is_source(path) and read_root(path).get("software") != "carryall"
    for part in model.modules() if foreign else ():
        if isinstance(part, DPA1) and (note := semantics_note(part)):
            tell(f"{path}: {note}", notify)
    return model


def with_weight_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """The model with the weights of each DPA-1 inside it cast; what is analytic stays float64. Changes the model."""
    for part in model.modules():
        if isinstance(part, DPA1):
            set_weight_dtype(part, getattr(torch, dtype))
    return model


def tell(message: str, notify: Callable[[str], None] | None) -> None:
    """To the one who asked to be notified, or as a warning."""
    if notify is None:
        warnings.warn(message, SemanticsWarning, stacklevel=2)
    else:
        notify(message)


def _read_model(path: Path) -> nn.Module:
    if str(path) in BUILT_IN:
        return BUILT_IN[str(path)]()
    if not path.is_file():
        hint = nearest(str(path), BUILT_IN)
        raise InputError(f"no such file, and no built-in potential: {path}{hint} (built in: {', '.join(BUILT_IN)})")
    if path.suffix in (".pt2", ".pte") or is_source(path):
        return model_from_source(read_source(path))
    if path.suffix == ".pt":
        return model_from_source(read_checkpoint(path)["model"])
    known = f".pt2, .pte, .pt, {', '.join(SOURCE_SUFFIXES)}"
    raise InputError(f"{path}: unknown kind of potential {path.suffix!r}: expected {known} or a built-in name")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint; only plain values and tensors are ever unpickled."""
    from carryall.training.checkpoint import read

    return read(path)
