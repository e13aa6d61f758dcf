"""Compressed DPA-1: tables in place of the embedding nets, and what is known of their errors.

`strip` models have one table and a factor for each pair of types, computed once; attention and fitting stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.models.dpa1.descriptor import Descriptor
from carryall.models.dpa1.model import DPA1
from carryall.models.dpa1.tabulation import is_bounded, tabulate, type_inputs
from carryall.models.quintic_table import QuinticTable

DEFAULT_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-5}
FINEST_TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6}
SHORTEST_DISTANCE = {True: 1e-6, False: 0.1}  # Å, for bounded nets, whose tables may reach all the way, and for others
MAX_BYTES = 2**28
OF_SEVERAL: dict[str, Callable[[list[Any]], Any]] = {
    "compression_bytes": sum,
    "compression_tables": sum,
    "compression_argument_lowest": min,
}


class CompressedEmbedding(nn.Module):
    """Takes the place of a descriptor's embedding nets."""

    by_type: Tensor | None

    def __init__(self, descriptor: Descriptor, table: QuinticTable) -> None:
        super().__init__()
        config = descriptor.config
        self.table, self.n_types = table, descriptor.davg.shape[0]
        self.one_side, self.smooth = config.type_one_side, config.smooth_type_embedding
        strip = descriptor.embedding_strip
        self.register_buffer("by_type", None if strip is None else strip(type_inputs(descriptor)))

    def forward(self, radial: Tensor, sw: Tensor, center_type: Tensor, neighbor_type: Tensor) -> Tensor:
        """(n_local, degree, neuron[-1]) from radial rows (n_local, degree, 1), switch (n_local, degree) and types."""
        if radial.dtype != self.table.rows.dtype:
            raise InputError(
                f"the tables of this compressed model are {self.table.rows.dtype}, its weights {radial.dtype}: change the "
                "dtype of the original model, then compress it"
            )
        shape = (*neighbor_type.shape, self.table.n_outputs)
        kind = neighbor_type if self.one_side else center_type[:, None] * self.n_types + neighbor_type
        kind = kind.reshape(-1)
        if self.by_type is None:
            return self.table(kind, radial.reshape(-1)).view(shape)
        g = self.table(torch.zeros_like(kind), radial.reshape(-1)).view(shape)
        factor = self.by_type.index_select(0, kind).view(shape)
        return g + g * (factor * sw[..., None] if self.smooth else factor)


def compress(
    model: nn.Module,
    *,
    tolerance: float | None = None,
    shortest_distance: float | None = None,
    max_bytes: int = MAX_BYTES,
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of `model` in which each DPA-1 has tables in place of its embedding nets, and flat facts for a file's metadata.

    `tolerance` bounds the relative errors of the embedding and of its derivative (`TableErrors`; None: 1e-8 in float64, 2e-5
    in float32). The tables reach from the cutoff down to `shortest_distance` (Å; None: 1e-6 where the net has a limit for
    close neighbours, as with tanh, else 0.1); closer, they go on with two continuous derivatives. `max_bytes` bounds the
    tables of each DPA-1.

    The copy is for evaluation: it keeps the nets as what it is compressed from (`model_to_source` gives the original source),
    but what is changed in them changes nothing.

    InputError where no DPA-1 is in the model, where it is compressed already, and where the tolerance cannot be met.
    """
    if not any(True for _ in parts_of(model)):
        raise InputError(
            f"a model of class {type(model).__name__} has nothing to compress: only the embedding nets of DPA-1 become tables"
        )
    if is_compressed(model):
        raise InputError("this model is compressed already: compress the original, which is in the source of its file")
    if shortest_distance is not None and not shortest_distance > 0:
        raise InputError(f"shortest_distance must be positive (Å), got {shortest_distance}")
    compressed = copy.deepcopy(model).eval().requires_grad_(False)
    facts = [compress_descriptor(part.descriptor, tolerance, shortest_distance, max_bytes) for part in parts_of(compressed)]
    merged = {name: OF_SEVERAL.get(name, max)([one[name] for one in facts]) for name in facts[0]}
    return compressed, {"compressed": True, **merged}


def is_compressed(model: nn.Module) -> bool:
    """Whether a DPA-1 in the model has tables."""
    return any(part.descriptor.compressed is not None for part in parts_of(model))


def parts_of(model: nn.Module) -> Iterator[DPA1]:
    """Each DPA-1 in the model, once."""
    return (part for part in model.modules() if isinstance(part, DPA1))


def compress_descriptor(
    descriptor: Descriptor, tolerance: float | None, shortest_distance: float | None, max_bytes: int
) -> dict[str, Any]:
    """Put tables in the descriptor; returns their facts."""
    dtype = descriptor.type_embedding.layer.w.dtype
    tolerance = DEFAULT_TOLERANCE[dtype] if tolerance is None else tolerance
    if not tolerance >= FINEST_TOLERANCE[dtype]:
        raise InputError(
            f"the tolerance of a compressed {str(dtype).removeprefix('torch.')} model must be {FINEST_TOLERANCE[dtype]:.0e} or "
            f"more, which is what its arithmetic resolves, got {tolerance}"
        )
    distance = SHORTEST_DISTANCE[is_bounded(descriptor.embedding)] if shortest_distance is None else shortest_distance
    with torch.no_grad():
        table, errors = tabulate(descriptor, tolerance, distance, max_bytes)
        descriptor.compressed = CompressedEmbedding(descriptor, table)
    return {
        "compression_tolerance": float(tolerance),
        "compression_error_value": errors.value,
        "compression_error_derivative": errors.derivative,
        "compression_error_value_absolute": errors.value_absolute,
        "compression_error_derivative_absolute": errors.derivative_absolute,
        "compression_shortest_distance": float(distance),
        "compression_tables": table.n_functions,
        "compression_nodes": table.grid.n_nodes,
        "compression_argument_lowest": table.grid.lowest,
        "compression_argument_highest": table.grid.highest,
        "compression_bytes": table.nbytes,
    }
