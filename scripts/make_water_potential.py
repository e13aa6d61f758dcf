"""Make the shipped potential: DPA-1 of liquid water, trained on the shipped GFN1-xTB data set.

    pip install carryall
    python scripts/make_water_potential.py train RUNDIR       # about an hour on one core; goes on where it stopped
    python scripts/make_water_potential.py ship RUNDIR        # writes src/carryall/assets/water.json.gz and its test errors

The shipped file came from a run that was shortened on its way (see `history` in water.provenance.json): this script as it
stands gives a model alike, not the same. The source form is shipped (a dict of arrays): it depends on no CPU and no torch
version, and is compiled on first use.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import carryall
from carryall.data import read_structures
from carryall.models.dpa1.source import set_weight_dtype
from carryall.models.eager import EagerPotential
from carryall.package.export import source_of
from carryall.package.from_source import load_model
from carryall.package.sources import write_source
from carryall.properties.errors_table import as_text, error_table, predict
from carryall.training import TrainConfig, read_config, train

ASSETS = Path(__file__).parents[1] / "src" / "carryall" / "assets"


def config(run: Path) -> TrainConfig:
    """The training run."""
    return read_config(
        {
            "data": {
                "train": [ASSETS / "water" / "train.extxyz.gz"],
                "validation": [ASSETS / "water" / "validation.extxyz.gz"],
            },
            "out": run,
            "model": {
                "descriptor": {
                    "rcut": 5.0,
                    "rcut_smth": 0.5,
                    "neuron": [16, 32, 64],
                    "axis_neuron": 12,
                    "tebd_dim": 4,
                    "attn": 64,
                    "attn_layer": 1,
                    "set_davg_zero": True,
                },
                "fitting": {"neuron": [96, 96, 96]},
            },
            "loss": {"start_pref_v": 0.02, "limit_pref_v": 0.2},
            "learning_rate": {"start": 4e-3, "stop": 2e-5},
            "average": 0.999,
            "batch_size": 1,
            "n_steps": 14000,
            "validate_every": 500,
            "checkpoint_every": 500,
        }
    )


def ship(run: Path) -> None:
    """Best checkpoint to source form in float64, with its test errors beside it."""
    model = set_weight_dtype(load_model(run / "best.pt"), torch.float64)  # type: ignore[arg-type]
    test = read_structures(ASSETS / "water" / "test.extxyz.gz")
    rows = error_table(test, predict(EagerPotential(model), test))  # type: ignore[arg-type]
    for line in as_text(rows)[1]:
        print(*line)
    path = write_source(ASSETS / "water.json.gz", source_of(model))
    provenance = {
        "potential": "DPA-1 of liquid water",
        "reference": "GFN1-xTB",
        "trained_on": "assets/water, 311 frames of 21 molecules",
        "made_by": "scripts/make_water_potential.py",
        "carryall_version": carryall.__version__,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "test_errors": [vars(row) for row in rows],
        "training": config(run).model_dump(mode="json", exclude={"data", "out"}),
    }
    (ASSETS / "water.provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("train", "ship"):
        sys.exit(__doc__)
    if sys.argv[1] == "train":
        print(train(config(Path(sys.argv[2]))))
    else:
        ship(Path(sys.argv[2]))
