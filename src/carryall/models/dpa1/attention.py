"""Gated self-attention between the neighbours of one centre, as batched matrix products over centre blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carryall.models.dpa1.config import DescriptorConfig
from carryall.models.networks import Layer

SMOOTH_SHIFT = 20.0
MASKED_LOGIT = -1e30  # finite: a centre without edges must not make 0 / 0


@dataclass(frozen=True, eq=False)
class PairGates:
    """What every layer multiplies its pairs by; zero wherever one of the two edges is masked."""

    gate: Tensor | None
    """(n, d, d) product of the two switches, on the logits; None when attention is not smooth."""
    factor: Tensor
    """(n, d, d) on the weights: the gate (or the mask), times the cosine between the two neighbours."""
    empty: Tensor | None = None
    """(n, 1, 1) logarithm of how many empty slots take part in the smooth softmax; None in graph semantics."""


class LayerNorm(nn.Module):
    """Normalisation over channels with the population variance."""

    def __init__(self, width: int, eps: float, trainable: bool) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(width, dtype=torch.float64), requires_grad=trainable)
        self.b = nn.Parameter(torch.zeros(width, dtype=torch.float64), requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return nn.functional.layer_norm(x, (x.shape[-1],), self.w, self.b, self.eps)


class GatedAttentionLayer(nn.Module):
    """G <- LayerNorm(G + W_out attention(G)), with weights gated by the switch and by the angle between neighbours."""

    def __init__(self, config: DescriptorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        width = config.neuron[-1]
        self.normalize = config.normalize
        self.scale = config.temperature if config.temperature is not None else (config.attn * config.scaling_factor) ** -0.5
        self.in_proj = Layer(width, 3 * config.attn, generator=generator)
        self.out_proj = Layer(config.attn, width, generator=generator)
        self.norm = LayerNorm(width, config.ln_eps, config.trainable_ln)

    def forward(self, g: Tensor, mask: Tensor, pairs: PairGates) -> Tensor:
        """g (n, d, width), mask (n, d); returns g's shape."""
        query, key, value = self.in_proj(g).chunk(3, dim=-1)
        if self.normalize:
            query, key, value = unit(query), unit(key), unit(value)
        logits = torch.matmul(query * self.scale, key.transpose(1, 2))
        if pairs.gate is not None:
            # the reference subtracts the shift again, which a softmax does not see
            logits = (logits + SMOOTH_SHIFT) * pairs.gate
        logits = torch.where(mask[:, None, :], logits, MASKED_LOGIT)
        if pairs.empty is None:
            weights = torch.softmax(logits, dim=-1)
        else:
            # an empty slot's logit is the shift's, 0 here, and that of all of them together log(count)
            others = pairs.empty.expand(-1, logits.shape[1], 1)
            weights = torch.softmax(torch.cat([others, logits], dim=-1), dim=-1)[..., 1:]
        return self.norm(g + self.out_proj(torch.matmul(weights * pairs.factor, value)))

    def of_nothing(self, g: Tensor) -> Tensor:
        """The layer for rows that attend to nothing."""
        return self.norm(g if self.out_proj.b is None else g + self.out_proj.b)


def pair_gates(config: DescriptorConfig, mask: Tensor, sw: Tensor, direction: Tensor, empty: Tensor | None = None) -> PairGates:
    """From mask (n, d), switch (n, d; 0 where masked), unit vectors (n, d, 3) and, where they count, empty slots (n,)."""
    if config.smooth_type_embedding:
        gate = sw[:, :, None] * sw[:, None, :]
        factor = gate
    else:
        gate, factor = None, (mask[:, :, None] & mask[:, None, :]).to(sw.dtype)
    if config.attn_dotr:
        factor = factor * torch.matmul(direction, direction.transpose(1, 2))
    count = None if empty is None or gate is None else empty.to(sw.dtype).log()[:, None, None]
    return PairGates(gate, factor, count)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis."""
    return x * x.square().sum(-1, keepdim=True).rsqrt()


def safe_unit(x: Tensor, floor: float = 1e-12) -> Tensor:
    """x / max(|x|, floor) over the last axis, and 0 with all its derivatives at x = 0."""
    # there, at a spin of zero, the slope would be 1 / floor
    x = torch.where((x == 0).all(-1, keepdim=True), x.detach(), x)
    return x * x.square().sum(-1, keepdim=True).clamp_min(floor**2).rsqrt()
