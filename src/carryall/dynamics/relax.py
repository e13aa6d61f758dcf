"""Relaxation of one structure or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from carryall.data.atomic_data import AtomicData
from carryall.dynamics.convergence import DEFAULT_FMAX, ConvergenceHook
from carryall.dynamics.optimizers.fire import FIRE
from carryall.dynamics.status import OUTCOME, REASON, Outcome
from carryall.dynamics.structures import (
    Input,
    Structures,
    check_errors_argument,
    check_inputs,
    checked_input,
    chunks,
    finished_structure,
    structure_list,
    working_batch,
)
from carryall.dynamics.thermo import max_force
from carryall.errors import InputError
from carryall.graph.potential import Potential

OUTCOMES = {
    Outcome.RUNNING: "step_budget",
    Outcome.CONVERGED: "converged",
    Outcome.STEP_BUDGET: "step_budget",
    Outcome.FAILED: "failed",
}
"""How results call what became of a system; one that still runs when its run ends has used up its steps."""


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
    """Largest force, eV/Å; None when the structure failed."""
    structure: AtomicData | None
    """The structure with its last positions, energy and forces; None when the input could not even be read."""


def relax(
    structures: Structures,
    potential: Potential,
    fmax: float = DEFAULT_FMAX,
    max_steps: int = 500,
    *,
    max_atoms_per_batch: int = 4000,
    errors: str = "raise",
    hooks: Iterable[Any] = (),
    skin: float = 0.5,
    on_batch: Callable[[list[RelaxResult]], None] | None = None,
) -> list[RelaxResult]:
    """Relax atoms at fixed cell with FIRE until no force exceeds `fmax` (eV/Å), at most `max_steps` steps.

    structures: AtomicData, ase.Atoms, a Batch, or several; results are in their order. They are worked on in batches of at
    most `max_atoms_per_batch` atoms, each system stopping where it converges. A structure that cannot be worked on (an
    unknown element, positions that are not finite, coincident atoms, a cell without volume) is an InputError with its index
    before any work with errors="raise", and an outcome "failed" with errors="set_aside". A system that fails under way never
    stops the others. hooks: for every batch's run. skin: Å, of the neighbour list. on_batch: called with the results of each
    batch as it is done.
    """
    check_errors_argument(errors)
    if not fmax > 0:
        raise InputError(f"fmax must be positive, got {fmax}")
    if isinstance(max_atoms_per_batch, bool) or not isinstance(max_atoms_per_batch, int) or max_atoms_per_batch < 1:
        raise InputError(f"max_atoms_per_batch must be a positive integer, got {max_atoms_per_batch!r}")
    given, hooks = structure_list(structures), list(hooks)
    if errors == "raise":
        check_inputs(given, potential)
    results: list[RelaxResult] = []
    for chunk in chunks((checked_input(i, one, potential) for i, one in enumerate(given)), max_atoms_per_batch):
        optimizer = FIRE(potential, hooks=hooks, convergence_hook=ConvergenceHook.from_fmax(fmax), n_steps=max_steps, skin=skin)
        found = [_unusable(one) for one in chunk if one.reason is not None]
        found += _relax_batch([one for one in chunk if one.reason is None], optimizer)
        found.sort(key=lambda result: result.index)
        results += found
        if on_batch is not None:
            on_batch(found)
    return results


def _relax_batch(inputs: Sequence[Input], optimizer: FIRE) -> list[RelaxResult]:
    if not inputs:
        return []
    batch = optimizer.run(working_batch(inputs))
    steps, outcomes = optimizer.steps(batch).tolist(), batch.get(OUTCOME).tolist()
    energies, forces = batch.energy.tolist(), max_force(batch).tolist()
    results = []
    for i, one in enumerate(inputs):
        failed = outcomes[i] == Outcome.FAILED
        assert one.data is not None
        results.append(
            RelaxResult(
                index=one.index,
                outcome=OUTCOMES[Outcome(outcomes[i])],
                reason=batch.info[i].get(REASON) if failed else None,
                steps=steps[i],
                energy=None if failed else energies[i],
                fmax=None if failed else forces[i],
                structure=finished_structure(one.data, batch, i),
            )
        )
    return results


def _unusable(one: Input) -> RelaxResult:
    return RelaxResult(one.index, "failed", one.reason, 0, None, None, one.data)
