"""Write the portable file: trace energy and derivatives once, for every size, then save or compile the program.

The derivatives are traced into the graph, so the file needs no autograd. Each input dimension is free, down to zero: sizes that
depend on data arrive as the shapes of inputs (`local`, `rank`), and no size of the sample equals another, since the tracer
would take equal ones for the same.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

import carryall
from carryall.errors import InputError, MissingDependencyError
from carryall.graph.edge_terms import reduce_edges
from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors, pointer
from carryall.models.derivatives import EnergyModel, energy_and_gradient
from carryall.models.registry import model_to_source
from carryall.package.arrays import to_json
from carryall.package.check import check_against_eager
from carryall.package.load import load_packed, quiet_torch
from carryall.package.manifest import FORMAT_VERSION, append_facts
from carryall.package.signature import INPUTS, OUTPUTS, to_graph, to_inputs

SUFFIXES = (".pt2", ".pte")
LARGEST = 2**40  # of any dimension
# inductor follows the caller's thread count instead of baking in this machine's
INDUCTOR_OPTIONS = {"cpp.dynamic_threads": True}


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    device: str = "cpu",
    training_config: dict[str, Any] | None = None,
    check: bool = True,
) -> Path:
    """Write `model` to a `.pt2` (compiled) or `.pte` (portable program), verified against eager before it gets its name."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: the suffix says what to write, .pt2 (compiled) or .pte (portable), got {path.suffix or 'none'!r}"
        )
    if path.suffix == ".pt2":
        require_compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    model = model.eval().to(device)
    program = trace(model, device)
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=path.parent) as folder:
        # torch names the root folder of the archive after the file
        part = Path(folder) / "model.pt2"
        with quiet_torch():
            if path.suffix == ".pt2":
                compile_program(program, part)
            else:
                torch.export.save(program, part)
        append_facts(part, metadata_of(model, path.suffix[1:], device), to_json(source_of(model)), training_config or {})
        if check:
            check_against_eager(load_packed(part, device), model)
        part.replace(path)
    return path


def compile_program(program: ExportedProgram, path: Path) -> None:
    """Compile by AOTInductor; one process at a time, since all write the same files of torch's own cache."""
    folder = Path(cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "carryall.lock"), deterministic_sums():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=INDUCTOR_OPTIONS)


@contextlib.contextmanager
def deterministic_sums() -> Iterator[None]:
    """Sums over edges in one order: compiled for a CPU they would be atomic, and last bits would differ from call to call."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def source_of(model: nn.Module) -> dict[str, Any]:
    """The root of a source file: what wrote it, and the model's nested dict."""
    return {
        "software": "carryall",
        "version": carryall.__version__,
        "format_version": FORMAT_VERSION,
        "model": model_to_source(model),
    }


def metadata_of(model: nn.Module, kind: str, device: str) -> dict[str, Any]:
    """Flat facts of the file, read from the model; names are DeePMD's where it has the field."""
    spec = model.spec
    assert not isinstance(spec, Tensor | nn.Module)
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        **spec.to_dict(),
        "extra_inputs": list(spec.extra_inputs),
        "rcut": spec.cutoff,
        "has_message_passing": spec.message_passing,
        "neighbor_graph_method": getattr(model, "neighbor_graph_method", "graph"),
        "model_type": type(model).__name__,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "input_keys": [*INPUTS, *spec.extra_inputs],
        "output_keys": list(OUTPUTS),
        "device": torch.device(device).type,
        "carryall_version": carryall.__version__,
        "torch_version": torch.__version__,
        "cpu_isa": cpu_isa() if kind == "pt2" else "any",
        "machine": platform.machine() if kind == "pt2" else "any",
    }


def cpu_isa() -> str:
    """The vector instructions that compiled code for this CPU uses."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return str(pick_vec_isa()) or "none"


def require_compiler() -> str:
    """The C++ compiler; MissingDependencyError names what to install."""
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise MissingDependencyError(
        "no C++ compiler found, which compiling a .pt2 needs: install one (Debian and Ubuntu: apt install g++; "
        "macOS: xcode-select --install) or write a .pte, which needs none"
    )


class _Program(nn.Module):
    """The function that is traced: tensors in, tensors out, derivatives inside."""

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model = model
        self.extra = model.spec.extra_inputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of OUTPUTS."""
        graph = to_graph(inputs, self.extra)
        vectors = edge_vectors(graph).detach()
        atomic_energy, gradient = energy_and_gradient(self.model, graph, vectors)
        out = reduce_edges(graph, atomic_energy, vectors, gradient, atomic_virial=True)
        out["edge_gradient"] = gradient
        return tuple(out[name].detach() for name in OUTPUTS)


def trace(model: nn.Module, device: str = "cpu") -> ExportedProgram:
    """One program for all sizes."""
    wanted = [p.requires_grad for p in model.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        spec = cast(EnergyModel, model).spec
        sample = to_inputs(sample_graph(device, spec.dim_fparam, spec.dim_aparam), spec.extra_inputs)
        names = ("atoms_size", "systems_size", "edges_size", "ptr_size", "local_size", "rank_size")
        atoms, systems, edges, ptr, local, rank = (Dim(name, min=0, max=LARGEST) for name in names)
        sizes = {
            "positions": atoms,
            "atom_types": atoms,
            "system": atoms,
            "cell": systems,
            "ptr": ptr,
            "local": local,
            "rank": rank,
            "fparam": systems,
            "aparam": atoms,
        }
        shapes = tuple({0: sizes.get(name, edges)} for name in (*INPUTS, *spec.extra_inputs))
        with quiet_torch():
            flat = make_fx(_Program(cast(EnergyModel, model)), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*sample)
            return torch.export.export(flat, sample, dynamic_shapes=shapes, strict=False)
    finally:
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)


def sample_graph(device: str, dim_fparam: int = 0, dim_aparam: int = 0) -> NeighborGraph:
    """Sizes to trace with: all different from one another and from 3; the values play no part."""
    n_systems, n_local, n_atoms, n_edges, degree = 5, 23, 31, 127, 11
    center = torch.arange(n_edges) % n_local
    center = center.sort().values
    graph = NeighborGraph(
        positions=torch.zeros(n_atoms, 3, dtype=torch.float64),
        atom_types=torch.zeros(n_atoms, dtype=torch.int64),
        system=torch.arange(n_atoms).clamp_max(n_systems - 1),
        cell=torch.zeros(n_systems, 3, 3, dtype=torch.float64),
        edge_center=center,
        edge_neighbor=center.flip(0),
        edge_shift=torch.zeros(n_edges, 3, dtype=torch.int32),
        edge_mask=torch.ones(n_edges, dtype=torch.bool),
        ptr=pointer(center, n_local),
        rank=torch.arange(degree),
        fparam=torch.zeros(n_systems, dim_fparam, dtype=torch.float64),
        aparam=torch.zeros(n_atoms, dim_aparam, dtype=torch.float64),
    )
    return graph.to(device)
