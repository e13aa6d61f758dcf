"""`carryall demo`: the whole road on built-in data, from labels to a report."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from carryall.cli.arguments import parse
from carryall.cli.console import Steps, console, show_files, show_settings
from carryall.cli.demo_config import REFERENCE, DemoConfig

FILES = {
    "report.html": "open this: everything on one page, pictures inside",
    "data/train.extxyz": f"training structures, labelled by {REFERENCE}",
    "data/validation.extxyz": "structures that choose the best model",
    "data/test.extxyz": "structures that only the errors are measured on",
    "training/config.yaml": "train again: carryall train demo/training/config.yaml --out elsewhere",
    "training/learning_curve.csv": "errors against steps",
    "training/best.pt": "the model of the demo as a checkpoint",
    "model.pt2": "the potential, compiled for this kind of CPU: carryall md --model model.pt2",
    "model.pte": "the potential, portable, needs no compiler",
    "errors.csv": f"test errors against {REFERENCE}",
    "relax/relaxed.extxyz": "relaxed boxes",
    "relax/results.csv": "outcome, steps, energy, largest force",
    "nvt/log.csv": "temperature and energies of every box",
    "nvt/trajectory.extxyz": "frames of every box",
    "nve/log.csv": "total energy at constant energy",
    "pictures": "the pictures of the report as PNG files",
}


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = parse(DemoConfig, "demo", argv)
    steps = Steps(6)
    show_settings({key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()})
    from carryall.cli import demo_steps
    from carryall.cli.demo_report import write_demo_report

    console().print(f"machine  {machine()}; reference {REFERENCE}; training in float32 on the CPU, everything else in float64")
    config.out.mkdir(parents=True, exist_ok=True)
    steps.header(1, f"data: liquid water, labelled by {REFERENCE}")
    data = demo_steps.write_data(config)
    steps.header(2, f"train a DPA-1 with attention, {config.n_steps} steps")
    trained = demo_steps.train_model(config)
    steps.header(3, "pack it into one file, twice, and compare with the model")
    packed = demo_steps.pack_model(config, trained, data)
    steps.header(
        4, f"relax {config.n_systems} boxes, then NVT of {config.n_systems} boxes, in one batch each; one larger box with ASE"
    )
    runs = demo_steps.simulate(config, packed, data)
    steps.header(5, "measure: test errors, energy drift, structure of the liquid, speed")
    found = demo_steps.measure(config, packed, data, runs)
    steps.header(6, "report")
    report = write_demo_report(config, trained, packed, runs, found, machine(), steps.elapsed)
    written = {name: comment for name, comment in FILES.items() if (config.out / name).exists()}
    show_files(config.out, written, f"written in {steps.elapsed:.0f} s")
    console().print(f"look at [bold]{report}[/bold] (any browser, also on a phone)")
    return 0


def machine() -> str:
    """What the times were measured on."""
    import torch

    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
