"""Relaxation of one structure or many: in flight, restartable, every input accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from carryall.data.atomic_data import AtomicData
from carryall.dynamics import optimizers
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.convergence import DEFAULT_FMAX, ConvergenceHook
from carryall.dynamics.hooks.checkpoint import plain
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.inputs import InputStream
from carryall.dynamics.ledger import Ledger, LedgerResults
from carryall.dynamics.memory import CPU_ATOMS, BatchLimits, automatic_limits
from carryall.dynamics.parameters import PerSystem
from carryall.dynamics.results import RelaxResult as RelaxResult
from carryall.dynamics.results import export
from carryall.dynamics.screening import MemoryStore, ResultSink, Screening, StateSaver, Store, TakenUp
from carryall.dynamics.structures import (
    Check,
    Input,
    Structures,
    check_errors_argument,
    check_structure,
    checked_input,
    each,
    first_index_of,
    structure_iterable,
)
from carryall.errors import InputError, nearest
from carryall.graph.neighbor_search import graph_from_structures
from carryall.graph.potential import Potential
from carryall.interrupt import stop_between_steps
from carryall.progress import progress_bar

OPTIMIZERS = {"fire": "FIRE", "lbfgs": "LBFGS", "gradient_descent": "GradientDescent"}
FIRST = 64
"""Inputs that are looked at before work starts: they tell what a batch may hold, and which potential this is."""
SAME_ENERGY = 1e-5
"""Relative difference of energies beyond which two potentials are not the same one."""


def relax(
    structures: Structures,
    potential: Potential,
    fmax: float = DEFAULT_FMAX,
    max_steps: int = 500,
    *,
    optimizer: str = "fire",
    cell_filter: str | None = None,
    pressure: PerSystem = 0.0,
    cell_mask: Any = None,
    hydrostatic_strain: bool = False,
    constant_volume: bool = False,
    constraints: Sequence[Any] = (),
    max_atoms_per_batch: int | None = None,
    max_edges_per_batch: int | None = None,
    errors: str = "raise",
    hooks: Iterable[Any] = (),
    skin: float = 0.5,
    refill_frequency: int = 5,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 10.0,
    progress: bool = True,
    on_result: Callable[[RelaxResult], None] | None = None,
) -> Sequence[RelaxResult]:
    """Relax structures until no force exceeds `fmax` (eV/Å), each at most `max_steps` steps; results are in input order.

    structures: AtomicData, ase.Atoms, a Batch, or any iterable of them; a generator is read only as far as it is needed.
    Systems are worked on in flight: one that is done leaves the batch, and the next that fits enters. The result of a
    structure does not depend on the others.

    optimizer: "fire", "lbfgs" or "gradient_descent". cell_filter: None for a fixed cell, "unit_cell" or "frechet" to relax
    the cell too, to `pressure` (GPa, one or one for each structure); cell_mask, hydrostatic_strain, constant_volume: see
    `OptimizerOptions`. constraints: such as `FixAtoms`.
    max_atoms_per_batch, max_edges_per_batch: None measures what memory allows and speed asks for. A larger structure is run
    alone at the end, where it is predicted to fit. errors: a structure that cannot be worked on is an InputError with its
    index, before any work where the structures have a length ("raise"), or an outcome "failed" ("set_aside"). A system that
    fails under way never stops the others. hooks: see `Hook`. skin: Å, of the neighbour list. refill_frequency: steps between
    looks for finished systems.

    out: folder for a ledger of all results, relaxed.extxyz and results.csv; memory stays bounded then, and what is returned
    reads from the ledger. resume: go on with the run in that folder, however it ended; settings and inputs have to be the
    same. The batch on its way is saved every `checkpoint_seconds`, or less often where that would cost more than 3 % of the
    time. progress: a bar at a terminal. on_result: called with each result as it comes.
    """
    check_errors_argument(errors)
    _check_numbers(fmax, max_atoms_per_batch, max_edges_per_batch, checkpoint_seconds)
    if resume and out is None:
        raise InputError("resume=True needs out=, the folder of the run")
    cell = {
        "cell_filter": cell_filter,
        "pressure": pressure,
        "cell_mask": cell_mask,
        "hydrostatic_strain": hydrostatic_strain,
        "constant_volume": constant_volume,
    }
    make = partial(_optimizer, optimizer, potential, fmax, n_steps=max_steps, skin=skin, constraints=tuple(constraints), **cell)
    # a probe has no constraints (they may know systems by their ids), no list of pressures, and never converges
    plan = _Plan(
        make,
        partial(_optimizer, optimizer, potential, -1.0, n_steps=max_steps, skin=skin, **{**cell, "pressure": 0.0}),
        potential,
        structure_iterable(structures),
        (max_atoms_per_batch, max_edges_per_batch),
        errors,
        list(hooks),
        refill_frequency,
        checkpoint_seconds,
        progress,
        on_result,
    )
    settings = {"optimizer": optimizer, "fmax": fmax, "max_steps": max_steps, **_facts(make(), potential)}
    if out is None:
        memory = MemoryStore()
        _work(plan, memory, None)
        return memory.results()
    with Ledger(out, settings, resume) as ledger, stop_between_steps() as requested:
        n_inputs = _work(plan, ledger, requested)
        _close(ledger, n_inputs)
    return LedgerResults(out)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What `relax` was asked for."""

    make: Callable[..., BaseDynamics]
    probe: Callable[[], BaseDynamics]
    """Makes what memory and time are measured with."""
    potential: Potential
    structures: Any
    limits: tuple[int | None, int | None]
    errors: str
    hooks: list[Any]
    refill_frequency: int
    checkpoint_seconds: float
    progress: bool
    on_result: Callable[[RelaxResult], None] | None


def _work(plan: _Plan, store: Store, requested: Callable[[], bool] | None) -> int:
    """Bring every input to its result; returns their number. requested: says whether to stop; None for a run without ledger."""
    state = store.in_flight()
    taken_up = TakenUp(store, state)
    check = partial(_check_input, plan.potential, plan.make().constraints)
    stream = InputStream(plan.structures, check, taken_up)
    if state is not None:
        for index, original in state.originals.items():
            stream.take_up(index, original, state.hashes[index])
    first = stream.peek(FIRST)
    if isinstance(store, Ledger):
        _check_potential(store, plan.potential, first)
    if not first and not len(store):
        raise InputError("no structures: give at least one")
    samples = [one.data for one in first if one.data is not None and one.reason is None]
    limits = _limits(plan, samples, sum(one.n_atoms for one in samples) if len(first) < FIRST else None)
    refusal = _refusal(plan, samples, limits)
    sized = hasattr(plan.structures, "__len__")
    if plan.errors == "raise" and sized:
        _check_all(plan, check, taken_up, limits, refusal)
        stream.trust()
    total = len(plan.structures) if plan.progress and sized else None
    with progress_bar("structures", total, len(store)) if plan.progress else nullcontext() as advance:

        def tell(result: RelaxResult) -> None:
            if advance is not None:
                advance(1, None)
            if plan.on_result is not None:
                plan.on_result(result)

        sink = ResultSink(store, stream, plan.make().key("steps"), tell)
        saver = [] if requested is None else [StateSaver(store, stream, plan.checkpoint_seconds, requested)]
        hooks = [*plan.hooks, *saver]
        Screening(plan.make, stream, sink, taken_up, limits, refusal, plan.errors, hooks, plan.refill_frequency).run(state)
    return stream.n_read


def _check_input(potential: Potential, constraints: Sequence[Any], data: AtomicData) -> None:
    """InputError for a structure that the potential or a constraint cannot work on."""
    check_structure(data, potential)
    if constraints:
        batch = moving_batch([data], [0])
        for one in constraints:
            one.check(batch)


def _check_all(
    plan: _Plan, check: Check, taken_up: TakenUp, limits: BatchLimits, refusal: Callable[[AtomicData], str | None]
) -> None:
    """InputError with the index of the first structure that cannot be worked on."""
    for index, structure in enumerate(each(plan.structures), first_index_of(plan.structures)):
        if index in taken_up:
            continue
        one = checked_input(index, structure, check)
        reason = one.reason
        if reason is None and one.data is not None and one.data.n_atoms > limits.max_atoms:
            reason = refusal(one.data)
        if reason is not None:
            raise InputError(f"structure {index}: {reason}")


def _limits(plan: _Plan, samples: Sequence[AtomicData], whole: int | None) -> BatchLimits:
    """What a batch may hold: as asked for, else as measured."""
    atoms, edges = plan.limits
    if atoms is not None:
        return BatchLimits(atoms, edges)
    found = automatic_limits(plan.probe, samples, whole=whole)
    return found if edges is None else replace(found, max_edges=edges)


def _refusal(plan: _Plan, samples: Sequence[AtomicData], limits: BatchLimits) -> Callable[[AtomicData], str | None]:
    """Says why a structure that exceeds the limits cannot be run alone either; measures memory when it has to."""
    cutoff = plan.potential.spec.cutoff
    known = limits if plan.limits[0] is None else None

    def refusal(data: AtomicData) -> str | None:
        nonlocal known
        if data.n_atoms <= CPU_ATOMS[0]:
            return None
        if known is None:
            known = automatic_limits(plan.probe, samples)
        return known.refusal(data, cutoff)

    return refusal


def _check_potential(ledger: Ledger, potential: Potential, first: Sequence[Input]) -> None:
    """InputError when the potential gives another energy than at the beginning of the run."""
    known = ledger.fact("potential")
    if known is None:
        one = next((one for one in first if one.data is not None and one.reason is None), None)
        if one is not None and one.data is not None:
            ledger.set_fact("potential", {"input": one.index, "energy": energy_of(potential, one.data)})
        return
    data = next((one.data for one in first if one.index == known["input"]), None)
    if data is None:
        return
    energy = energy_of(potential, data)
    if abs(energy - known["energy"]) > SAME_ENERGY * max(1.0, abs(known["energy"])):
        raise InputError(
            f"{ledger.path.parent} was begun with another potential: the energy of input {known['input']} was "
            f"{known['energy']:.8g} eV, and is {energy:.8g} eV with this one; give the same, or write elsewhere"
        )


def energy_of(potential: Potential, data: AtomicData) -> float:
    """eV, of one structure."""
    graph = graph_from_structures([data], potential.spec.cutoff, potential.spec.type_map)
    return float(potential(graph)["energy"].detach()[0])


def _close(ledger: Ledger, n_inputs: int) -> None:
    """Write the two files, once all inputs that there ever were are done."""
    if n_inputs < len(ledger):
        raise InputError(
            f"{ledger.path.parent} has results of {len(ledger)} inputs, {n_inputs} are given: "
            "give the same inputs in the same order, or write elsewhere"
        )
    ledger.clear_in_flight()
    ledger.set_fact("n_inputs", n_inputs)
    export(ledger.path.parent, ledger.results())


def _optimizer(name: str, potential: Potential, fmax: float, **options: Any) -> BaseDynamics:
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}{nearest(str(name), OPTIMIZERS)}")
    kind: Callable[..., BaseDynamics] = getattr(optimizers, OPTIMIZERS[name])
    return kind(potential, convergence_hook=ConvergenceHook.from_fmax(fmax), **options)


def _facts(dynamics: BaseDynamics, potential: Potential) -> dict[str, Any]:
    """What else has to be the same when a run is resumed."""
    spec = potential.spec
    return {
        "optimizer_settings": plain(dynamics.describe()),
        "constraints": [_described(one) for one in dynamics.constraints],
        "cutoff": spec.cutoff,
        "type_map": list(spec.type_map),
        "dtype": spec.dtype,
    }


def _described(constraint: Any) -> dict[str, Any]:
    """Kind and settings of a constraint, in words that are the same in another process."""
    values = {name: value for name, value in vars(constraint).items() if not name.startswith("_")}
    words = {name: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for name, value in values.items()}
    return {"kind": type(constraint).__name__, **words}


def _check_numbers(fmax: float, max_atoms: int | None, max_edges: int | None, seconds: float) -> None:
    if not fmax > 0:
        raise InputError(f"fmax must be positive, got {fmax}")
    for name, value in (("max_atoms_per_batch", max_atoms), ("max_edges_per_batch", max_edges)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} must be a positive integer or None, got {value!r}")
    if not seconds >= 0:
        raise InputError(f"checkpoint_seconds must be 0 or more, got {seconds}")
