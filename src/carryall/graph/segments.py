"""Reductions over ragged segments: sum, max and softmax of the rows that share an id.

A masked row takes part in nothing, whatever it holds (infinities and NaN too, and in the gradient); empty and fully masked
segments give zeros. All three trace without data-dependent guards and are deterministic on CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(data: Tensor, segment: Tensor, n_segments: int, mask: Tensor | None = None) -> Tensor:
    """(n_segments, ...) sums of the rows of `data` (n, ...) by `segment` (n,) int64; `mask` (n,) bool keeps rows."""
    return data.new_zeros((n_segments, *data.shape[1:])).index_add(0, segment, _masked(data, mask, 0.0))


def segment_max(data: Tensor, segment: Tensor, n_segments: int, mask: Tensor | None = None) -> Tensor:
    """(n_segments, ...) largest row entry by segment; ties share the gradient, empty segments give 0."""
    highest = _segment_amax(_masked(data, mask, -torch.inf), segment, n_segments)
    return torch.where(highest == -torch.inf, torch.zeros_like(highest), highest)


def segment_softmax(data: Tensor, segment: Tensor, n_segments: int, mask: Tensor | None = None) -> Tensor:
    """(n, ...) softmax of `data` (n, ...) within each segment, 0 where masked.

    The shift by the segment's maximum keeps exp() in range; it carries no gradient, since the result does not depend on it.
    """
    clean = _masked(data, mask, -torch.inf).detach()
    shift = _segment_amax(clean, segment, n_segments)
    shift = torch.where(torch.isfinite(shift), shift, torch.zeros_like(shift))
    exponent = _masked(data, mask, 0.0) - shift.index_select(0, segment)
    weight = _masked(exponent, mask, 0.0).exp()
    weight = _masked(weight, mask, 0.0)
    total = weight.new_zeros((n_segments, *data.shape[1:])).index_add(0, segment, weight)
    total = torch.where(total == 0, torch.ones_like(total), total)
    return weight / total.index_select(0, segment)


def _segment_amax(data: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    index = segment.reshape(-1, *[1] * (data.dim() - 1)).expand_as(data)
    start = data.new_full((n_segments, *data.shape[1:]), -torch.inf)
    return start.scatter_reduce(0, index, data, "amax", include_self=True)


def _masked(data: Tensor, mask: Tensor | None, fill: float) -> Tensor:
    if mask is None:
        return data
    return torch.where(mask.reshape(-1, *[1] * (data.dim() - 1)), data, torch.full_like(data, fill))
