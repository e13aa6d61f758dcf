"""Hyper-parameters of DPA-1; names and defaults are DeePMD's constructors'."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


class DescriptorConfig(BaseModel):
    """`se_atten`: D. Zhang et al., npj Comput. Mater. 10, 94 (2024)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rcut: float = 6.0
    """Cutoff, Å."""
    rcut_smth: float = 0.5
    """Where the switch begins, Å."""
    sel: tuple[int, ...] = (120,)
    """Expected neighbours. Only their sum counts, as the divisor of the neighbour sums: no neighbour is ever cut off."""
    neuron: tuple[int, ...] = (25, 50, 100)
    """Widths of the embedding net."""
    axis_neuron: int = 8
    """Columns of the embedding that the contraction keeps on one side."""
    tebd_dim: int = 8
    """Width of the type embedding."""
    tebd_input_mode: Literal["concat", "strip"] = "concat"
    """How type embeddings enter: beside the radial input, or by a net of their own."""
    resnet_dt: bool = False
    """A learned step on the residual layers of the embedding net."""
    type_one_side: bool = False
    """Whether the embedding net sees the neighbour's type only."""
    attn: int = 128
    """Width of queries, keys and values."""
    attn_layer: int = 2
    """Attention layers."""
    attn_dotr: bool = True
    """Gate attention by the cosine between the two neighbours."""
    exclude_types: tuple[tuple[int, int], ...] = ()
    """Pairs of types that do not see each other."""
    env_protection: float = 0.0
    """Added to distances in denominators, Å."""
    set_davg_zero: bool = False
    """Keep the mean of the environment rows zero in the statistics."""
    activation_function: str = "tanh"
    """Of the embedding net."""
    scaling_factor: float = 1.0
    """Queries are multiplied by (attn * scaling_factor) ** -0.5."""
    normalize: bool = True
    """Normalise queries, keys and values."""
    temperature: float | None = None
    """Multiplies the queries in place of (attn * scaling_factor) ** -0.5."""
    trainable_ln: bool = True
    """Train the layer norms."""
    ln_eps: float = 1e-5
    """Added to the variance in the layer norms."""
    smooth_type_embedding: bool = True
    """Let attention fade with the switch, so that energies are smooth at the cutoff."""
    concat_output_tebd: bool = True
    """Append the centre's type embedding to the descriptor."""
    use_tebd_bias: bool = False
    """A bias in the type embedding."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not 0 <= self.rcut_smth < self.rcut:
            raise ValueError(f"rcut_smth must lie between 0 and rcut = {self.rcut}, got {self.rcut_smth}")
        if sum(self.sel) <= 0:
            raise ValueError(f"sel must be positive, got {list(self.sel)}")
        if not self.neuron or not 0 < self.axis_neuron <= self.neuron[-1]:
            raise ValueError(
                f"axis_neuron = {self.axis_neuron} must lie between 1 and the last width of neuron = {list(self.neuron)}"
            )
        return self

    @property
    def dim_out(self) -> int:
        """Width of the descriptor."""
        return self.neuron[-1] * self.axis_neuron + (self.tebd_dim if self.concat_output_tebd else 0)


class FittingConfig(BaseModel):
    """Energy fitting net, one for all types."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    neuron: tuple[int, ...] = (120, 120, 120)
    """Widths of the hidden layers."""
    resnet_dt: bool = True
    """A learned step on the residual layers."""
    activation_function: str = "tanh"
    """Of the hidden layers."""
