"""What a training run is: one frozen, strict tree that YAML, flags and Python share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from carryall.errors import InputError, nearest
from carryall.models.dpa1.config import DescriptorConfig, FittingConfig


class Strict(BaseModel):
    """Frozen; unknown keys are refused; docstrings of fields are their documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataConfig(Strict):
    """Where the labelled structures are."""

    train: tuple[Path, ...]
    """Files or folders of training structures (extended XYZ, DeePMD npy, anything that ASE reads)."""
    validation: tuple[Path, ...] = ()
    """Files or folders of validation structures; empty: `validation_fraction` of the training structures is held out."""
    validation_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Part of the training structures held out when no validation files are given."""
    energy_key: str | None = None
    """Name of the energy label in extended XYZ; None takes the usual names."""
    forces_key: str | None = None
    """Name of the forces label in extended XYZ; None takes the usual names."""
    stress_key: str | None = None
    """Name of the stress label in extended XYZ; None takes the usual names."""


class ModelConfig(Strict):
    """DPA-1."""

    type_map: tuple[str, ...] = ()
    """Elements in the order of the types; empty: those of the data, by atomic number."""
    descriptor: DescriptorConfig = DescriptorConfig(set_davg_zero=True)
    """The descriptor."""
    fitting: FittingConfig = FittingConfig()
    """The energy net."""
    auto_sel: bool = True
    """Take `sel` from the data: the largest number of neighbours times 1.1, rounded up to a multiple of 4."""


class LossConfig(Strict):
    """DeePMD's loss: each prefactor goes from `start` to `limit` in proportion to the learning rate."""

    start_pref_e: float = 0.02
    """Energy, at the start."""
    limit_pref_e: float = 1.0
    """Energy, at the end."""
    start_pref_f: float = 1000.0
    """Forces, at the start."""
    limit_pref_f: float = 1.0
    """Forces, at the end."""
    start_pref_v: float = 0.0
    """Virial, at the start; used for structures that have a stress."""
    limit_pref_v: float = 0.0
    """Virial, at the end."""


class LearningRateConfig(Strict):
    """Exponential decay, after a linear warm-up."""

    start: float = Field(default=1e-3, gt=0)
    """At the first step."""
    stop: float = Field(default=1e-6, gt=0)
    """At the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""


class TrainConfig(Strict):
    """A training run."""

    data: DataConfig
    """The structures."""
    out: Path = Path("training")
    """Folder for everything that the run writes."""
    model: ModelConfig = ModelConfig()
    """The model."""
    loss: LossConfig = LossConfig()
    """The loss."""
    learning_rate: LearningRateConfig = LearningRateConfig()
    """The learning rate."""
    n_steps: int = Field(default=20000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=2, ge=1)
    """Structures in a step."""
    dtype: Literal["float32", "float64"] = "float32"
    """Weights while training, where a part's `precision` does not say otherwise; geometry and energy sums are float64."""
    device: str = "cpu"
    """Where to train."""
    seed: int = 0
    """Of weights, split and order of the data."""
    validate_every: int = Field(default=500, ge=1)
    """Steps between validations."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints; a run resumes from the last one by itself."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Clip the gradient's norm to this."""
    average: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Decay of the moving average of the weights that is validated and kept; 0 keeps the last weights."""


def read_config(source: TrainConfig | dict[str, Any] | str | Path) -> TrainConfig:
    """A configuration from YAML, a dict, or as it is; InputError names an unknown key with the nearest known one."""
    if isinstance(source, TrainConfig):
        return source
    where = "config"
    if isinstance(source, str | Path):
        where = str(source)
        if not Path(source).is_file():
            raise InputError(f"no such file: {source}")
        try:
            source = yaml.safe_load(Path(source).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(source, dict):
        raise InputError(f"{where} must hold a mapping with at least data.train, got {type(source).__name__}")
    try:
        return TrainConfig.model_validate(source)
    except ValidationError as error:
        raise InputError(f"{where}: " + "; ".join(_explain(one) for one in error.errors())) from None


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{place}: {error['msg']}" if place else str(error["msg"])
    fields: Any = TrainConfig.model_fields
    for part in error["loc"][:-1]:
        fields = fields[part].annotation.model_fields
    return f"unknown key {place!r}{nearest(str(error['loc'][-1]), fields)} (known: {', '.join(fields)})"
