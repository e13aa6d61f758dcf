"""What the demo runs: sizes chosen so that all of it takes a few minutes on two cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from carryall.training import TrainConfig

REFERENCE = "GFN1-xTB"
"""The method that labelled the built-in data; every figure says so."""

MODEL: dict[str, Any] = {
    "descriptor": {
        "rcut": 5.0,
        "rcut_smth": 0.5,
        "neuron": (16, 32, 64),
        "axis_neuron": 12,
        "tebd_dim": 4,
        "attn": 64,
        "attn_layer": 1,
        "set_davg_zero": True,
    },
    "fitting": {"neuron": (96, 96, 96)},
}
TRAINING: dict[str, Any] = {
    "batch_size": 1,
    "loss": {"start_pref_v": 0.02, "limit_pref_v": 0.2},
    "learning_rate": {"start": 4e-3, "stop": 1.5e-3},
    "average": 0.998,
    "validate_every": 200,
    "checkpoint_every": 200,
}


@dataclass(frozen=True)
class DemoConfig:
    """Train, pack, verify, relax, run and report on built-in data: liquid water labelled by GFN1-xTB."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo")
    """Folder for everything; a demo that was interrupted goes on there."""
    seed: int = 0
    """Of weights, order of the data, velocities and noise."""
    n_steps: int = 2600
    """Training steps."""
    n_systems: int = 16
    """Boxes of water that are relaxed, and then run, in one batch."""
    temperature: float = 330.0
    """K, of the NVT run; the reference g(r) is at 330 K."""
    timestep: float = 0.5
    """fs."""
    nvt_steps: int = 200
    """Steps of NVT, all boxes at once."""
    nve_steps: int = 240
    """Steps of NVE, four boxes at once."""
    ase_steps: int = 80
    """Steps of NVE with ASE, one box of 2 x 2 x 2 copies."""
    relax_steps: int = 80
    """Steps after which a relaxation ends."""
    fmax: float = 0.2
    """eV/Å, largest force that counts as relaxed."""
    friction: float = 5.0
    """Of the thermostat, 1/ps."""


def training_config(config: DemoConfig) -> TrainConfig:
    """The training run of the demo."""
    from carryall.training.config import read_config

    data = config.out / "data"
    return read_config(
        {
            "data": {"train": [data / "train.extxyz"], "validation": [data / "validation.extxyz"]},
            "out": config.out / "training",
            "model": MODEL,
            "n_steps": config.n_steps,
            "seed": config.seed,
            **TRAINING,
        }
    )
