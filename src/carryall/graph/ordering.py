"""One order of edges everywhere: by centre, then neighbour, then shift; and ranks of rows within groups."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 2**63  # of an int64


def edge_keys(center: Tensor, neighbor: Tensor, shift: Tensor, n_atoms: int) -> Tensor:
    """(n_edges,) int64 that order as (centre, neighbour, shift) does and are equal only where all five numbers are.

    center and neighbor (n_edges,) int64 below n_atoms, shift (n_edges, 3) integer. Keys of `shift` and of `-shift` compare.
    """
    if not len(center):
        return center
    reach = shift.abs().amax(0).tolist()
    widths = [2 * int(one) + 1 for one in reach]
    if n_atoms**2 * widths[0] * widths[1] * widths[2] < LARGEST:
        image = torch.zeros_like(center)
        for axis in range(3):
            image = image * widths[axis] + (shift[:, axis].to(torch.int64) + int(reach[axis]))
        n_images = widths[0] * widths[1] * widths[2]
    else:
        both = torch.cat([shift, -shift])
        images, index = torch.unique(both, dim=0, return_inverse=True)
        image, n_images = index[: len(shift)], len(images)
    return (center * n_atoms + neighbor) * n_images + image


def edge_order(center: Tensor, neighbor: Tensor, shift: Tensor, n_atoms: int) -> Tensor:
    """(n_edges,) permutation that sorts edges by centre, neighbour, shift; duplicates keep their order."""
    return edge_keys(center, neighbor, shift, n_atoms).sort(stable=True).indices


def group_ranks(group: Tensor, n_groups: int) -> Tensor:
    """(n,) how many rows of the same `group` (n,) int64 come before each row."""
    order = group.sort(stable=True).indices
    counts = torch.bincount(group, minlength=n_groups)
    start = (counts.cumsum(0) - counts).index_select(0, group.index_select(0, order))
    ranks = torch.empty_like(group)
    ranks[order] = torch.arange(len(group), device=group.device) - start
    return ranks
