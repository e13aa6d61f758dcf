"""The page that the demo ends with."""

from __future__ import annotations

from pathlib import Path

from carryall.cli.demo_config import MODEL, REFERENCE, DemoConfig
from carryall.cli.demo_steps import Found, Packed, Runs
from carryall.properties.errors_table import as_text
from carryall.properties.report import Picture, Section, Table, write_report
from carryall.training import TrainResult


def write_demo_report(
    config: DemoConfig, trained: TrainResult, packed: Packed, runs: Runs, found: Found, machine: str, seconds: float
) -> Path:
    """`report.html` in the demo's folder."""
    pictures = found.pictures
    sections = [
        summary(config, packed, found, machine, seconds),
        training(trained, pictures),
        errors(found, pictures),
        files(packed),
        relaxation(config, runs, pictures),
        nvt(config, runs, found, pictures),
        nve(config, found, pictures),
        speed(config, found, machine, pictures),
    ]
    lead = (
        f"Liquid water: a DPA-1 potential with attention, trained on {REFERENCE} energies and forces, packed and run. "
        f"The reference of every figure is {REFERENCE}."
    )
    return write_report(config.out / "report.html", "carryall demo: from labels to a running simulation", lead, sections)


def summary(config: DemoConfig, packed: Packed, found: Found, machine: str, seconds: float) -> Section:
    """The numbers that matter, first."""
    rows = [(f"test RMSE, {row.quantity}", f"{row.rmse:.3g} {row.unit}") for row in found.errors]
    rows += [
        (f"largest deviation of model{suffix} from the model", f"{value:.0e}") for suffix, value in packed.deviations.items()
    ]
    rows += [(f"energy drift, {name}", f"{value:+.3f} meV/atom/ps") for name, value in found.drifts.items()]
    fastest = min(found.speeds, key=lambda one: one.seconds)
    rows += [("speed of the fastest form", f"{fastest.microseconds_per_atom:.1f} µs per atom and step ({fastest.name})")]
    rows += [("the whole demo took", f"{seconds:.0f} s")]
    return Section("In short", f"Measured on {machine}. Seed {config.seed}.", Table(("", f"against {REFERENCE}"), rows))


def training(trained: TrainResult, pictures: dict[str, Path]) -> Section:
    """Learning curve."""
    sizes = MODEL["descriptor"]
    text = (
        f"{trained.steps} steps in {trained.seconds:.0f} s. Cutoff {sizes['rcut']:g} Å, "
        f"embedding {', '.join(map(str, sizes['neuron']))}, "
        f"{sizes['attn_layer']} attention layer. The model with the lowest validation errors is kept."
    )
    caption = f"Errors against {REFERENCE} during training."
    return Section("Training", text, pictures=_shown(pictures, learning_curve=caption))


def errors(found: Found, pictures: dict[str, Path]) -> Section:
    """Test errors and parity."""
    header, rows = as_text(found.errors)
    caption = f"Test structures: the potential against {REFERENCE}; points on the line are exact."
    return Section(
        "Test errors", "On structures that took no part in training.", Table(header, rows), _shown(pictures, parity=caption)
    )


def files(packed: Packed) -> Section:
    """What was packed."""
    rows = [
        (f"model{s}", f"{packed.sizes[s] / 1e6:.2f} MB", f"{packed.seconds[s]:.0f} s", f"{packed.deviations[s]:.1e}")
        for s in packed.files
    ]
    text = "Energy, forces and virial of the loaded files against the model itself, in float64, on test structures."
    if packed.missing:
        text += f"\n\nThere is no .pt2: {packed.missing}."
    return Section("One file", text, Table(("file", "size", "packed in", "largest deviation"), rows))


def relaxation(config: DemoConfig, runs: Runs, pictures: dict[str, Path]) -> Section:
    """FIRE."""
    converged = sum(one.outcome == "converged" for one in runs.relaxed)
    text = (
        f"{len(runs.relaxed)} boxes of water relaxed with FIRE in one batch, at most {config.relax_steps} steps, in "
        f"{runs.seconds['relax']:.1f} s; {converged} reached {config.fmax:g} eV/Å, and a box that has rests there."
    )
    caption = (
        f"Relaxations with the potential trained on {REFERENCE}: steps that boxes took, and largest force before and after."
    )
    return Section("Relaxation", text, pictures=_shown(pictures, relaxation=caption))


def nvt(config: DemoConfig, runs: Runs, found: Found, pictures: dict[str, Path]) -> Section:
    """NVT and g(r)."""
    boxes = runs.nvt_temperature.shape[1]
    mean = float(runs.nvt_temperature[len(runs.nvt_time) // 5 :].mean()) if runs.nvt_failed == 0 else float("nan")
    text = (
        f"{boxes} boxes at {config.temperature:g} K in one batch, {config.nvt_steps} steps of {config.timestep:g} fs, in "
        f"{runs.seconds['nvt']:.0f} s; {runs.nvt_failed} set aside. Mean temperature {mean:.0f} K. "
        f"The boxes start from test structures of the {REFERENCE} trajectory, and g(r) leaves out the first fifth of "
        "the run: over so short a time it shows that the liquid stays what it is, not that it would find its structure."
    )
    captions = {
        "nvt": f"Every box, and the mean. Potential trained on {REFERENCE}.",
        "rdf": f"g(r) of the NVT run ({found.rdf.n_frames} frames) and of {REFERENCE} MD "
        f"({found.reference_rdf.n_frames} frames, 330 K, "
        "1 g/cm³). The O–H axis is cut above 2.5 to show the hydrogen bonds.",
    }
    return Section("NVT", text, pictures=_shown(pictures, **captions))


def nve(config: DemoConfig, found: Found, pictures: dict[str, Path]) -> Section:
    """Energy conservation."""
    rows = [(name, f"{value:+.4f}") for name, value in found.drifts.items()]
    text = (
        f"Constant energy, {config.timestep:g} fs, no thermostat: four boxes in one batch, "
        "and one box of 2 × 2 × 2 copies in ASE."
    )
    caption = f"Total energy since the start. Potential trained on {REFERENCE}."
    return Section("Energy conservation", text, Table(("run", "drift, meV/atom/ps"), rows), _shown(pictures, nve=caption))


def speed(config: DemoConfig, found: Found, machine: str, pictures: dict[str, Path]) -> Section:
    """Time of a call."""
    rows = [
        (one.name, f"{one.microseconds_per_atom:.1f}", f"{one.nanoseconds_per_day(config.timestep):.2f}")
        for one in found.speeds
    ]
    header = ("form", "µs per atom and step", f"ns/day at {config.timestep:g} fs")
    text = (
        f"Energy, forces and virial of {config.n_systems} boxes ({found.speeds[0].n_atoms} atoms) in one call, "
        f"without the neighbour search, on {machine}. ns/day is of each box, all {config.n_systems} at once."
    )
    caption = f"Time of a call; shorter is faster. Potential trained on {REFERENCE}."
    return Section("Speed", text, Table(header, rows), _shown(pictures, speed=caption))


def _shown(pictures: dict[str, Path], **captions: str) -> list[Picture]:
    return [Picture(pictures[name], caption) for name, caption in captions.items() if name in pictures]
