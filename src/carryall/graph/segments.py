"""Reductions over ragged segments: sum, max and softmax of the rows that share an id.

A masked row takes part in nothing, whatever it holds (infinities and NaN too), in the value and in every derivative; empty
and fully masked segments give zeros. What is not finite and not masked stays in its segment. All three trace for every size
without looking at data. On CPU they repeat bit by bit, whatever the number of threads; code that inductor compiles adds with
atomics, and does so only under `torch.use_deterministic_algorithms` (when compiling, and in float32 when running too).
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(data: Tensor, segment: Tensor, n_segments: int, mask: Tensor | None = None) -> Tensor:
    """(n_segments, ...) sums of the rows of `data` (n, ...) by `segment` (n,) int64; `mask` (n,) bool keeps rows."""
    return data.new_zeros((n_segments, *data.shape[1:])).index_add(0, segment, _masked(data, mask, 0.0))


def segment_max(data: Tensor, segment: Tensor, n_segments: int, mask: Tensor | None = None) -> Tensor:
    """(n_segments, ...) largest entry of the rows of `data` (n, ...) float by segment.

    The gradient goes to the entries that attain the maximum, in equal shares where several do; the second derivative is zero
    everywhere, at ties too. An infinite maximum has no gradient, and NaN makes its segment NaN.
    """
    values = _masked(data, mask, -torch.inf).detach()
    highest = _segment_amax(values, segment, n_segments)
    ties = _masked((values == highest.index_select(0, segment)).to(data.dtype), mask, 0.0)
    share = ties / segment_sum(ties, segment, n_segments).clamp_min(1.0).index_select(0, segment)
    # x - x.detach() is zero with the gradient of x, so that the value is exact
    carrier = torch.where((ties > 0) & torch.isfinite(values), data, torch.zeros_like(data))
    slope = segment_sum(share * (carrier - carrier.detach()), segment, n_segments)
    rows = _masked(torch.ones_like(segment), mask, 0)
    occupied = segment_sum(rows, segment, n_segments).reshape(-1, *[1] * (data.dim() - 1)) > 0
    return torch.where(occupied, highest, torch.zeros_like(highest)) + slope


def segment_softmax(data: Tensor, segment: Tensor, n_segments: int, mask: Tensor | None = None) -> Tensor:
    """(n, ...) softmax of `data` (n, ...) float within each segment, 0 where masked or -inf.

    The shift by the segment's maximum keeps exp() in range; it carries no gradient, since the result does not depend on it.
    """
    shift = _segment_amax(_masked(data, mask, -torch.inf).detach(), segment, n_segments)
    shift = torch.where(torch.isfinite(shift), shift, torch.zeros_like(shift))
    exponent = _masked(data - shift.index_select(0, segment), mask, 0.0)
    weight = _masked(exponent.exp(), mask, 0.0)
    total = segment_sum(weight, segment, n_segments)
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
