"""`carryall.pack`: from a model, a checkpoint or a source file to the portable file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from carryall.errors import InputError
from carryall.graph.potential import DTYPES
from carryall.models.dpa1.compression import compress as compressed
from carryall.models.dpa1.compression import is_compressed
from carryall.models.dpa1.model import DPA1
from carryall.models.dpa1.semantics import with_method
from carryall.models.registry import model_from_source, model_to_source
from carryall.package.export import export_model, source_of
from carryall.package.from_source import load_model, read_checkpoint, with_weight_dtype

TARGETS = ("carryall", "deepmd")


def pack(
    model: nn.Module | str | Path,
    path: str | Path,
    *,
    dtype: str | None = "float64",
    device: str = "cpu",
    cpu_level: str | None = None,
    compress: bool = False,
    compression_tolerance: float | None = None,
    neighbor_graph_method: str | None = None,
    target: Literal["carryall", "deepmd"] = "carryall",
    training_config: dict[str, Any] | None = None,
    check: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Write `path` (`.pt2` compiled, `.pte` portable) from a model or from any file that holds one; returns the path.

    `dtype` of the weights inside the program (None keeps the model's); inputs and outputs are float64 either way. `cpu_level`:
    the lowest CPU that a `.pt2` shall run on ("x86-64-v2", "-v3" with AVX2, "-v4" with AVX-512), this one's when None.
    `compress` puts tables in place of embedding nets, with relative errors below `compression_tolerance` (None: 1e-8, in
    float32 2e-5), see docs/compression.md; the source in the file keeps the nets.
    `neighbor_graph_method` "graph" or "legacy" (DeePMD's padded lists) replaces the model's own; a DeePMD model for which it
    matters says so to `notify`, or in a SemanticsWarning. `target` "deepmd" writes a `.pt2` that deepmd-kit runs. The file is
    checked against the model on graphs of all kinds before it gets its name. InputError for unusable input, PackError when the
    program does not reproduce the model, MissingDependencyError without a C++ compiler (`.pt2` only).
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if target not in TARGETS:
        raise InputError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if not isinstance(model, nn.Module):
        if training_config is None and Path(model).suffix == ".pt" and Path(model).is_file():
            training_config = read_checkpoint(Path(model)).get("config", {})
        model = load_model(model, neighbor_graph_method, notify)
    elif is_compressed(model):
        raise InputError("this model is compressed already: give the original to pack, with compress=True")
    elif any(isinstance(part, DPA1) for part in model.modules()):
        model = model_from_source(model_to_source(model))
        if neighbor_graph_method is not None:
            model = with_method(model, neighbor_graph_method)
    else:
        model = copy.deepcopy(model)
    if dtype is not None:
        model = with_weight_dtype(model, dtype)
    source = source_of(model)
    facts: dict[str, Any] = {}
    if compress:
        model, facts = compressed(model, tolerance=compression_tolerance)
    options: dict[str, Any] = {"cpu_level": cpu_level, "source": source, "training_config": training_config, "facts": facts}
    if target == "deepmd":
        from carryall.package.deepmd_abi import pack_for_deepmd

        return pack_for_deepmd(model, path, device=device, check=check, **options)
    return export_model(model, path, device=device, check=check, **options)
