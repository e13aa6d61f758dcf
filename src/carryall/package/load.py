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
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.potential import PotentialSpec
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

    def __call__(self, graph: NeighborGraph, *, atomic_virial: bool = False) -> dict[str, Tensor]:
        """Evaluate the graph; results are on the graph's device."""
        _check_types(graph, self.spec)
        wanted = OUTPUTS if atomic_virial else OUTPUTS[:-1]

        def call(part: NeighborGraph) -> dict[str, Tensor]:
            values = zip(OUTPUTS, self._run(*to_inputs(part)), strict=True)
            return {name: value for name, value in values if name in wanted}

        with torch.no_grad():
            out = evaluate_in_blocks(call, graph.to(self.device), self.spec.block_size)
        return {name: value.to(graph.device) for name, value in out.items()}


def load_packed(path: str | Path, device: str = "cpu", dtype: str | None = None) -> PackedPotential:
    """Load a `.pt2` or `.pte`; every entry is checked against the manifest's SHA-256 before anything of it runs."""
    path, where = Path(path), usable_device(device)
    metadata = verify(path)
    spec = PotentialSpec.from_dict(metadata)
    if tuple(metadata["input_keys"]) != INPUTS or tuple(metadata["output_keys"]) != OUTPUTS:
        raise InputError(f"{path} has other inputs or outputs than this version of carryall: pack it again")
    if dtype is not None and dtype != spec.dtype:
        raise InputError(f"{path} was packed in {spec.dtype}, not {dtype}: pack it again with --dtype {dtype}")
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
