"""The metadata of a file that is being written: facts read from the model, the program and this machine, by one function."""

from __future__ import annotations

import hashlib
import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

import carryall
from carryall.package.cpu import machine
from carryall.package.manifest import FORMAT_VERSION
from carryall.package.metadata import Kind, Metadata
from carryall.package.signature import INPUT_DEFS, OUTPUT_DEFS, input_names, output_names


def metadata_of(
    model: nn.Module, kind: Kind, device: str, *, model_json: str, cpu_level: str, compiler: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """Facts read from the model and this machine, and further `facts`; ready for JSON."""
    spec = model.spec
    assert not isinstance(spec, Tensor | nn.Module)
    compiled = kind == "pt2"
    where = torch.device(device)
    values = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        **spec.to_dict(),
        "rcut": spec.cutoff,
        "has_message_passing": spec.message_passing,
        "neighbor_graph_method": getattr(model, "neighbor_graph_method", "graph"),
        "extra_inputs": list(spec.extra_inputs),
        "input_keys": list(input_names(spec)),
        "output_keys": list(output_names(spec)),
        "input_defs": [definition(name, *INPUT_DEFS[name]) for name in input_names(spec)],
        "output_defs": [definition(name, "float64", *OUTPUT_DEFS[name]) for name in output_names(spec)],
        "model_type": type(model).__name__,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "model_sha256": hashlib.sha256(model_json.encode()).hexdigest(),
        "device": where.type,
        "carryall_version": carryall.__version__,
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "compiler": compiler,
        "machine": machine() if compiled else "any",
        "cpu_level": cpu_level if compiled else "any",
        "cuda_capability": ".".join(map(str, torch.cuda.get_device_capability(where))) if where.type == "cuda" else "",
        "created": timestamp(),
        **facts,
    }
    return Metadata.model_validate(values).model_dump()


def definition(name: str, dtype: str, shape: list[str | int], unit: str) -> dict[str, Any]:
    """As Definition has it."""
    return {"name": name, "dtype": dtype, "shape": shape, "unit": unit}


def timestamp() -> str:
    """Now, or SOURCE_DATE_EPOCH, in UTC to the second."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.fromtimestamp(int(fixed), UTC) if fixed.isdigit() else datetime.now(UTC)
    return now.isoformat(timespec="seconds")
