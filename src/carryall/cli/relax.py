"""`carryall relax`: any number of structures, relaxed in batches; a failing one never stops the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_data, show_files, show_settings, show_table
from carryall.cli.inputs import load_potential, notify
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.data import AtomicData
    from carryall.dynamics import RelaxResult
    from carryall.graph import Potential

FILES = {
    "relaxed.extxyz": "structures that finished, with energy and forces; source and frame in the comment",
    "results.csv": "outcome, steps, energy, largest force and reason of every input, in input order",
}
COLUMNS = {"input": "1", "frame": "1", "outcome": "1", "steps": "1", "energy": "eV", "fmax": "eV/angstrom", "reason": "1"}


@dataclass(frozen=True)
class RelaxConfig:
    """Relax atoms at fixed cell with FIRE, many structures in one batch."""

    files: Positional[tuple[Path, ...]]
    """Structures: any number of files, every frame of each."""
    model: str
    """A packed file, checkpoint, source file or built-in name (lj-argon, sutton-chen, water)."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("relaxed")
    """Folder for the results."""
    fmax: float = 0.05
    """Largest force that counts as relaxed, eV/Å."""
    max_steps: int = 500
    """Steps after which a structure is left as it is."""
    max_atoms_per_batch: int = 4000
    """Atoms that are worked on at once."""
    device: str = "cpu"
    """Where to run."""
    rebuild: bool = False
    """Compile a .pt2 that does not fit this machine from its source, once, into the cache."""


@dataclass(frozen=True)
class Row:
    """One input: a frame of a file, or a file that cannot be read."""

    path: Path
    frame: int | None
    structure: AtomicData | None
    reason: str | None = None


def run(argv: Sequence[str]) -> int:
    """The verb; exit code 0 when at least one structure finished."""
    config = parse(RelaxConfig, "relax", argv)
    if not config.files:
        raise InputError("no structures: give at least one file, as in carryall relax *.cif --model model.pt2")
    potential = load_potential(config.model, config.device, config.rebuild)
    rows = read_rows(config.files, potential)
    usable = [row for row in rows if row.reason is None and row.structure is not None]
    if not usable:
        raise InputError(
            rows[0].reason if len(rows) == 1 else f"none of {len(rows)} inputs can be used; the first: {rows[0].reason}"
        )
    show_settings({key: _text(value) for key, value in vars(config).items()} | {"dtype": potential.spec.dtype})
    show_data({"usable": [row.structure for row in usable if row.structure is not None]})
    for row in rows:
        if row.reason is not None:
            notify(f"set aside: {row.reason}")
    show_files(config.out, FILES)
    found = dict(zip([id(row) for row in usable], relax_rows(usable, potential, config), strict=True))
    results = [found.get(id(row)) for row in rows]
    write_results(config.out, rows, results)
    return show_outcome(rows, results, config.out)


def read_rows(files: Sequence[Path], potential: Potential) -> list[Row]:
    """Every frame of every file, with the reason where it cannot be used."""
    from carryall.cli.inputs import problem_of
    from carryall.data import read_structures

    rows: list[Row] = []
    for path in files:
        try:
            structures = read_structures(path)
        except InputError as error:
            rows.append(Row(path, None, None, " ".join(str(error).split())))
            continue
        for frame, one in enumerate(structures):
            problem = problem_of(potential, one)
            rows.append(Row(path, frame, one, None if problem is None else f"{path}: frame {frame}: {problem}"))
    return rows


def relax_rows(rows: Sequence[Row], potential: Potential, config: RelaxConfig) -> list[RelaxResult]:
    """Results in the order of the rows."""
    from carryall.dynamics import relax
    from carryall.progress import progress_bar

    with progress_bar("structures", len(rows)) as advance:
        return relax(
            [row.structure for row in rows if row.structure is not None],
            potential,
            config.fmax,
            config.max_steps,
            max_atoms_per_batch=config.max_atoms_per_batch,
            errors="set_aside",
            on_batch=lambda done: advance(len(done), None),
        )


def write_results(out: Path, rows: Sequence[Row], results: Sequence[RelaxResult | None]) -> None:
    """relaxed.extxyz and results.csv."""
    from carryall.data import write_structures
    from carryall.properties.errors_table import write_csv

    out.mkdir(parents=True, exist_ok=True)
    lines: list[list[object]] = []
    finished: list[AtomicData] = []
    for row, result in zip(rows, results, strict=True):
        frame = "" if row.frame is None else row.frame
        if result is None or result.energy is None or result.fmax is None or result.structure is None:
            reason = row.reason if result is None else result.reason
            lines.append([row.path, frame, "failed", 0 if result is None else result.steps, "", "", reason])
            continue
        lines.append([row.path, frame, result.outcome, result.steps, f"{result.energy:.10g}", f"{result.fmax:.6g}", ""])
        facts = {"source": str(row.path), "frame": row.frame, "outcome": result.outcome}
        finished.append(result.structure.replace(info={**result.structure.info, **facts}))
    if finished:
        write_structures(out / "relaxed.extxyz", finished)
    write_csv(out / "results.csv", list(COLUMNS), list(COLUMNS.values()), lines)


def show_outcome(rows: Sequence[Row], results: Sequence[RelaxResult | None], out: Path) -> int:
    """Counts by outcome; the exit code."""
    outcomes = ["failed" if result is None else result.outcome for result in results]
    counts = {name: outcomes.count(name) for name in ("converged", "step_budget", "failed")}
    show_table(("outcome", "structures"), [(name, str(count)) for name, count in counts.items() if count])
    if counts["failed"] == len(rows):
        first = next(result.reason for result in results if result is not None)
        raise InputError(f"none of {len(rows)} structures finished; the first: {first} (all reasons in {out / 'results.csv'})")
    console().print(f"written to {out}/")
    return 0


def _text(value: object) -> object:
    return [str(one) for one in value] if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
