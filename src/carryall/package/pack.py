"""`carryall.pack`: from a model, a checkpoint or a source file to the portable file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from carryall.errors import InputError
from carryall.graph.potential import DTYPES
from carryall.models.dpa1.model import DPA1
from carryall.models.dpa1.semantics import with_method
from carryall.models.registry import model_from_source, model_to_source
from carryall.package.export import export_model
from carryall.package.from_source import load_model, read_checkpoint, with_weight_dtype


def pack(
    model: nn.Module | str | Path,
    path: str | Path,
    *,
    dtype: str | None = "float64",
    device: str = "cpu",
    neighbor_graph_method: str | None = None,
    check: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Write `path` (`.pt2` compiled, `.pte` portable) from a model or from any file that holds one; returns the path.

    `dtype` of the weights inside the program (None keeps the model's); inputs and outputs are float64 either way.
    `neighbor_graph_method` "graph" or "legacy" (DeePMD's padded lists) replaces the model's own; a DeePMD model for which it
    matters says so to `notify`, or in a SemanticsWarning. The file is checked against the model on graphs of all kinds before
    it gets its name. InputError for unusable input, PackError when the program does not reproduce the model,
    MissingDependencyError without a C++ compiler (`.pt2` only).
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    training: dict[str, Any] = {}
    if not isinstance(model, nn.Module):
        if Path(model).suffix == ".pt" and Path(model).is_file():
            training = read_checkpoint(Path(model)).get("config", {})
        model = load_model(model, neighbor_graph_method, notify)
    elif any(isinstance(part, DPA1) for part in model.modules()):
        model = model_from_source(model_to_source(model))
        if neighbor_graph_method is not None:
            model = with_method(model, neighbor_graph_method)
    if dtype is not None:
        model = with_weight_dtype(model, dtype)
    return export_model(model, path, device=device, training_config=training, check=check)
