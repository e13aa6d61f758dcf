"""Run a packed file. Nothing here needs the source of the model: a file runs where its model's code is absent."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.graph.blocks import evaluate_in_blocks
from carryall.graph.edge_terms import AtomicVirial, per_atom
from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors
from carryall.graph.potential import PotentialSpec, with_defaults
from carryall.package.manifest import verify
from carryall.package.signature import INPUTS, OUTPUTS, to_inputs


@dataclass(frozen=True, eq=False)
class PackedPotential:
    """A `.pt2` or `.pte` behind the Potential contract."""

    path: Path
    spec: PotentialSpec
    metadata: dict[str, Any]
    device: torch.device
    _run: Callable[..., Any] = field(repr=False)

    def __call__(self, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
        """Evaluate the graph; results are on the graph's device."""
        _check_types(graph, self.spec)
        here = with_defaults(graph.to(self.device, torch.float64), self.spec)
        with torch.no_grad():
            if self.spec.block_edges is None:
                out = self.evaluate_whole(here, atomic_virial)
            else:
                out = evaluate_in_blocks(self._edge_call, here, self.spec.block_edges, atomic_virial=atomic_virial)
        return {name: value.to(graph.device) for name, value in out.items()}

    def evaluate_whole(self, graph: NeighborGraph, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
        """The program's own sums, in one call."""
        out = dict(zip(OUTPUTS, self._run(*to_inputs(graph, self.spec.extra_inputs)), strict=True))
        gradient, by_neighbor = out.pop("edge_gradient"), out.pop("atomic_virial")
        if atomic_virial is True or atomic_virial == "neighbor":
            return {**out, "atomic_virial": by_neighbor}
        if atomic_virial:
            edge_virial = -gradient[:, :, None] * edge_vectors(graph)[:, None, :]
            return {**out, "atomic_virial": per_atom(graph, edge_virial, atomic_virial)}
        return out

    def _edge_call(self, part: NeighborGraph) -> tuple[Tensor, Tensor]:
        out = dict(zip(OUTPUTS, self._run(*to_inputs(part, self.spec.extra_inputs)), strict=True))
        return out["atomic_energy"], out["edge_gradient"]


def load_packed(
    path: str | Path, device: str = "cpu", dtype: str | None = None, neighbor_graph_method: str | None = None
) -> PackedPotential:
    """Load a `.pt2` or `.pte`; every entry is checked against the manifest's SHA-256 before anything of it runs."""
    path, where = Path(path), usable_device(device)
    metadata = verify(path)
    spec = PotentialSpec.from_dict(metadata)
    if tuple(metadata["input_keys"]) != (*INPUTS, *spec.extra_inputs) or tuple(metadata["output_keys"]) != OUTPUTS:
        raise InputError(f"{path} has other inputs or outputs than this version of carryall: pack it again")
    if dtype is not None and dtype != spec.dtype:
        raise InputError(f"{path} was packed in {spec.dtype}, not {dtype}: pack it again with --dtype {dtype}")
    packed_method = metadata.get("neighbor_graph_method", "graph")
    if neighbor_graph_method is not None and neighbor_graph_method != packed_method:
        raise InputError(
            f"{path} was packed with neighbor_graph_method {packed_method!r}, not {neighbor_graph_method!r}: "
            f"pack it again with --neighbor-graph-method {neighbor_graph_method}"
        )
    if where.type != metadata["device"] and metadata["kind"] == "pt2":
        raise InputError(f"{path} was compiled for {metadata['device']}, not {device}: pack it again with --device {device}")
    run = _load_compiled(path) if metadata["kind"] == "pt2" else _load_program(path, device)
    return PackedPotential(path, spec, metadata, where, run)


def usable_device(name: str) -> torch.device:
    """The device of that name; InputError when this machine or this torch has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).strip().splitlines()[0]}") from None
    return device


def _load_compiled(path: Path) -> Callable[..., Any]:
    from torch._inductor import aoti_load_package

    with quiet_torch():
        try:
            return aoti_load_package(str(path))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{path} cannot be loaded by torch {torch.__version__} on this machine ({reason}): pack it again here"
            ) from None


def _load_program(path: Path, device: str) -> Callable[..., Any]:
    with quiet_torch():
        # a buffer, since torch looks at the suffix of a name
        program = torch.export.load(io.BytesIO(path.read_bytes()))
        return program.module().to(device)


def _check_types(graph: NeighborGraph, spec: PotentialSpec) -> None:
    # compiled code ends the whole process on an index out of range
    if len(graph.atom_types) and not 0 <= int(graph.atom_types.min()) <= int(graph.atom_types.max()) < len(spec.type_map):
        raise InputError(f"atom_types must lie in 0..{len(spec.type_map) - 1}, the indices of {list(spec.type_map)}")


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Hide torch's warnings about its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
