"""Who owns which part of space: boxes in fractional coordinates, one for each rank, with cuts that can be moved.

The cell is cut along its first vector, each slab along the second, each column along the third. Fractions of periodic axes lie
in [0, 1]; along open axes the outermost bricks have no end.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.graph.neighbor_search import complete_cell

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Frame:
    """The cell that space is cut in, on the CPU; vectors that an open axis lacks are unit vectors."""

    box: Tensor
    """(3, 3) Å, rows are vectors."""
    inverse: Tensor
    heights: Tensor
    """(3,) Å, between opposite faces."""
    pbc: Tensor
    """(3,) bool."""

    @classmethod
    def of(cls, cell: Tensor, pbc: Tensor) -> Frame:
        """Of a cell (3, 3), zeros where there is no vector. InputError for one without volume."""
        box = torch.from_numpy(complete_cell(cell.detach().cpu().double().numpy(), pbc.cpu().numpy()))
        inverse = torch.linalg.inv(box)
        return cls(box, inverse, 1.0 / inverse.norm(dim=0), pbc.cpu())

    def fractions(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Fractional coordinates (n, 3), in [0, 1] along periodic axes, and the whole vectors (n, 3) int64 taken off."""
        found = positions.detach().cpu().double() @ self.inverse
        whole = torch.where(self.pbc, found.floor(), 0.0)
        return found - whole, whole.long()


@dataclass(frozen=True, eq=False)
class Bricks:
    """The cuts; rank (ix n_y + iy) n_z + iz owns brick (ix, iy, iz). A point on a cut belongs to the upper side."""

    grid: Grid
    x: Tensor
    """(n_x - 1,)."""
    y: Tensor
    """(n_x, n_y - 1)."""
    z: Tensor
    """(n_x, n_y, n_z - 1)."""

    @classmethod
    def uniform(cls, grid: Grid, low: Tensor, high: Tensor) -> Bricks:
        """All of one size between low and high (3,)."""
        cuts = [low[k] + (high[k] - low[k]) * torch.arange(1, n, dtype=torch.float64) / n for k, n in enumerate(grid)]
        return cls(grid, cuts[0], cuts[1].repeat(grid[0], 1), cuts[2].repeat(*grid[:2], 1))

    @property
    def size(self) -> int:
        """Number of bricks."""
        return math.prod(self.grid)

    def owner(self, fractions: Tensor) -> Tensor:
        """(n,) int64 rank of each point (n, 3)."""
        ix = torch.searchsorted(self.x, fractions[:, 0].contiguous(), right=True)
        iy = (self.y[ix] <= fractions[:, 1:2]).sum(1)
        iz = (self.z[ix, iy] <= fractions[:, 2:3]).sum(1)
        return (ix * self.grid[1] + iy) * self.grid[2] + iz

    def bounds(self, pbc: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper corner of every brick, both (size, 3); infinite at the open ends."""
        ends = torch.where(pbc, 0.0, -torch.inf).double(), torch.where(pbc, 1.0, torch.inf).double()
        low, high = torch.empty(*self.grid, 3, dtype=torch.float64), torch.empty(*self.grid, 3, dtype=torch.float64)
        for k, cuts in enumerate((self.x[:, None, None], self.y[:, :, None], self.z)):
            # cuts of an axis lie along dimension k
            shape = [*self.grid[:k], 1, *[1] * (2 - k)]
            below, above = (torch.full(shape, float(end[k]), dtype=torch.float64) for end in ends)
            low[..., k] = torch.cat([below, cuts], k).expand(self.grid)
            high[..., k] = torch.cat([cuts, above], k).expand(self.grid)
        return low.reshape(-1, 3), high.reshape(-1, 3)


def choose_grid(size: int, lengths: Tensor, width: float) -> Grid:
    """The grid of `size` bricks whose halos, `width` wide, hold least: lengths (3,) Å are those of the whole.

    Only axes that are cut count, since what lies beyond the others is no other rank's.
    """

    def cost(grid: Grid) -> tuple[float, Grid]:
        sides = [max(float(length), width * 1e-3) / n for length, n in zip(lengths, grid, strict=True)]
        wide = [side + 2 * width * (n > 1) for side, n in zip(sides, grid, strict=True)]
        return math.prod(wide) / math.prod(sides), tuple(-n for n in grid)  # type: ignore[return-value]

    divisors = [n for n in range(1, size + 1) if size % n == 0]
    grids = [(a, b, size // (a * b)) for a, b in itertools.product(divisors, divisors) if size % (a * b) == 0]
    return min(grids, key=cost)


def check_grid(grid: Grid, size: int) -> Grid:
    """Three positive whole numbers with the product `size`."""
    whole = len(grid) == 3 and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in grid)
    if not whole or math.prod(grid) != size:
        raise InputError(f"grid must be three positive whole numbers whose product is the {size} ranks, got {grid!r}")
    return grid
