"""`carryall md`: molecular dynamics of one structure or many."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro
from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_data, show_files, show_settings, show_table
from carryall.cli.inputs import built_in_start, check_against, load_potential, made_constraints, notify, read_files
from carryall.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from carryall.data import AtomicData
    from carryall.dynamics import MDResult
    from carryall.dynamics.parameters import Setting
    from carryall.graph.potential import Potential

FILES = {
    "log.csv": "time, temperature, energies, pressure of every system",
    "trajectory.extxyz": "frames of every system, one after the other",
    "final.extxyz": "the last structures, with velocities",
    "checkpoint.pt": "the state at the end: --resume goes on from here",
    "thermo.png": "temperature and energy against time",
}


@dataclass(frozen=True)
class MDConfig:
    """Molecular dynamics of all frames of the start files, side by side."""

    start: Positional[tuple[Path, ...]]
    """Start structures; none with a built-in potential: its own structure."""
    model: str
    """A packed file, checkpoint, source file or built-in name (lj-argon, sutton-chen, water)."""
    ensemble: Literal["nvt", "nve", "npt", "nph"] = "nvt"
    """What is held: volume and temperature, energy, pressure and temperature, or pressure and enthalpy."""
    thermostat: Literal["langevin", "nose_hoover", "velocity_rescaling"] | None = None
    """Of nvt; None: langevin. With npt the barostat brings its own."""
    barostat: Literal["stochastic_cell_rescaling", "mtk"] | None = None
    """Of npt; None: stochastic_cell_rescaling. nph is mtk's."""
    cell_mode: Literal["isotropic", "anisotropic", "triclinic"] = "isotropic"
    """What the barostat may change."""
    temperature: str = "300"
    """K, of the thermostat, and of velocities that a start lacks. 300:600 goes from 300 to 600 over the run."""
    pressure: str = "0"
    """GPa; a schedule as for the temperature."""
    timestep: float = 0.5
    """fs."""
    n_steps: int = 1000
    """Steps, those before a restart too."""
    friction: float = 1.0
    """Of the Langevin thermostat, 1/ps."""
    tau: float = 100.0
    """Of the other thermostats, fs."""
    barostat_tau: float = 1000.0
    """Of the barostat, fs."""
    compressibility: float | None = None
    """Of the material, 1/GPa, for stochastic_cell_rescaling; None: water's."""
    constraints: tuple[Literal["fix_symmetry", "fix_center_of_mass"], ...] = ()
    """What stays as it is, beside atoms that a file holds fixed."""
    max_atoms_per_batch: int | None = None
    """Atoms that run at once, further ones after them; None: as many as fit into memory."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("md")
    """Folder for the results."""
    log_interval: int = 10
    """Steps between rows of the log."""
    trajectory_interval: int = 100
    """Steps between frames of the trajectory."""
    checkpoint_interval: int = 200
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the checkpoint in the folder."""
    seed: int = 0
    """Of velocities and noise."""
    device: str = "cpu"
    """Where to run."""
    ranks: int | None = None
    """Processes that share the atoms of one large structure; they are started by torchrun, unless it started this one."""
    rebuild: bool = False
    """Compile a .pt2 that does not fit this machine from its source, once, into the cache."""


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = parse(MDConfig, "md", argv)
    if config.ranks is not None:
        return run_over_ranks(config, argv)
    refuse_torchrun()
    return run_here(config)


def run_here(config: MDConfig) -> int:
    """All structures in this process."""
    structures, potential = inputs(config)
    announce(config, structures, potential)
    from carryall.dynamics import md

    result = md(structures, potential, max_atoms_per_batch=config.max_atoms_per_batch, **arguments(config))
    return finish(config, structures, result)


def run_over_ranks(config: MDConfig, argv: Sequence[str]) -> int:
    """One structure over ranks: this process is one of them, or becomes torchrun, which starts them."""
    from carryall.engines.domain import joined, md, ranks_of_torchrun

    count, started = config.ranks, ranks_of_torchrun()
    assert count is not None
    if count < 1:
        raise InputError(f"ranks must be at least 1, got {count}")
    if started == 1 and count > 1:
        become_torchrun(count, ["md", *argv])
    if started != count:
        raise InputError(f"torchrun started {started} processes for --ranks {count}: give the same number to both")
    structures, potential = inputs(config)
    if len(structures) != 1:
        raise InputError(
            f"--ranks is for one structure, {len(structures)} were given: leave it out, they run side by side then"
        )
    with joined() as transport:
        if transport.rank == 0:
            announce(config, structures, potential)
        result = md(structures[0], potential, transport, **arguments(config))
        return 0 if result is None else finish(config, structures, result)


def become_torchrun(count: int, arguments: Sequence[str]) -> NoReturn:
    """Go on as torchrun, which starts `count` processes of this command, with the processors shared among them."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "carryall"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, *arguments])


def refuse_torchrun() -> None:
    """InputError where torchrun started several processes that would all write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError(f"torchrun started {os.environ['WORLD_SIZE']} processes: give --ranks {os.environ['WORLD_SIZE']}")


def inputs(config: MDConfig) -> tuple[list[AtomicData], Potential]:
    """Structures and potential, checked against each other and against the folder."""
    structures = read_files(config.start) if config.start else built_in_start(config.model)
    potential = load_potential(config.model, config.device, config.rebuild)
    check_against(potential, structures, str(config.start[0]) if len(config.start) == 1 else "start")
    if any(config.out.glob("checkpoint*.pt")) and not config.resume:
        raise InputError(f"{config.out} holds a run already: go on with --resume, or write elsewhere with -o")
    return structures, potential


def announce(config: MDConfig, structures: Sequence[AtomicData], potential: Potential) -> None:
    """Print what is going to be done, and make the folder."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    start = [str(path) for path in config.start] or "built in"
    show_settings({**settings, "start": start, "dtype": potential.spec.dtype, "cutoff": f"{potential.spec.cutoff:g} Å"})
    show_data({"start": structures})
    show_files(config.out, FILES)
    config.out.mkdir(parents=True, exist_ok=True)


def arguments(config: MDConfig) -> dict[str, Any]:
    """Of `md`, over ranks and without."""
    same = ("ensemble", "timestep", "n_steps", "thermostat", "barostat", "cell_mode", "friction", "tau", "barostat_tau")
    further = ("compressibility", "seed", "log_interval", "trajectory_interval", "checkpoint_interval", "resume")
    return {
        **{name: getattr(config, name) for name in (*same, *further)},
        "temperature": schedule("temperature", config.temperature, config.n_steps),
        "pressure": schedule("pressure", config.pressure, config.n_steps),
        "constraints": made_constraints(config.constraints, relaxing=False),
        "log": config.out / "log.csv",
        "trajectory": config.out / "trajectory.extxyz",
        "checkpoint": config.out / "checkpoint.pt",
    }


def finish(config: MDConfig, structures: Sequence[AtomicData], result: MDResult) -> int:
    """The last structures, the picture, and the table; the exit code."""
    from carryall.data import write_structures

    write_structures(config.out / "final.extxyz", [one for one in result.structures if one is not None])
    for k, log in enumerate(result.logs):
        plot(log, config.out / ("thermo.png" if len(result.logs) == 1 else f"thermo-{k}.png"), config, structures)
    return show_outcome(result, config.out)


def schedule(name: str, text: str, n_steps: int) -> Setting:
    """A number, or a `Ramp` over the run from numbers with colons between them."""
    from carryall.dynamics.parameters import Ramp

    try:
        numbers = [float(word) for word in text.split(":")]
    except ValueError:
        raise InputError(f"{name} must be a number, or numbers with colons between them as in 300:600, got {text!r}") from None
    if len(numbers) == 1 or n_steps < len(numbers) - 1:
        return numbers[0]
    return Ramp([round(i * n_steps / (len(numbers) - 1)) for i in range(len(numbers))], numbers)


def plot(log_file: Path, picture: Path, config: MDConfig, structures: Sequence[AtomicData]) -> None:
    """Temperature and energy of a batch, where matplotlib is present and there is something to see."""
    from carryall.dynamics import read_csv_log
    from carryall.properties.timeseries import by_system

    log = read_csv_log(log_file)
    if len(set(log["step"].tolist())) < 2:
        return
    time, temperature = by_system(log, "temperature")
    _, energy = by_system(log, "potential_energy")
    atoms = [structures[int(index)].n_atoms for index in sorted(set(log["system_id"].tolist()))]
    held = config.ensemble in ("nvt", "npt") and ":" not in config.temperature
    target = float(config.temperature) if held else None
    try:
        from carryall.properties.plots import plot_thermo

        plot_thermo(time, temperature, energy / atoms, picture, target=target, title=config.ensemble.upper())
    except MissingDependencyError as missing:
        notify(f"no {picture.name}: {missing}")


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
