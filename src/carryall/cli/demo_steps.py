"""The steps of the demo: each takes what earlier ones found, prints what it does, and returns what later ones need."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from carryall.cli.console import console, show_data, show_table
from carryall.cli.demo_config import REFERENCE, DemoConfig, training_config
from carryall.cli.inputs import notify, water_frames
from carryall.cli.train import show_result, train_and_plot
from carryall.data import AtomicData, Batch, write_structures
from carryall.data.units import kB
from carryall.dynamics import BaseDynamics, HookStageEnum, RelaxResult, initialize_velocities, md, read_csv_log, relax
from carryall.dynamics.status import SYSTEM_ID
from carryall.dynamics.thermo import max_force
from carryall.errors import CarryallError, InputError, MissingDependencyError
from carryall.graph import Potential
from carryall.graph.neighbor_search import graph_from_structures
from carryall.package.check import deviation
from carryall.package.open import load, shipped
from carryall.package.pack import pack
from carryall.progress import Advance, progress_bar
from carryall.properties.errors_table import ErrorRow, as_text, error_table, predict, write_csv, write_errors
from carryall.properties.rdf import RadialDistribution, radial_distribution
from carryall.properties.timeseries import Speed, by_system, energy_drift, measure_speed
from carryall.training import TrainResult

Data = dict[str, list[AtomicData]]
TOLERANCE = 1e-10
PAIRS = (("O", "O"), ("O", "H"))
SUITABLE = {"temperature": 330, "density": 1.0}
"""Test frames that the reference g(r) is about: K and g/cm³."""
GUARD = 50.0  # eV/Å: a bond that breaks shows first in the forces


@dataclass(frozen=True, eq=False)
class Packed:
    """The potential in three forms, and how far the files are from the model."""

    eager: Potential
    files: dict[str, Potential]
    """By suffix."""
    deviations: dict[str, float]
    """Largest deviation of any output on test frames, relative to max(1, its size)."""
    seconds: dict[str, float]
    sizes: dict[str, int]
    missing: str | None
    """Why there is no .pt2."""

    @property
    def fastest(self) -> tuple[str, Potential]:
        """What simulations run with."""
        suffix = ".pt2" if ".pt2" in self.files else ".pte"
        return suffix, self.files[suffix]


@dataclass(frozen=True, eq=False)
class Runs:
    """What was simulated."""

    relaxed: Sequence[RelaxResult]
    force_curves: np.ndarray
    """(n_steps, n_systems) eV/Å, NaN once a box rests."""
    nvt_time: np.ndarray
    """(n_times,) ps."""
    nvt_temperature: np.ndarray
    """(n_times, n_systems) K."""
    nvt_energy: np.ndarray
    """(n_times, n_systems) eV/atom, potential."""
    nvt_frames: list[AtomicData]
    """Of the second part of the run."""
    nvt_failed: int
    drifts: dict[str, tuple[np.ndarray, np.ndarray, int]]
    """name -> time (ps), total energy (eV), atoms."""
    seconds: dict[str, float]


@dataclass(frozen=True, eq=False)
class Found:
    """What was measured."""

    errors: list[ErrorRow]
    rdf: RadialDistribution
    reference_rdf: RadialDistribution
    speeds: list[Speed]
    drifts: dict[str, float]
    """meV/atom/ps."""
    pictures: dict[str, Path]


def write_data(config: DemoConfig) -> Data:
    """The built-in structures as extended XYZ files."""
    folder = config.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    data = {name: water_frames(name) for name in ("train", "validation", "test")}
    for name, structures in data.items():
        write_structures(folder / f"{name}.extxyz", structures)
    show_data(data)
    return data


def train_model(config: DemoConfig) -> TrainResult:
    """Train, or go on where an interrupted demo stopped."""
    result = train_and_plot(training_config(config))
    show_result(result)
    return result


def pack_model(config: DemoConfig, trained: TrainResult, data: Data) -> Packed:
    """Both files, loaded again and compared with the model on test frames."""
    eager = load(trained.checkpoint, dtype="float64")
    graphs = [
        graph_from_structures(part, eager.spec.cutoff, eager.spec.type_map) for part in (data["test"][:1], data["test"][1:9])
    ]
    files: dict[str, Potential] = {}
    deviations, seconds, sizes = {}, {}, {}
    missing = None
    for suffix in (".pte", ".pt2"):
        path = config.out / f"model{suffix}"
        began = time.monotonic()
        try:
            with console().status(f"packing {path}"):
                pack(trained.checkpoint, path, dtype="float64")
        except MissingDependencyError as error:
            missing = str(error)
            notify(f"going on with {config.out / 'model.pte'}: {missing}")
            continue
        seconds[suffix], sizes[suffix] = time.monotonic() - began, path.stat().st_size
        files[suffix] = load(path)
        deviations[suffix], where = deviation(files[suffix], eager, graphs)
        if not deviations[suffix] <= TOLERANCE:
            raise CarryallError(f"{path} differs from the model by {deviations[suffix]:.1e} in {where}: please report it")
    rows = [(f"model{s}", f"{sizes[s] / 1e6:.2f} MB", f"{seconds[s]:.0f} s", f"{deviations[s]:.1e}") for s in files]
    show_table(("file", "size", "packed in", "largest deviation from the model"), rows)
    return Packed(eager, files, deviations, seconds, sizes, missing)


def simulate(config: DemoConfig, packed: Packed, data: Data) -> Runs:
    """Relaxation, NVT, NVE in batches; ASE for one larger box."""
    suffix, potential = packed.fastest
    start = start_frames(data["test"], config.n_systems)
    seconds: dict[str, float] = {}
    began = time.monotonic()
    relaxed, curves = relax_boxes(config, potential, start)
    seconds["relax"] = time.monotonic() - began
    began = time.monotonic()
    nvt = run_nvt(config, potential, start)
    seconds["nvt"] = time.monotonic() - began
    began = time.monotonic()
    drifts = {"batched NVE": run_nve(config, potential, nvt.last)}
    seconds["nve"] = time.monotonic() - began
    began = time.monotonic()
    drifts |= run_ase(config, potential, nvt.last[0])
    seconds["ase"] = time.monotonic() - began
    done = {"converged": sum(one.outcome == "converged" for one in relaxed), "boxes": len(relaxed)}
    rows = [
        (
            "FIRE",
            f"{done['boxes']} boxes",
            f"{done['converged']} converged to {config.fmax:g} eV/Å",
            f"{seconds['relax']:.1f} s",
        ),
        ("NVT", f"{len(start)} boxes", f"{config.nvt_steps} steps, {nvt.failed} set aside", f"{seconds['nvt']:.1f} s"),
        ("NVE", f"{len(nvt.last[:4])} boxes", f"{config.nve_steps} steps", f"{seconds['nve']:.1f} s"),
        (
            "ASE NVE",
            f"1 box, {8 * start[0].n_atoms} atoms",
            f"{config.ase_steps} steps" if len(drifts) > 1 else "ASE is absent",
            f"{seconds['ase']:.1f} s",
        ),
    ]
    show_table(("run", f"with model{suffix}", "", "time"), rows)
    return Runs(relaxed, curves, nvt.time, nvt.temperature, nvt.energy, nvt.frames, nvt.failed, drifts, seconds)


def start_frames(test: Sequence[AtomicData], count: int) -> list[AtomicData]:
    """Frames at the temperature and density of the reference g(r), without labels; some twice when there are too few."""
    suitable = [one for one in test if all(one.info.get(key) == value for key, value in SUITABLE.items())] or list(test)
    chosen = [
        suitable[i * len(suitable) // count] if count <= len(suitable) else suitable[i % len(suitable)] for i in range(count)
    ]
    return [one.replace(energy=None, forces=None, stress=None) for one in chosen]


def relax_boxes(config: DemoConfig, potential: Potential, start: list[AtomicData]) -> tuple[Sequence[RelaxResult], np.ndarray]:
    """Results, and the largest force of each box at each step."""
    folder = config.out / "relax"
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar("FIRE", config.relax_steps) as advance:
        curves = ForceCurves(len(start), advance)
        results = relax(start, potential, config.fmax, config.relax_steps, hooks=[curves], progress=False)
    lines = [[one.index, one.outcome, one.steps, _number(one.energy), _number(one.fmax)] for one in results]
    write_csv(
        folder / "results.csv", ("system", "outcome", "steps", "energy", "fmax"), ("1", "1", "1", "eV", "eV/angstrom"), lines
    )
    write_structures(
        folder / "relaxed.extxyz",
        [one.structure for one in results if one.structure is not None and one.energy is not None] or start,
    )
    return results, np.array(curves.rows).reshape(-1, len(start))


@dataclass(frozen=True, eq=False)
class Thermal:
    """The NVT run."""

    time: np.ndarray
    temperature: np.ndarray
    energy: np.ndarray
    frames: list[AtomicData]
    last: list[AtomicData]
    failed: int


def run_nvt(config: DemoConfig, potential: Potential, start: list[AtomicData]) -> Thermal:
    """All boxes at one temperature, with log, trajectory and guard."""
    from carryall.data import read_structures

    folder = config.out / "nvt"
    folder.mkdir(parents=True, exist_ok=True)
    every = max(1, config.nvt_steps // 60)
    with progress_bar("NVT", config.nvt_steps) as advance:
        result = md(
            start, potential, "nvt", config.temperature, config.timestep, config.nvt_steps,
            friction=config.friction, seed=config.seed, log=folder / "log.csv", log_interval=every,
            trajectory=folder / "trajectory.extxyz", trajectory_interval=every, progress=False,
            max_force=GUARD, hooks=[StepBar(advance)], max_atoms_per_batch=_atoms(start),
        )  # fmt: skip
    log = read_csv_log(folder / "log.csv")
    times, temperature = by_system(log, "temperature")
    _, energy = by_system(log, "potential_energy")
    frames = read_structures(folder / "trajectory.extxyz")
    late = [one for one in frames if int(one.info["step"]) >= config.nvt_steps // 5] or frames
    good = [one.structure for one in result.systems if one.reason is None and one.structure is not None]
    if not good:
        raise InputError(
            f"no box survived NVT ({result.systems[0].reason}): train longer, as in --n-steps {2 * config.n_steps}"
        )
    return Thermal(times, temperature, energy / start[0].n_atoms, late, good, len(start) - len(good))


def run_nve(config: DemoConfig, potential: Potential, start: list[AtomicData]) -> tuple[np.ndarray, np.ndarray, int]:
    """Four boxes at constant energy, from where NVT left them: time (ps), total energy of all (eV), atoms."""
    folder = config.out / "nve"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = start[:4]
    with progress_bar("NVE", config.nve_steps) as advance:
        md(
            chosen, potential, "nve", config.temperature, config.timestep, config.nve_steps,
            seed=config.seed, log=folder / "log.csv", log_interval=2, progress=False, hooks=[StepBar(advance)],
            max_atoms_per_batch=_atoms(chosen),
        )  # fmt: skip
    times, total = by_system(read_csv_log(folder / "log.csv"), "total_energy")
    kept = np.isfinite(total).all(axis=0)
    return times, total[:, kept].sum(axis=1), sum(one.n_atoms for one, ok in zip(chosen, kept, strict=True) if ok)


def run_ase(config: DemoConfig, potential: Potential, start: AtomicData) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """One box of 2 x 2 x 2 copies through ASE's calculator interface; nothing where ASE is absent."""
    try:
        from carryall.engines.ase import Calculator
    except MissingDependencyError as missing:
        notify(f"no ASE run: {missing}")
        return {}
    from ase import units
    from ase.md.verlet import VelocityVerlet

    atoms = start.replace(velocities=None).to_ase().repeat((2, 2, 2))
    # fresh velocities: with those of the small box the copies would move as one
    fresh = initialize_velocities(Batch.from_ase([atoms]), config.temperature, config.seed)
    atoms.set_velocities(fresh.velocities.numpy())
    atoms.calc = Calculator(potential)
    dynamics = VelocityVerlet(atoms, timestep=config.timestep * units.fs)
    energies = [atoms.get_total_energy()]
    with progress_bar("ASE NVE", config.ase_steps) as advance:
        for _ in range(config.ase_steps):
            dynamics.run(1)
            energies.append(atoms.get_total_energy())
            advance(1, None)
    kinetic = atoms.get_kinetic_energy()
    console().print(f"ASE: {len(atoms)} atoms, {2 * kinetic / (3 * len(atoms) * kB):.0f} K after {config.ase_steps} steps")
    times = 1e-3 * config.timestep * np.arange(len(energies))
    return {"ASE, 2 x 2 x 2 box": (times, np.array(energies), len(atoms))}


def measure(config: DemoConfig, packed: Packed, data: Data, runs: Runs) -> Found:
    """Errors, drift, g(r), speed; pictures of all where matplotlib is present."""
    _, potential = packed.fastest
    predictions = predict(potential, data["test"])
    errors = error_table(data["test"], predictions)
    write_errors(config.out / "errors.csv", errors)
    header, rows = as_text(errors)
    show_table(header, rows, title=f"test errors against {REFERENCE}")
    reference = reference_rdf()
    width = float(reference.r[1] - reference.r[0])
    rdf = radial_distribution(runs.nvt_frames, PAIRS, r_max=width * len(reference.r), n_bins=len(reference.r))
    drifts = {name: energy_drift(*run) for name, run in runs.drifts.items()}
    boxes = start_frames(data["test"], config.n_systems)
    speeds = [measure_speed(name, one, boxes) for name, one in (("eager", packed.eager), *packed.files.items())]
    show_table(("run", "energy drift, meV/atom/ps"), [(name, f"{value:+.3f}") for name, value in drifts.items()])
    show_speed(speeds, config)
    pictures = draw(config, data["test"], predictions, runs, rdf, reference, speeds)
    return Found(errors, rdf, reference, speeds, drifts, pictures)


def show_speed(speeds: Sequence[Speed], config: DemoConfig) -> None:
    """µs per atom and step, and simulated time a day."""
    rows = [(one.name, f"{one.microseconds_per_atom:.1f}", f"{one.nanoseconds_per_day(config.timestep):.2f}") for one in speeds]
    show_table(("potential", "µs per atom and step", f"ns/day, each of {config.n_systems} boxes, {config.timestep:g} fs"), rows)


def reference_rdf() -> RadialDistribution:
    """g(r) of the reference's own MD."""
    facts = json.loads(shipped("water/provenance.json").read_text())["reference_rdf"]
    values = {pair: np.array(facts["g"]["".join(pair)]) for pair in PAIRS}
    return RadialDistribution(np.array(facts["g"]["r"]), values, int(facts["frames"]))


def draw(
    config: DemoConfig,
    test: list[AtomicData],
    predictions: list[dict[str, np.ndarray]],
    runs: Runs,
    rdf: RadialDistribution,
    reference: RadialDistribution,
    speeds: list[Speed],
) -> dict[str, Path]:
    """The pictures by name; none without matplotlib."""
    from carryall.properties import plots

    folder = config.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    curve = config.out / "training" / "learning_curve.csv"
    steps = [one.steps for one in runs.relaxed]
    ceilings = {("O", "H"): 2.5}
    paths = {name: folder / f"{name}.png" for name in ("learning_curve", "parity", "relaxation", "nvt", "rdf", "nve", "speed")}
    try:
        plots.plot_learning_curve(curve, paths["learning_curve"], reference=REFERENCE)
        plots.plot_parity(test, predictions, paths["parity"], reference=REFERENCE)
        plots.plot_relaxation(runs.force_curves, steps, paths["relaxation"], fmax=config.fmax)
        plots.plot_thermo(runs.nvt_time, runs.nvt_temperature, runs.nvt_energy, paths["nvt"], target=config.temperature)
        plots.plot_rdf(rdf, paths["rdf"], reference=reference, labels=("this potential", REFERENCE), ceilings=ceilings)
        plots.plot_energy_drift(runs.drifts, paths["nve"])
        plots.plot_speed(speeds, paths["speed"], title=f"speed, {speeds[0].n_atoms} atoms")
    except MissingDependencyError as missing:
        notify(f"the report will have no pictures: {missing}")
        return {}
    return paths


class StepBar:
    """Moves a progress bar after each step."""

    stage = HookStageEnum.AFTER_STEP
    frequency = 1

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """One step done."""
        self._advance(1, None)


class ForceCurves:
    """Keeps the largest force of each running system before each of its steps."""

    stage = HookStageEnum.BEFORE_STEP
    frequency = 1

    def __init__(self, n_systems: int, advance: Advance) -> None:
        self.rows: list[np.ndarray] = []
        self._n_systems, self._advance = n_systems, advance

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """One number for each system: a system that entered later is at an earlier step of its own."""
        forces, running = max_force(batch).numpy(), dynamics.running(batch)
        ids, steps = batch.get(SYSTEM_ID).tolist(), dynamics.steps(batch).tolist()
        for i in range(batch.n_systems) if running is None else running.nonzero().squeeze(1).tolist():
            while len(self.rows) <= steps[i]:
                self.rows.append(np.full(self._n_systems, np.nan))
            self.rows[steps[i]][ids[i]] = forces[i]
        self._advance(1, f"{dynamics.n_running(batch)} boxes left")


def _atoms(structures: Sequence[AtomicData]) -> int:
    """Atoms of all: one batch, one log."""
    return sum(one.n_atoms for one in structures)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"
