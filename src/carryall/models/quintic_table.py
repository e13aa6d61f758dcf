"""Functions of one variable as tables: quintics between nodes, twice continuously differentiable by construction.

A node holds value, slope and curvature of each function; between two nodes lies the one polynomial of degree 5 that has those
of both (Hermite interpolation, error h^6 f''''''/46080 in the spacing h). Against tables of coefficients for each interval, as
in the compressed models of D. Lu et al., J. Chem. Theory Comput. 18, 5559 (2022), that is half the memory: two neighbouring
intervals share a node.

Nodes are equally spaced in u = d / (scale + d), d = x - lowest, which rises from 0 to 1: evenly near the lowest x, ever wider
far from it. So few nodes reach the large arguments of close neighbours, where saturating functions are flat and the others
straight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Grid:
    """Where the nodes are."""

    lowest: float
    """First node."""
    highest: float
    """Last node."""
    scale: float
    """How far beyond the first node u is a half."""
    n_nodes: int
    """At least two."""

    @property
    def reach(self) -> float:
        """scale + d of the last node."""
        return self.scale + self.highest - self.lowest

    @property
    def spacing(self) -> float:
        """Between nodes, in u."""
        return (self.highest - self.lowest) / self.reach / (self.n_nodes - 1)

    def at(self, place: Tensor) -> Tensor:
        """x (...) float64 of places (...) counted in nodes: 0 is the first, n_nodes - 1 the last."""
        u = self.spacing * place.to(torch.float64)
        return self.lowest + self.scale * u / (1 - u)

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
        total, h = grid.scale + grid.nodes().to(value.device)[:, None] - grid.lowest, grid.spacing
        first, second = total**2 / grid.scale, 2 * total**3 / grid.scale**2  # dx/du and d2x/du2
        node = torch.stack([value, h * first * slope, h * h * (first * first * curvature + second * slope)], dim=2)
        self.register_buffer("rows", node.flatten(0, 1).to(dtype))

    def forward(self, function: Tensor, x: Tensor) -> Tensor:
        """(n, n_outputs) of function numbers (n,) int64 at x (n,), in the dtype of the tables; differentiable once, by x."""
        value, slope = self.value_and_slope(function, x.detach())
        return _WithSlope.apply(x, value, slope)

    def value_and_slope(self, function: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The polynomials (n, n_outputs) and their own derivatives by x, from one reading of the table."""
        interval, values, slopes = self.weights(x.to(torch.float64))
        # as one tensor each weight is computed once for an edge, not again with each group of outputs
        weights = torch.stack([*values, *slopes], dim=1).to(self.rows.dtype)
        at = function * self.grid.n_nodes + interval
        before, after = self.rows.index_select(0, at), self.rows.index_select(0, at + 1)
        parts = (after[:, 0] - before[:, 0], before[:, 1], before[:, 2], after[:, 1], after[:, 2])
        value, slope = before[:, 0], torch.zeros_like(before[:, 0])
        for index, part in enumerate(parts):
            value = value + weights[:, index, None] * part
            slope = slope + weights[:, index + 5, None] * part
        return value, slope

    def weights(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Interval (n,) of each x; five weights (n,), and their derivatives by x: of the change of the value over the interval,
        of slope and curvature of its first node, and of those of its last.

        Beyond the last node, bounded functions go on as their Taylor polynomial of degree 2 in u. Others, with y the distance
        from that node over its own `reach`, go on as value + slope y + curvature (y - log(1 + y)), which becomes straight.
        Both have the second derivative of the node.
        """
        grid, h = self.grid, self.grid.spacing
        distance = x - grid.lowest
        total = grid.scale + distance
        place, place_slope = distance / total / h, grid.scale / (h * total * total)
        interval = place.floor().clamp(0, grid.n_nodes - 2)
        within = x < grid.highest
        t = torch.where(within, place - interval, 1.0)
        s = 1 - t
        tt, ss = t * t, s * s
        first, last = t * ss * s * (1 + 3 * t), -s * tt * t * (1 + 3 * s)
        values = [tt * t * (10 + t * (6 * t - 15)), first, 0.5 * tt * ss * s, last, 0.5 * ss * tt * t]
        first, last = ss * (1 - 3 * t) * (1 + 5 * t), tt * (1 - 3 * s) * (1 + 5 * s)
        slopes = [30 * tt * ss, first, 0.5 * t * ss * (2 - 5 * t), last, -0.5 * s * tt * (2 - 5 * s)]
        if self.bounded:
            beyond = torch.where(within, 0.0, place - (grid.n_nodes - 1))
            values[3:] = [values[3] + beyond, values[4] + 0.5 * beyond * beyond]
            slopes[4] = slopes[4] + beyond
        else:
            y, ratio = torch.where(within, 0.0, (x - grid.highest) / grid.reach), grid.scale / grid.reach / h
            bend = y - torch.log1p(y)
            values[3:] = [values[3] + ratio * (y - 2 * bend), values[4] + ratio**2 * bend]
            slopes[3:] = [slopes[3] - y * y, slopes[4] + ratio * y * (1 + y)]
        return interval.to(torch.int64), values, [slope * place_slope for slope in slopes]

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


class _WithSlope(torch.autograd.Function):
    """A value (n, m) whose derivative by x (n,) is known: to find it from the value would read the table again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = x.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradient * slope).sum(1).to(ctx.dtype), None, None
