"""Hyper-parameters of DPA-1; names and defaults are DeePMD's constructors'.

Options that DeePMD's own code only takes at one value (`attn_mask=False`, `spin=None`, ...) are taken at that value, and
refused with the reason at any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from carryall.models.dpa1.precision import precision_name

DEFAULT_LN_EPS = 1e-5
DESCRIPTOR_REFUSES = {
    "attn_mask": (False, "attention without the diagonal, which deepmd-kit 3 dropped too"),
    "spin": (None, "spins of the old kind (virtual atoms), which deepmd-kit 3 dropped too"),
    "compress": (None, "tables in place of nets: read the model as it was before 'dp compress'"),
}
FITTING_REFUSES = {
    "tot_ener_zero": (False, "a total energy forced to zero, which deepmd-kit 3 does not compute either"),
    "spin": (None, "spins of the old kind (virtual atoms), which deepmd-kit 3 dropped too"),
    "layer_name": (None, "layers shared by name between models, which one potential has no use for"),
}


class DescriptorConfig(BaseModel):
    """`se_atten`: D. Zhang et al., npj Comput. Mater. 10, 94 (2024)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: Literal["dpa1", "se_atten_v2"] = "dpa1"
    """se_atten_v2 is dpa1 (also called se_atten) with tebd_input_mode "strip" and smooth_type_embedding."""
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
    trainable: bool = True
    """Train the descriptor."""
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
    """Of the embedding net: tanh, gelu, gelu_tf, relu, relu6, softplus, sigmoid, silu, silut (silut:3.0), linear or none."""
    precision: str = "default"
    """Of the weights: float64 (double, default), float32 (single) or float16 (half, computed in float32)."""
    scaling_factor: float = 1.0
    """Queries are multiplied by (attn * scaling_factor) ** -0.5."""
    normalize: bool = True
    """Normalise queries, keys and values."""
    temperature: float | None = None
    """Multiplies the queries in place of (attn * scaling_factor) ** -0.5."""
    trainable_ln: bool = True
    """Train the layer norms."""
    ln_eps: float = DEFAULT_LN_EPS
    """Added to the variance in the layer norms; None stands for the default."""
    smooth_type_embedding: bool = True
    """Let attention fade with the switch, so that energies are smooth at the cutoff."""
    concat_output_tebd: bool = True
    """Append the centre's type embedding to the descriptor."""
    use_econf_tebd: bool = False
    """Make type embeddings of electron configurations instead of one vector for each type."""
    use_tebd_bias: bool = False
    """A bias in the type embedding."""
    lmax: int = Field(default=1, ge=1, le=4)
    """Largest degree of the moments of a neighbourhood; beyond 1, real solid harmonics follow the environment rows."""

    _precision = field_validator("precision")(precision_name)

    @model_validator(mode="before")
    @classmethod
    def _deepmd_forms(cls, values: Any) -> Any:
        values = drop_refused(values, DESCRIPTOR_REFUSES)
        if not isinstance(values, dict):
            return values
        if values.get("type") == "se_atten":
            values["type"] = "dpa1"
        if values.get("ln_eps", 0) is None:
            values["ln_eps"] = DEFAULT_LN_EPS
        if isinstance(values.get("sel"), int):
            values["sel"] = (values["sel"],)
        stripped = values.pop("stripped_type_embedding", None)
        if stripped is not None:
            values["tebd_input_mode"] = "strip" if stripped else "concat"
        if values.get("type") == "se_atten_v2":
            for name, fixed in {"tebd_input_mode": "strip", "smooth_type_embedding": True}.items():
                if values.setdefault(name, fixed) != fixed:
                    raise ValueError(f"se_atten_v2 has {name} = {fixed!r}, got {values[name]!r}: set it so, or use dpa1")
        return values

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
    """Energy fitting net."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    neuron: tuple[int, ...] = (120, 120, 120)
    """Widths of the hidden layers."""
    resnet_dt: bool = True
    """A learned step on the residual layers."""
    numb_fparam: int = Field(default=0, ge=0)
    """Parameters of a whole structure (`fparam`) that the net takes, such as a temperature."""
    numb_aparam: int = Field(default=0, ge=0)
    """Parameters of each atom (`aparam`) that the net takes."""
    dim_case_embd: int = Field(default=0, ge=0)
    """Width of the vector that says which of several data sets the net speaks for."""
    rcond: float | None = None
    """Singular values below this part of the largest count as zero when energies of the elements are fitted."""
    trainable: bool | tuple[bool, ...] = True
    """Train the net; or one flag for each hidden layer and one for the output."""
    atom_ener: tuple[float | None, ...] | None = None
    """Energy of each type in vacuum, eV, or None where unknown: the net's own output for a zero descriptor is taken off."""
    activation_function: str = "tanh"
    """Of the hidden layers, as in the descriptor."""
    precision: str = "default"
    """Of the weights, as in the descriptor."""
    use_aparam_as_mask: bool = False
    """`aparam` says which atoms are real, and is no input of the net: as in deepmd-kit 3, nothing reads it."""
    mixed_types: bool = True
    """One net for all types (as DeePMD's models of this descriptor have it), or one for each."""
    exclude_types: tuple[int, ...] = ()
    """Types whose atoms have no energy: joined with the model's atom_exclude_types, as DeePMD's models have only those."""
    default_fparam: tuple[float, ...] | None = None
    """`fparam` of structures that have none."""

    _precision = field_validator("precision")(precision_name)

    @model_validator(mode="before")
    @classmethod
    def _deepmd_forms(cls, values: Any) -> Any:
        values = drop_refused(values, FITTING_REFUSES)
        if isinstance(values, dict) and values.get("trainable", True) is None:
            values["trainable"] = True
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.default_fparam is not None and len(self.default_fparam) != self.numb_fparam:
            raise ValueError(f"default_fparam has {len(self.default_fparam)} values, numb_fparam is {self.numb_fparam}")
        if isinstance(self.trainable, tuple) and len(self.trainable) != len(self.neuron) + 1:
            raise ValueError(
                f"trainable has {len(self.trainable)} flags, expected {len(self.neuron) + 1}: one for each of the "
                f"{len(self.neuron)} hidden layers and one for the output"
            )
        return self

    @property
    def layers_trainable(self) -> tuple[bool, ...]:
        """One flag for each hidden layer and one for the output."""
        return (self.trainable,) * (len(self.neuron) + 1) if isinstance(self.trainable, bool) else self.trainable

    @property
    def aparam_inputs(self) -> int:
        """Columns of `aparam` that the net reads."""
        return 0 if self.use_aparam_as_mask else self.numb_aparam


def drop_refused(values: Any, refused: Mapping[str, tuple[object, str]]) -> Any:
    """A copy of `values` without the names of `refused`; ValueError where one is not at its only value."""
    if not isinstance(values, dict):
        return values
    kept = dict(values)
    for name, (only, reason) in refused.items():
        if name in kept and kept.pop(name) != only:
            raise ValueError(f"{name} = {values[name]!r} is not supported ({reason}): only {only!r}")
    return kept
