"""`carryall relax`: any number of structures, relaxed in flight; a failing one never stops the others, a kill loses none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_data, show_files, show_settings, show_table
from carryall.cli.inputs import FrameStream, load_potential, made_constraints, notify, problem_of
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics import RelaxResult
    from carryall.dynamics.structures import Sourced
    from carryall.graph import Potential

FIRST = 64
"""Inputs that are looked at, and shown, before work starts."""
NOTED = 20
"""Failures that are told one by one; all of them are in results.csv."""
FILES = {
    "relaxed.extxyz": "structures that finished, with energy and forces; source, frame and outcome in the comment",
    "results.csv": "outcome, steps, energy, largest force and reason of every input, in input order",
    "ledger.sqlite": "all of it as it comes, and the batch on its way: --resume goes on from here",
}


@dataclass(frozen=True)
class RelaxConfig:
    """Relax structures, any number of them, in batches; a run that was killed goes on with --resume."""

    files: Positional[tuple[Path, ...]]
    """Structures: any number of files, every frame of each; read one after the other, as they are needed."""
    model: str
    """A packed file, checkpoint, source file or built-in name (lj-argon, sutton-chen, water)."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("relaxed")
    """Folder for the results."""
    fmax: float = 0.05
    """Largest force that counts as relaxed, eV/Å."""
    max_steps: int = 500
    """Steps after which a structure is left as it is."""
    optimizer: Literal["fire", "lbfgs", "gradient_descent"] = "fire"
    """How to go downhill."""
    cell_filter: Literal["unit_cell", "frechet"] | None = None
    """Relax the cell too, in these coordinates; None keeps it fixed."""
    pressure: float = 0.0
    """That the cell relaxes to, GPa."""
    cell_mask: tuple[bool, bool, bool, bool, bool, bool] | None = None
    """Which strains are free: xx yy zz yz xz xy."""
    hydrostatic_strain: bool = False
    """The cell keeps its shape."""
    constant_volume: bool = False
    """The cell keeps its volume."""
    constraints: tuple[Literal["fix_symmetry", "fix_center_of_mass"], ...] = ()
    """What stays as it is, beside atoms that a file holds fixed."""
    max_atoms_per_batch: int | None = None
    """Atoms that are worked on at once; None: as many as pay and fit into memory."""
    max_edges_per_batch: int | None = None
    """Neighbour pairs that are worked on at once."""
    resume: bool = False
    """Go on with the run in the folder."""
    checkpoint_seconds: float = 10.0
    """Between two times that the batch on its way is saved; longer where that would take more than 3 % of the time."""
    device: str = "cpu"
    """Where to run."""
    rebuild: bool = False
    """Compile a .pt2 that does not fit this machine from its source, once, into the cache."""


def run(argv: Sequence[str]) -> int:
    """The verb; exit code 0 when at least one structure finished."""
    config = parse(RelaxConfig, "relax", argv)
    from carryall.dynamics.ledger import holds_run

    if not config.files:
        raise InputError("no structures: give at least one file, as in carryall relax *.cif --model model.pt2")
    if not config.resume and holds_run(config.out):
        raise InputError(f"{config.out} holds a run already: go on with --resume, or write elsewhere with -o")
    potential = load_potential(config.model, config.device, config.rebuild)
    structures = FrameStream(config.files)
    first = list(islice(structures, FIRST + 1))
    _check_first(first, potential)
    show_settings({key: _text(value) for key, value in vars(config).items()} | {"dtype": potential.spec.dtype})
    shown = [one.data for one in first[:FIRST] if one.data is not None]
    if shown:
        show_data({f"first {len(shown)}" if len(first) > FIRST else "readable": shown})
    show_files(config.out, FILES)
    results = _relaxed(config, potential, structures)
    return show_outcome(results, config.out)


def _check_first(first: Sequence[Sourced], potential: Potential) -> None:
    """InputError when there are few inputs, and none of them can be worked on."""
    if len(first) > FIRST:
        return
    reasons = []
    for one in first:
        problem = one.reason if one.data is None else problem_of(potential, one.data)
        if problem is None:
            return
        reasons.append(problem if one.data is None else f"{one.source}: frame {one.frame}: {problem}")
    raise InputError(reasons[0] if len(reasons) == 1 else f"none of {len(reasons)} inputs can be used; the first: {reasons[0]}")


def _relaxed(config: RelaxConfig, potential: Potential, structures: FrameStream) -> Sequence[RelaxResult]:
    from carryall.dynamics import relax

    failures = 0

    def tell(result: RelaxResult) -> None:
        nonlocal failures
        if result.outcome == "failed":
            failures += 1
            if failures <= NOTED:
                notify(f"set aside: {_where(result)}{result.reason}")
            elif failures == NOTED + 1:
                notify(f"more are set aside: all reasons will be in {config.out / 'results.csv'}")

    return relax(
        structures,
        potential,
        config.fmax,
        config.max_steps,
        optimizer=config.optimizer,
        cell_filter=config.cell_filter,
        pressure=config.pressure,
        cell_mask=config.cell_mask,
        hydrostatic_strain=config.hydrostatic_strain,
        constant_volume=config.constant_volume,
        constraints=made_constraints(config.constraints, relaxing=True),
        max_atoms_per_batch=config.max_atoms_per_batch,
        max_edges_per_batch=config.max_edges_per_batch,
        errors="set_aside",
        out=config.out,
        resume=config.resume,
        checkpoint_seconds=config.checkpoint_seconds,
        # to know how much is left, all files are looked through: only for somebody who sees it
        progress=sys.stderr.isatty(),
        on_result=tell,
    )


def show_outcome(results: Sequence[RelaxResult], out: Path) -> int:
    """Counts by outcome; the exit code."""
    from carryall.dynamics.ledger import LedgerResults

    counts = LedgerResults(out).outcomes()
    names = ("converged", "step_budget", "failed")
    show_table(("outcome", "structures"), [(name, str(counts[name])) for name in names if name in counts])
    if counts.get("failed") == len(results):
        first = results[0].reason
        raise InputError(
            f"none of {len(results)} structures finished; the first: {first} (all reasons in {out / 'results.csv'})"
        )
    console().print(f"written to {out}/")
    return 0


def _where(result: RelaxResult) -> str:
    if result.source is None or result.frame is None or str(result.reason).startswith(result.source):
        return ""
    return f"{result.source}: frame {result.frame}: "


def _text(value: object) -> object:
    return [str(one) for one in value] if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
