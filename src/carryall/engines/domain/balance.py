"""Where to cut so that all bricks carry the same load: weighted quantiles from histograms, no rank sees another's atoms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from carryall.engines.domain.bricks import Bricks, Grid

BINS = 256
PASSES = 3
"""Of histograms, each with bins that held the same load in the one before."""

LEEWAY = 0.01
"""Of a part's load: cuts go to the middle of where they may lie, which is between the planes of a crystal."""

Total = Callable[[Tensor], Tensor]
"""A sum over ranks."""


def balanced(grid: Grid, fractions: Tensor, weights: Tensor, low: Tensor, high: Tensor, total: Total) -> Bricks:
    """Bricks that hold the same sum of `weights` (n,), as nearly as atoms allow: a rank's atoms at fractions (n, 3).

    low, high (3,): ends of the cut axes. Collective: the same on every rank.
    """
    nx, ny, nz = grid
    none = torch.zeros(len(fractions), dtype=torch.int64)
    x = quantiles(fractions[:, 0], none, 1, nx, weights, low[0], high[0], total)[0]
    slab = torch.searchsorted(x, fractions[:, 0].contiguous(), right=True)
    y = quantiles(fractions[:, 1], slab, nx, ny, weights, low[1], high[1], total)
    column = slab * ny + (y[slab] <= fractions[:, 1:2]).sum(1)
    z = quantiles(fractions[:, 2], column, nx * ny, nz, weights, low[2], high[2], total)
    return Bricks(grid, x, y, z.reshape(nx, ny, nz - 1))


def quantiles(
    values: Tensor, group: Tensor, n_groups: int, parts: int, weights: Tensor, low: Tensor, high: Tensor, total: Total
) -> Tensor:
    """(n_groups, parts - 1) values that cut the weights of each group into equal parts; evenly spaced for an empty group."""
    if parts == 1:
        return values.new_zeros(n_groups, 0)
    edges = low + (high - low) * torch.linspace(0.0, 1.0, BINS + 1, dtype=torch.float64)
    edges = edges.repeat(n_groups, 1)
    wanted = torch.arange(1, parts, dtype=torch.float64) / parts
    cuts = low + (high - low) * wanted.repeat(n_groups, 1)
    for last in (*[False] * (PASSES - 1), True):
        load = values.new_zeros(n_groups, BINS)
        for one in torch.unique(group).tolist():
            mine = group == one
            at = torch.searchsorted(edges[one], values[mine].contiguous(), right=True).clamp(1, BINS) - 1
            load[one].index_add_(0, at, weights[mine])
        load = total(load)
        for one in load.sum(1).nonzero().squeeze(1).tolist():
            if last:
                ends = [_inverse(edges[one], load[one], wanted + sign * LEEWAY / parts) for sign in (-1.0, 1.0)]
                cuts[one] = 0.5 * (ends[0] + ends[1])
            else:
                edges[one] = _inverse(edges[one], load[one], torch.linspace(0.0, 1.0, BINS + 1, dtype=torch.float64))
    return cuts


def _inverse(edges: Tensor, load: Tensor, fractions: Tensor) -> Tensor:
    """Where the cumulated load, linear within a bin, reaches each of the fractions."""
    sums = torch.cat([load.new_zeros(1), load.cumsum(0)])
    wanted = fractions * sums[-1]
    # the first bin at whose end it is reached, and the last one where nothing is reached before
    at = torch.searchsorted(sums[1:].contiguous(), wanted).clamp(max=len(load) - 1)
    part = ((wanted - sums[at]) / load[at].clamp(min=1e-300)).clamp(0.0, 1.0)
    return edges[at] + part * (edges[at + 1] - edges[at])
