"""Functions of one variable as tables: quintics between nodes, twice continuously differentiable by construction.

A node holds value, slope and curvature of each function; between two nodes lies the one polynomial of degree 5 that has those of
both (Hermite interpolation, error h^6 f''''''/46080 in the spacing h). Against tables of coefficients for each interval, as
in the compressed models of D. Lu et al., J. Chem. Theory Comput. 18, 5559 (2022), that is half the memory: two neighbouring
intervals share a node.

Nodes are equally spaced in u = arsinh(x / scale): evenly near x = 0, in constant ratio far from it. So few nodes reach the large
arguments of close neighbours, where saturating functions are flat and the others straight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carryall.errors import InputError

ROWS_PER_NODE = 3


@dataclass(frozen=True)
class Grid:
    """Where the nodes are."""

    lowest: float
    """First node."""
    highest: float
    """Last node."""
    scale: float
    """Spacing is even within about this distance of x = 0, and grows in proportion to x beyond."""
    n_nodes: int
    """At least two."""

    @property
    def start(self) -> float:
        """u of the first node."""
        return math.asinh(self.lowest / self.scale)

    @property
    def spacing(self) -> float:
        """Between nodes, in u."""
        return (math.asinh(self.highest / self.scale) - self.start) / (self.n_nodes - 1)

    def at(self, place: Tensor) -> Tensor:
        """x (...) float64 of places (...) counted in nodes: 0 is the first, n_nodes - 1 the last."""
        return self.scale * torch.sinh(self.start + self.spacing * place.to(torch.float64))

    def nodes(self) -> Tensor:
        """(n_nodes,) float64 x."""
        return self.at(torch.arange(self.n_nodes))


class QuinticTable(nn.Module):
    """Tables of several functions on one grid, each with the same number of outputs."""

    rows: Tensor

    def __init__(
        self, grid: Grid, value: Tensor, slope: Tensor, curvature: Tensor, dtype: torch.dtype, *, bounded: bool = False
    ) -> None:
        """From df/dx and d2f/dx2, all (n_functions, n_nodes, n_outputs) float64 at the nodes; tables are kept in `dtype`.

        `bounded` functions stay so beyond the last node.
        """
        super().__init__()
        self.grid, self.bounded = grid, bounded
        x, h = grid.nodes()[:, None], grid.spacing
        # dx/du and d2x/du2 of x = scale sinh u
        stretch = (x * x + grid.scale**2).sqrt()
        node = torch.stack([value, h * stretch * slope, h * h * (stretch * stretch * curvature + x * slope)], dim=2)
        self.register_buffer("rows", node.flatten(0, 1).to(dtype))

    def forward(self, function: Tensor, x: Tensor) -> Tensor:
        """(n, n_outputs) of function numbers (n,) int64 at x (n,), in the dtype of the tables."""
        interval, weights = self.weights(x)
        return self.combine(function, interval, [weight.to(self.rows.dtype) for weight in weights], 1.0)

    def weights(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Interval (n,) of each x, and five weights (n,) float64: of the change of the value over the interval, of slope and
        curvature of its first node, and of those of its last.

        Beyond the last node, with y the distance from it over that of the node from zero, follows
        value + slope y + curvature (y - log(1 + y)), which becomes straight, or, for bounded functions and with z = y / (1 + y),
        value + slope (z + z^2) + curvature z^2 / 2. Both have the second derivative of the node.
        """
        grid, h = self.grid, self.grid.spacing
        x = x.to(torch.float64)
        place = (torch.asinh(x / grid.scale) - grid.start) / h
        interval = place.detach().floor().clamp(0, grid.n_nodes - 2)
        within = x < grid.highest
        t = torch.where(within, place - interval, 1.0)
        s = 1 - t
        tt, ss = t * t, s * s
        length = math.hypot(grid.highest, grid.scale)
        y = torch.where(within, 0.0, (x - grid.highest) / length)
        z = y / (1 + y)
        reach, bend = (z + z * z, 0.5 * z * z) if self.bounded else (y, y - torch.log1p(y))
        first = [t * ss * s * (1 + 3 * t), 0.5 * tt * ss * s]
        # du/dx = 1 / length and d2u/dx2 = -highest / length^3 at the last node
        last = [(reach - grid.highest / length * bend) / h - s * tt * t * (1 + 3 * s), bend / h**2 + 0.5 * ss * tt * t]
        return interval.to(torch.int64), [tt * t * (10 + t * (6 * t - 15)), *first, *last]

    def combine(self, function: Tensor, interval: Tensor, weights: list[Tensor], constant: float) -> Tensor:
        """(n, n_outputs): `constant` times the value at the interval's first node, plus what the weights say."""
        at = function * self.grid.n_nodes + interval
        value, slope, curvature = self.rows.index_select(0, at).unbind(1)
        value_after, slope_after, curvature_after = self.rows.index_select(0, at + 1).unbind(1)
        change, *of_derivatives = (weight[:, None] for weight in weights)
        out = constant * value + change * (value_after - value)
        for weight, row in zip(of_derivatives, (slope, curvature, slope_after, curvature_after), strict=True):
            out = out + weight * row
        return out

    def slope(self, function: Tensor, x: Tensor) -> Tensor:
        """(n, n_outputs) d/dx: what differentiating `forward` gives, for all outputs at once."""
        with torch.enable_grad():
            x = x.detach().to(torch.float64).requires_grad_()
            interval, weights = self.weights(x)
            slopes = [torch.autograd.grad(weight.sum(), x, retain_graph=True)[0].to(self.rows.dtype) for weight in weights]
        return self.combine(function, interval, slopes, 0.0)

    @property
    def n_functions(self) -> int:
        """Functions."""
        return self.rows.shape[0] // self.grid.n_nodes

    @property
    def n_outputs(self) -> int:
        """Of each function."""
        return self.rows.shape[2]

    @property
    def nbytes(self) -> int:
        """Size in memory and in files."""
        return self.rows.numel() * self.rows.element_size()
