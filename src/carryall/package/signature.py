"""What goes into a packed program and what comes out, in order: the contract between export and whoever runs the file."""

from __future__ import annotations

import torch
from torch import Tensor

from carryall.graph.neighbor_graph import NeighborGraph, local_index, rank_axis
from carryall.graph.potential import PotentialSpec
from carryall.graph.reciprocal import with_reciprocal

AXES = {
    "positions": "atoms",
    "atom_types": "atoms",
    "system": "atoms",
    "cell": "systems",
    "edge_center": "edges",
    "edge_neighbor": "edges",
    "edge_shift": "edges",
    "edge_mask": "edges",
    "ptr": "ptr",
    "local": "local",
    "rank": "rank",
    "fparam": "systems",
    "aparam": "atoms",
    "spin": "atoms",
    "charge_spin": "systems",
    "k_index": "k",
    "place": "local",
    "places": "places",
    "ghost": "ghost",
}
"""What the first dimension of each input counts, where that is not fixed."""
EXTRA = ("fparam", "aparam", "spin", "charge_spin")
LONG_RANGE = ("k_index", "place", "places")
"""Of programs that depend on positions and cell beyond the edge vectors, from `carryall.graph.reciprocal`."""
EXCHANGE = ("ghost", "exchange_handle", "exchange_token")
"""Of programs that pass messages; the last is an output too, so that no exchange can be left out."""
INPUTS = tuple(name for name in AXES if name not in (*EXTRA, *LONG_RANGE, *EXCHANGE))
OUTPUTS = ("energy", "atomic_energy", "forces", "virial", "atomic_virial", "edge_gradient")

INPUT_DEFS: dict[str, tuple[str, list[str | int], str]] = {
    "positions": ("float64", ["n_atoms", 3], "angstrom"),
    "atom_types": ("int64", ["n_atoms"], "index into type_map"),
    "system": ("int64", ["n_atoms"], "index of the system of an atom"),
    "cell": ("float64", ["n_systems", 3, 3], "angstrom, rows are lattice vectors, zeros where there is none"),
    "edge_center": ("int64", ["n_edges"], "index of a local atom, ascending"),
    "edge_neighbor": ("int64", ["n_edges"], "index of an atom"),
    "edge_shift": ("int32", ["n_edges", 3], "whole lattice vectors added to the neighbour"),
    "edge_mask": ("bool", ["n_edges"], "false: the edge takes part in nothing"),
    "ptr": ("int64", ["n_local + 1"], "edges of centre c are ptr[c] to ptr[c + 1]"),
    "local": ("int64", ["n_local"], "0, 1, 2, ...: its length says how many atoms are local"),
    "rank": ("int64", ["max_degree"], "0, 1, 2, ...: its length is the largest number of edges of a centre, or more"),
    "fparam": ("float64", ["n_systems", "dim_fparam"], "parameters of a system"),
    "aparam": ("float64", ["n_atoms", "dim_aparam"], "parameters of an atom"),
    "spin": ("float64", ["n_atoms", 3], "magnetic moment, in the unit of the training data"),
    "charge_spin": ("float64", ["n_systems", "dim_chg_spin"], "total charge and spin of a system"),
    "k_index": ("int64", ["n_k", 3], "reciprocal vectors up to k_cutoff, or more: one of each pair h, -h, in one order"),
    "place": ("int64", ["n_local"], "place of an atom among the local atoms of its system: 0, 1, 2, ..."),
    "places": ("int64", ["n_places"], "0, 1, 2, ...: its length is the largest number of local atoms of a system"),
    "ghost": ("int64", ["n_ghost"], "n_local, n_local + 1, ...: its length says how many atoms are ghosts"),
    "exchange_handle": ("int64", [1], "on the CPU: which plan and transport the ops carryall::exchange_* use"),
    "exchange_token": ("float64", [1], "on the CPU: 0, handed from exchange to exchange, which keeps their order"),
}
"""Type, shape, and unit or meaning of each input."""
OUTPUT_DEFS: dict[str, tuple[list[str | int], str]] = {
    "energy": (["n_systems"], "eV"),
    "atomic_energy": (["n_local"], "eV"),
    "forces": (["n_atoms", 3], "eV/angstrom"),
    "virial": (["n_systems", 3, 3], "eV, -dE/dstrain"),
    "atomic_virial": (["n_atoms", 3, 3], "eV, an edge's term goes to its neighbour"),
    "edge_gradient": (["n_edges", 3], "eV/angstrom, dE/d(edge vector)"),
    "strain_gradient": (["n_local", 3, 3], "eV, strain derivative of an atom's energy beyond the edge vectors, in all virials"),
    "magnetic_forces": (["n_atoms", 3], "eV per unit of spin, -dE/dspin"),
    "exchange_token": ([1], "on the CPU: 0, from the last exchange"),
}
"""Shape, and unit and meaning of each output; all are float64."""


def input_names(spec: PotentialSpec) -> tuple[str, ...]:
    """Names of the program's inputs, in order."""
    further = (*(LONG_RANGE if spec.long_range else ()), *(EXCHANGE if spec.message_passing else ()))
    return (*INPUTS, *spec.extra_inputs, *further)


def output_names(spec: PotentialSpec) -> tuple[str, ...]:
    """Names of the program's outputs, in order."""
    magnetic = ("magnetic_forces",) if "magnetic_forces" in spec.outputs else ()
    explicit = ("strain_gradient",) if spec.long_range else ()
    return (*OUTPUTS, *magnetic, *explicit, *(EXCHANGE[-1:] if spec.message_passing else ()))


def extra_width(spec: PotentialSpec, name: str) -> int:
    """Columns of an extra input."""
    widths = {"fparam": spec.dim_fparam, "aparam": spec.dim_aparam, "spin": 3, "charge_spin": spec.dim_chg_spin}
    return widths[name]


def to_inputs(graph: NeighborGraph, spec: PotentialSpec) -> tuple[Tensor, ...]:
    """The tensors of a graph in the order of `input_names`; floating-point ones as float64.

    For a potential that passes messages the graph's exchange is open: `carryall.exchange.context.open_exchange`.
    """
    full = graph.replace(local=local_index(graph), rank=rank_axis(graph))
    if spec.long_range and graph.k_index is None:
        full = with_reciprocal(full, spec.k_cutoff)
    values = [getattr(full, name) for name in (*INPUTS, *spec.extra_inputs, *(LONG_RANGE if spec.long_range else ()))]
    if spec.message_passing:
        values += [graph.exchange.ghost, graph.exchange.handle, graph.exchange.token]
    return tuple(v.to(torch.float64).contiguous() if v.is_floating_point() else v.contiguous() for v in values)


def to_graph(inputs: tuple[Tensor, ...], spec: PotentialSpec) -> NeighborGraph:
    """The inverse of `to_inputs`."""
    values = dict(zip(input_names(spec), inputs, strict=True))
    if not spec.message_passing:
        return NeighborGraph(**values)
    # imported by those who exchange, only
    from carryall.exchange.context import ExchangeContext

    ghost, handle, token = (values.pop(name) for name in EXCHANGE)
    return NeighborGraph(**values, exchange=ExchangeContext(values["local"], ghost, handle, token))
