"""The table of type embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carryall.models.networks import Layer, residual


class TypeEmbedding(nn.Module):
    """One linear layer on one-hot types, with the residual that the layer rule gives when the widths match."""

    def __init__(self, n_types: int, width: int, bias: bool, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.layer = Layer(n_types, width, bias=bias, resnet=True, generator=generator)

    def forward(self) -> Tensor:
        """(n_types, width) table."""
        w = self.layer.w
        table = w if self.layer.b is None else w + self.layer.b
        return table + residual(torch.eye(w.shape[0], dtype=w.dtype, device=w.device), w.shape[1])
