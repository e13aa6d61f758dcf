"""`carryall md`: molecular dynamics of one structure or many, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_data, show_files, show_settings, show_table
from carryall.cli.inputs import built_in_start, check_against, load_potential, notify, read_files
from carryall.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from carryall.data import AtomicData
    from carryall.dynamics import MDResult

CHECKPOINT_INTERVAL = 200
FILES = {
    "log.csv": "time, temperature, energies, pressure of every system",
    "trajectory.extxyz": "frames of every system, one after the other",
    "final.extxyz": "the last structures, with velocities",
    "checkpoint.pt": "the state at the end: --resume goes on from here",
    "thermo.png": "temperature and energy against time",
}


@dataclass(frozen=True)
class MDConfig:
    """Molecular dynamics of all frames of the start files in one batch."""

    start: Positional[tuple[Path, ...]]
    """Start structures; none with a built-in potential: its own structure."""
    model: str
    """A packed file, checkpoint, source file or built-in name (lj-argon, sutton-chen, water)."""
    ensemble: Literal["nvt", "nve"] = "nvt"
    """nvt: Langevin thermostat; nve: constant energy."""
    temperature: float = 300.0
    """K, of the thermostat, and of the initial velocities of structures that have none."""
    timestep: float = 0.5
    """fs."""
    n_steps: int = 1000
    """Steps, those before a restart too."""
    friction: float = 1.0
    """Of the thermostat, 1/ps."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("md")
    """Folder for the results."""
    log_interval: int = 10
    """Steps between rows of the log."""
    trajectory_interval: int = 100
    """Steps between frames of the trajectory."""
    resume: bool = False
    """Go on from the checkpoint in the folder."""
    seed: int = 0
    """Of velocities and noise."""
    device: str = "cpu"
    """Where to run."""
    rebuild: bool = False
    """Compile a .pt2 that does not fit this machine from its source, once, into the cache."""


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = parse(MDConfig, "md", argv)
    structures = read_files(config.start) if config.start else built_in_start(config.model)
    potential = load_potential(config.model, config.device, config.rebuild)
    check_against(potential, structures, str(config.start[0]) if len(config.start) == 1 else "start")
    checkpoint = config.out / "checkpoint.pt"
    if checkpoint.exists() and not config.resume:
        raise InputError(f"{config.out} holds a run already: go on with --resume, or write elsewhere with -o")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    start = [str(path) for path in config.start] or "built in"
    show_settings({**settings, "start": start, "dtype": potential.spec.dtype, "cutoff": f"{potential.spec.cutoff:g} Å"})
    show_data({"start": structures})
    show_files(config.out, FILES)
    config.out.mkdir(parents=True, exist_ok=True)
    from carryall.data import write_structures
    from carryall.dynamics import md

    result = md(
        structures,
        potential,
        config.ensemble,
        config.temperature,
        config.timestep,
        config.n_steps,
        friction=config.friction,
        seed=config.seed,
        log=config.out / "log.csv",
        log_interval=config.log_interval,
        trajectory=config.out / "trajectory.extxyz",
        trajectory_interval=config.trajectory_interval,
        checkpoint=checkpoint,
        checkpoint_interval=CHECKPOINT_INTERVAL,
        resume=config.resume,
    )
    write_structures(config.out / "final.extxyz", [one for one in result.structures if one is not None])
    plot(config, structures)
    return show_outcome(result, config.out)


def plot(config: MDConfig, structures: Sequence[AtomicData]) -> None:
    """thermo.png, where matplotlib is present and there is something to see."""
    from carryall.dynamics import read_csv_log
    from carryall.properties.timeseries import by_system

    log = read_csv_log(config.out / "log.csv")
    if len(set(log["step"].tolist())) < 2:
        return
    time, temperature = by_system(log, "temperature")
    _, energy = by_system(log, "potential_energy")
    atoms = [structures[int(index)].n_atoms for index in sorted(set(log["system_id"].tolist()))]
    target = config.temperature if config.ensemble == "nvt" else None
    try:
        from carryall.properties.plots import plot_thermo

        plot_thermo(time, temperature, energy / atoms, config.out / "thermo.png", target=target, title=config.ensemble.upper())
    except MissingDependencyError as missing:
        notify(f"no thermo.png: {missing}")


def show_outcome(result: MDResult, out: Path) -> int:
    """The last state of each system; the exit code."""
    rows = []
    for one in result.systems:
        numbers = (one.temperature, one.potential_energy, one.kinetic_energy)
        shown = [f"{value:.6g}" if value is not None else "" for value in numbers]
        rows.append(
            (str(one.index), "done" if one.reason is None else f"failed: {one.reason}", str(one.steps), f"{one.time:g}", *shown)
        )
    header = ("system", "outcome", "steps", "time, fs", "temperature, K", "potential energy, eV", "kinetic energy, eV")
    show_table(
        header,
        rows[:20],
        title=f"{result.ensemble.upper()}, last state" + (f" (20 of {len(rows)} systems)" if len(rows) > 20 else ""),
    )
    failed = [one for one in result.systems if one.reason is not None]
    if len(failed) == len(result.systems):
        raise InputError(f"no system finished: {failed[0].reason}; try a smaller --timestep, or relax the start first")
    console().print(f"written to {out}/")
    return 0
