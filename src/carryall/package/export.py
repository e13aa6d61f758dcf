"""Write the portable file: the traced program, saved or compiled, with the facts and the source of its model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import carryall
from carryall.errors import InputError
from carryall.models.registry import model_to_source
from carryall.package.arrays import to_json
from carryall.package.check import check_against_eager
from carryall.package.compile import compile_program, compiler_version, require_compiler
from carryall.package.cpu import checked_level
from carryall.package.facts import metadata_of
from carryall.package.load import load_packed, quiet_torch
from carryall.package.manifest import FORMAT_VERSION, append_facts
from carryall.package.metadata import Kind
from carryall.package.program import strip_pickles
from carryall.package.trace import trace

SUFFIXES = (".pt2", ".pte")


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    device: str = "cpu",
    cpu_level: str | None = None,
    source: dict[str, Any] | None = None,
    training_config: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    check: bool = True,
) -> Path:
    """Write `model` to a `.pt2` (compiled) or `.pte` (portable program), verified against eager before it gets its name.

    `cpu_level` is the lowest that a `.pt2` shall run on, this CPU's when None. `source` stands for the model's own root dict
    where the model was changed for speed only, and `facts` are further metadata.
    """
    path = Path(path)
    kind = kind_of(path)
    level = checked_level(cpu_level) if kind == "pt2" else "any"
    path.parent.mkdir(parents=True, exist_ok=True)
    model_json = to_json(source or source_of(model))
    model = model.eval().to(device)
    compiler = compiler_version() if kind == "pt2" else ""
    metadata = metadata_of(model, kind, device, model_json=model_json, cpu_level=level, compiler=compiler, facts=facts or {})
    program = trace(model, device)
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=path.parent) as folder:
        # torch names the root folder of the archive after the file
        part = Path(folder) / "model.pt2"
        write_program(program, part, kind, level)
        append_facts(part, metadata, model_json, training_config or {})
        if check:
            check_against_eager(load_packed(part, device), model)
        part.replace(path)
    return path


def kind_of(path: Path) -> Kind:
    """What to write, by the suffix; InputError for another one, MissingDependencyError where there is no compiler."""
    if path.suffix == ".pte":
        return "pte"
    if path.suffix != ".pt2":
        raise InputError(
            f"{path}: the suffix says what to write, .pt2 (compiled) or .pte (portable), got {path.suffix or 'none'!r}"
        )
    require_compiler()
    return "pt2"


def write_program(program: ExportedProgram, path: Path, kind: Kind, level: str) -> None:
    """Torch's own part of the file."""
    with quiet_torch():
        if kind == "pt2":
            compile_program(program, path, level)
        else:
            torch.export.save(program, path)
            strip_pickles(path)


def source_of(model: nn.Module) -> dict[str, Any]:
    """The root of a source file: what wrote it, and the model's nested dict."""
    return {
        "software": "carryall",
        "version": carryall.__version__,
        "format_version": FORMAT_VERSION,
        "model": model_to_source(model),
    }
