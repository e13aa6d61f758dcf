"""The table of type embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carryall.models.networks import Layer, residual


class TypeEmbedding(nn.Module):
    """One linear layer on what describes the types, with the residual that the layer rule gives when the widths match.

    `features` (n_types, n_features) describes each type, such as `electron_configurations`; None stands for one-hot rows.
    """

    features: Tensor | None

    def __init__(
        self,
        n_types: int,
        width: int,
        bias: bool,
        generator: torch.Generator | None = None,
        features: Tensor | None = None,
    ) -> None:
        super().__init__()
        n_in = n_types if features is None else features.shape[1]
        self.layer = Layer(n_in, width, bias=bias, resnet=True, generator=generator)
        self.register_buffer("features", features, persistent=False)

    def forward(self) -> Tensor:
        """(n_types, width) table."""
        w = self.layer.w
        if self.features is not None:
            return self.layer(self.features.to(w.dtype))
        table = w if self.layer.b is None else w + self.layer.b
        return table + residual(torch.eye(w.shape[0], dtype=w.dtype, device=w.device), w.shape[1])
