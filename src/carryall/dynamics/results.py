"""What became of each structure of a relaxation, and the two files that tell it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from carryall.data.atomic_data import AtomicData
from carryall.data.extxyz import format_frame
from carryall.dynamics.status import Outcome
from carryall.errors import InputError

OUTCOMES = {
    Outcome.RUNNING: "step_budget",
    Outcome.CONVERGED: "converged",
    Outcome.STEP_BUDGET: "step_budget",
    Outcome.FAILED: "failed",
}
"""How results call what became of a system; one that still runs when its run ends has used up its steps."""
RELAXED, FINISHED_STRUCTURES, RESULTS = "relaxed.extxyz", "finished.extxyz", "results.csv"
COLUMNS = {
    "index": "1",
    "input": "1",
    "frame": "1",
    "outcome": "1",
    "steps": "1",
    "energy": "eV",
    "fmax": "eV/angstrom",
    "reason": "1",
}
"""Columns of results.csv and their units."""


@dataclass(frozen=True, eq=False)
class RelaxResult:
    """What became of one structure."""

    index: int
    """Place of the structure in the input."""
    outcome: str
    """"converged", "step_budget" or "failed"."""
    reason: str | None
    """Why it failed."""
    steps: int
    """Steps taken."""
    energy: float | None
    """eV; None when the structure failed."""
    fmax: float | None
    """Largest force, eV/Å, of the cell too where that moves; None when the structure failed."""
    structure: AtomicData | None
    """The structure with its last positions and cell, energy, forces and stress; None when the input could not even be read."""
    source: str | None = None
    """File that it came from, where that is known."""
    frame: int | None = None
    """Place in that file."""


def export(folder: Path, results: Iterable[RelaxResult], name: str = RELAXED) -> None:
    """Structures that did not fail in the file `name`, and results.csv with all, in the order of the results; each appears when
    complete."""
    with complete_file(folder / name) as frames, complete_file(folder / RESULTS) as table:
        rows = csv.writer(table, lineterminator="\n")
        rows.writerows([list(COLUMNS), list(COLUMNS.values())])
        for one in results:
            rows.writerow(_row(one))
            if one.energy is not None and one.structure is not None and one.structure.n_atoms:
                frames.write(_frame(one))
    if not (folder / name).stat().st_size:
        (folder / name).unlink()


def _row(one: RelaxResult) -> list[object]:
    frame = "" if one.frame is None else one.frame
    numbers = [f"{value:{form}}" if value is not None else "" for value, form in ((one.energy, ".10g"), (one.fmax, ".6g"))]
    return [one.index, one.source or "", frame, one.outcome, one.steps, *numbers, one.reason or ""]


def _frame(one: RelaxResult) -> str:
    """Text of the structure, with what tells where it came from."""
    assert one.structure is not None
    facts = {"source": one.source, "frame": one.frame, "index": one.index, "outcome": one.outcome}
    known = {name: value for name, value in facts.items() if value is not None}
    try:
        return format_frame(one.structure.replace(info={**one.structure.info, **known}))
    except InputError:  # a name in info or extras that the format has no place for: the result is not lost for that
        return format_frame(one.structure.replace(info=known, atom_extras={}, system_extras={}))


@contextmanager
def complete_file(path: Path) -> Iterator[IO[str]]:
    """A file that gets its name when all is written."""
    # one process at a time works in the folder: a part that a kill left behind is written over
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as stream:
            yield stream
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
