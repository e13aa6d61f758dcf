"""Embedding nets of DPA-1 as functions of one number, tabulated to a measured error.

With the types of both ends given, the net is a function of x = (switch(r) / (r + protection) - davg) / dstd, which rises from
-davg / dstd at the cutoff (and for the empty slots of padded lists) as neighbours come close. `concat` has one function for
each pair of types (for each type where `type_one_side`), `strip` one for all. Values, first and second derivatives at the nodes
are the net's own in float64; the number of nodes follows from the error measured between them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.models.dpa1.descriptor import Descriptor
from carryall.models.networks import Layer, activation, residual
from carryall.models.quintic_table import Grid, QuinticTable

ORDINARY_DISTANCE = 1.0  # Å
ORDER = 5.0  # the power of the spacing that the slope's error falls with, that of the value being one higher
FEWEST_NODES, MANY_NODES, MOST_NODES = 17, 257, 2**14 + 1
SCALES = tuple(2.0**power for power in range(10))
BETWEEN = (0.1, 0.276, 0.5, 0.724, 0.9)  # of an interval: a quintic is farthest off at 0.5, its slope at the two beside it
PROBED = 16  # functions that the scale is chosen by
KINKED = ("relu", "relu6")
BOUNDED = ("tanh", "sigmoid", "relu6", "silut", "custom_silu")


@dataclass(frozen=True)
class TableErrors:
    """Largest deviations from the net, of all functions and outputs, at places between the nodes over the whole range."""

    value: float
    """Relative to the function's largest output at any distance beyond min(r, 1 Å)."""
    derivative: float
    """Of the derivative by x, relative to its largest in the same way."""
    value_absolute: float
    derivative_absolute: float

    @property
    def worst(self) -> float:
        """The larger relative one."""
        return max(self.value, self.derivative)


@dataclass(frozen=True, eq=False)
class Functions:
    """The embedding net as functions of one number, in float64."""

    net: nn.Sequential
    types: Tensor
    """(n_functions, width) the other inputs of each function."""
    dtype: torch.dtype
    """Of the model, and so of its tables."""

    @classmethod
    def of(cls, descriptor: Descriptor) -> Functions:
        """Those of a descriptor."""
        inputs = type_inputs(descriptor).detach()
        if descriptor.embedding_strip is not None:
            inputs = inputs[:1, :0]
        return cls(copy.deepcopy(descriptor.embedding).to(torch.float64), inputs.to(torch.float64), inputs.dtype)

    @property
    def n_functions(self) -> int:
        """Functions."""
        return self.types.shape[0]

    @property
    def n_outputs(self) -> int:
        """Of each function."""
        return last_layer(self.net).w.shape[1]

    def first(self, n: int) -> Functions:
        """The first `n`."""
        return Functions(self.net, self.types[:n], self.dtype)

    def at(self, x: Tensor, function: int) -> tuple[Tensor, Tensor, Tensor]:
        """Value, first and second derivative by x, each (n, n_outputs), at x (n,)."""
        return derivatives(self.net, torch.cat([x[:, None], self.types[function].expand(len(x), -1)], dim=1))

    def table(self, grid: Grid) -> QuinticTable:
        """Their table."""
        nodes = grid.nodes().to(self.types.device)
        found = [torch.stack(one) for one in zip(*(self.at(nodes, k) for k in range(self.n_functions)), strict=True)]
        return QuinticTable(grid, found[0], found[1], found[2], self.dtype, bounded=is_bounded(self.net))

    def errors(self, table: QuinticTable, ordinary: float) -> TableErrors:
        """Of a table, which sees arguments in the model's dtype; `ordinary` is the argument at 1 Å."""
        device = self.types.device
        intervals = torch.arange(table.grid.n_nodes - 1, device=device)
        x = table.grid.at((intervals[:, None] + torch.tensor(BETWEEN, device=device)).reshape(-1))
        x = x.to(self.dtype).to(torch.float64)
        worst = []
        for k in range(self.n_functions):
            which = torch.full(x.shape, k, device=device)
            value, slope, _ = self.at(x, k)
            found = table.value_and_slope(which, x)
            off = [(found[0] - value).abs().amax(1), (found[1] - slope).abs().amax(1)]
            relative = [off[0] / scale_of(value, x, ordinary), off[1] / scale_of(slope, x, ordinary)]
            worst.append(torch.stack([one.max() for one in (*relative, *off)]))
        return TableErrors(*torch.stack(worst).amax(0).tolist())


def type_inputs(descriptor: Descriptor) -> Tensor:
    """What the nets see of the types: (n_types, width) by neighbour, or (n_types^2, width) by centre, then neighbour."""
    table = descriptor.type_embedding()
    n = table.shape[0]
    if descriptor.config.type_one_side:
        return table
    return torch.cat([table.expand(n, n, -1), table[:, None].expand(n, n, -1)], dim=-1).flatten(0, 1)


def tabulate(
    descriptor: Descriptor, tolerance: float, shortest_distance: float, max_bytes: int
) -> tuple[QuinticTable, TableErrors]:
    """A table that meets the tolerance with few nodes, and its errors; InputError where none does."""
    functions = Functions.of(descriptor)
    lowest, ordinary, highest = argument_range(descriptor, shortest_distance)
    per_node = 3 * functions.n_functions * functions.n_outputs * functions.dtype.itemsize
    largest = min(MOST_NODES, max_bytes // per_node)
    if largest < FEWEST_NODES:
        raise InputError(too_many(descriptor, functions.n_functions, largest, max_bytes))
    scale = best_scale(functions, lowest, ordinary, highest, min(largest, 65))
    n_nodes, order, hopeless, before = FEWEST_NODES, ORDER, 0, (FEWEST_NODES, math.inf)
    while True:
        table = functions.table(Grid(lowest, highest, scale, n_nodes))
        errors = functions.errors(table, ordinary)
        excess = errors.worst / tolerance
        if excess <= 1:
            return table, errors
        if n_nodes > MANY_NODES and math.isfinite(excess):
            # errors of nets with kinks, and rounding errors, fall slowly or not at all
            order = min(ORDER, max(0.1, math.log(before[1] / errors.worst) / math.log(n_nodes / before[0])))
            hopeless = hopeless + 1 if n_nodes * excess ** (1 / order) > largest else 0
        if n_nodes >= largest or hopeless == 2 or not math.isfinite(excess):
            raise InputError(cannot_meet(descriptor, tolerance, table, errors, largest, max_bytes))
        before = (n_nodes, errors.worst)
        n_nodes = min(largest, math.ceil(min(2.0, max(1.1, 1.05 * excess ** (1 / order))) * n_nodes))


def best_scale(functions: Functions, lowest: float, ordinary: float, highest: float, n_nodes: int) -> float:
    """The scale of the grid with the smallest error at one number of nodes."""
    few = functions.first(PROBED)

    def error(scale: float) -> float:
        return few.errors(few.table(Grid(lowest, highest, scale, n_nodes)), ordinary).worst

    return min(SCALES, key=error)


def argument_range(descriptor: Descriptor, shortest_distance: float) -> tuple[float, float, float]:
    """Arguments x of the embedding net at the cutoff, at 1 Å, and at the shortest distance, over all centre types."""
    protection = descriptor.config.env_protection
    if not shortest_distance + protection > 0:
        raise InputError(f"shortest_distance must be beyond -env_protection = {-protection} Å, got {shortest_distance}")
    mean, std = descriptor.davg[:, 0], descriptor.dstd[:, 0]

    def argument(inverse: float) -> Tensor:
        return (inverse - mean) / std

    ordinary = argument(1 / (ORDINARY_DISTANCE + protection))
    # a masked edge has the argument 0
    lowest, highest = argument(0.0).clamp_max(0.0), argument(1 / (shortest_distance + protection)).clamp_min(0.0)
    return float(lowest.min()), float(ordinary.min()), float(highest.max())


def scale_of(values: Tensor, x: Tensor, ordinary: float) -> Tensor:
    """(n,) largest size of values (n, n_outputs) at any argument up to max(x, ordinary), x (n,) ascending."""
    size = values.abs().amax(1)
    common = torch.where(x <= ordinary, size, size[0]).max()
    return torch.maximum(size.cummax(0).values, common).clamp_min(torch.finfo(torch.float64).tiny)


def derivatives(net: nn.Sequential, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of a net of residual layers at inputs (n, n_in), with their first and second derivatives by the first input."""
    value, first, second = inputs, torch.zeros_like(inputs), torch.zeros_like(inputs)
    first[:, 0] = 1
    for layer in net:
        assert isinstance(layer, Layer)
        before = torch.matmul(value, layer.w)
        slope, curvature = torch.matmul(first, layer.w), torch.matmul(second, layer.w)
        step = 1.0 if layer.idt is None else layer.idt
        f, f1, f2 = activation_derivatives(layer.activation_function, before if layer.b is None else before + layer.b)
        parts = [step * f, step * f1 * slope, step * (f2 * slope * slope + f1 * curvature)]
        if layer.resnet:
            parts = [new + residual(old, f.shape[1]) for new, old in zip(parts, (value, first, second), strict=True)]
        value, first, second = parts
    return value, first, second


def activation_derivatives(name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An activation function at x, with its first and second derivatives."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        f = activation(name)(x)
        (f1,) = torch.autograd.grad(f.sum(), x, create_graph=True)
        f2 = torch.autograd.grad(f1.sum(), x)[0] if f1.requires_grad else torch.zeros_like(x)
    return f.detach(), f1.detach(), f2


def is_bounded(net: nn.Sequential) -> bool:
    """Whether the outputs have limits as the input grows: activations have, and no residual carries the input on."""
    layers = [layer for layer in net if isinstance(layer, Layer)]
    n_in, n_out = layers[0].w.shape
    carried = layers[0].resnet and n_out in (n_in, 2 * n_in)
    names = {layer.activation_function.lower().partition(":")[0] for layer in layers}
    return not carried and names <= set(BOUNDED)


def last_layer(net: nn.Sequential) -> Layer:
    """The last layer of a net."""
    layer = net[-1]
    assert isinstance(layer, Layer)
    return layer


def too_many(descriptor: Descriptor, n_functions: int, largest: int, max_bytes: int) -> str:
    """The refusal of tables that do not fit, with the way out."""
    n_types = descriptor.davg.shape[0]
    return (
        f"the tables of this model do not fit: tebd_input_mode {descriptor.config.tebd_input_mode!r} and {n_types} types need "
        f"{n_functions}, and max_bytes = {max_bytes} leaves {largest} nodes for each, {FEWEST_NODES} being the fewest: raise "
        "max_bytes, drop types that are not used, or train with type_one_side or tebd_input_mode 'strip', which need fewer"
    )


def cannot_meet(
    descriptor: Descriptor, tolerance: float, table: QuinticTable, errors: TableErrors, largest: int, max_bytes: int
) -> str:
    """The refusal of a tolerance, with the likely reason."""
    name, n_nodes = descriptor.config.activation_function, table.grid.n_nodes
    if not math.isfinite(errors.worst):
        why = "its outputs are not finite: look at its weights and statistics"
    elif name.lower() in KINKED:
        why = f"{name} has kinks, where the slope jumps and no smooth table can follow: train with a smooth activation_function"
    elif n_nodes < largest:
        dtype = str(table.rows.dtype).removeprefix("torch.")
        why = f"more nodes hardly help (rounding in {dtype}, or a net that is not smooth enough): raise the tolerance"
    elif largest == MOST_NODES:
        why = "more nodes are not tried: raise the tolerance"
    else:
        why = f"more nodes do not fit into max_bytes = {max_bytes}: raise one of the two"
    return (
        f"the embedding net cannot be tabulated to {tolerance:.0e}: with {n_nodes} nodes its relative error is "
        f"{errors.value:.1e}, that of its derivative {errors.derivative:.1e}, and {why}"
    )
