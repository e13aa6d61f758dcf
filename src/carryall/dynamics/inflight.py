"""In flight: finished systems leave to the sinks, systems that fit what they leave free enter, until a sampler is exhausted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from carryall.data.atomic_data import AtomicData, unchecked
from carryall.data.batch import Batch
from carryall.data.extra_inputs import input_extras, missing_inputs
from carryall.dynamics.status import SYSTEM_ID
from carryall.dynamics.thermo import MOVE_MASK, standard_masses
from carryall.errors import InputError
from carryall.graph.neighbor_search import type_indices

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine
    from carryall.dynamics.samplers import SizeAwareSampler
    from carryall.dynamics.sinks import DataSink


WORTH_REFILL, WORTH_REMOVAL = 0.05, 0.25
"""Part of a batch's systems that must be done before others take their places, and before they leave with none to follow."""


@dataclass(frozen=True, eq=False)
class Refill:
    """Where systems come from and go to in flight."""

    sampler: SizeAwareSampler | None = None
    sinks: tuple[DataSink, ...] = ()
    frequency: int = 5
    """Steps between looks for finished systems; fewer than `WORTH_REFILL` of a batch wait for more."""
    init_fn: Callable[[Batch], None] | None = None


def run_in_flight(engine: Engine, batch: Batch | None, n_steps: int | None) -> Batch | None:
    """Work until the sampler is exhausted and all systems are done, at most `n_steps` steps of the engine; see `Engine.run`.

    A finished system is written to a sink before it leaves the batch: what a sink refuses stays, and nothing is lost.
    """
    from carryall.dynamics.sinks import MemorySink

    settings = engine.refill
    own = MemorySink() if not settings.sinks else None
    sinks: tuple[DataSink, ...] = settings.sinks if own is None else (own,)
    engine.begin_run(n_steps)
    first = engine.step_count
    with engine.opened():
        if batch is not None:
            engine.start(batch)
        batch = refilled(engine, batch, sinks)
        while batch is not None and (n_steps is None or engine.step_count - first < n_steps):
            engine.step(batch)
            due = (engine.step_count - first) % settings.frequency == 0
            if (due and worth_a_refill(engine, batch)) or not engine.n_running(batch):
                batch = refilled(engine, batch, sinks)
    if batch is not None and batch.n_systems:
        batch = removed(engine, batch, sinks)
    return batch if own is None else _in_order(own, batch)


def worth_a_refill(engine: Engine, batch: Batch) -> bool:
    """Whether enough systems are done: making a batch anew costs as much as some steps, and finished ones cost little."""
    assert engine.refill.sampler is not None
    least = WORTH_REMOVAL if engine.refill.sampler.exhausted else WORTH_REFILL
    return batch.n_systems - engine.n_running(batch) >= least * batch.n_systems


def refilled(engine: Engine, batch: Batch | None, sinks: Sequence[DataSink]) -> Batch | None:
    """The batch without its finished systems and with new ones in the room that there is; None when nothing is left."""
    sampler = engine.refill.sampler
    assert sampler is not None
    while True:
        batch = removed(engine, batch, sinks)
        kept = 0 if batch is None else batch.n_systems
        drawn = [] if sampler.exhausted else sampler.draw(sampler.room_beside(batch), must=not kept)
        if not drawn:
            return batch
        new = moving_batch([data for _, data in drawn], [index for index, _ in drawn])
        if engine.refill.init_fn is not None:
            engine.refill.init_fn(new)
        batch = admitted(engine, batch, new)
        # systems that could not even start leave room for others at once
        if engine.n_running(batch) == batch.n_systems:
            return batch


def removed(engine: Engine, batch: Batch | None, sinks: Sequence[DataSink]) -> Batch | None:
    """The batch without its finished systems, which are in the sinks then."""
    from carryall.dynamics.sinks import write_in_order

    if batch is None or engine.n_running(batch) == batch.n_systems:
        return batch
    finished = ~engine.not_done(batch)
    write_in_order(sinks, batch, finished)
    return without(engine, batch, finished.nonzero().squeeze(1).tolist())


def without(engine: Engine, batch: Batch, rows: Sequence[int]) -> Batch | None:
    """The batch without some systems; None where that leaves none."""
    kept = torch.ones(batch.n_systems, dtype=torch.bool, device=batch.device)
    kept[list(rows)] = False
    if not bool(kept.any()):
        engine.go_on_with(None, None)
        return None
    current = engine.forces_are_current(batch)
    left, unprimed = batch.index_select(kept.nonzero().squeeze(1)), engine.roster.unprimed
    engine.go_on_with(left, None if unprimed is None else unprimed[kept], current)
    return left


def admitted(engine: Engine, batch: Batch | None, new: Batch, unprimed: torch.Tensor | None = None) -> Batch:
    """The systems at hand with new ones, whose forces come with the next step's model call.

    unprimed: (n_systems,) bool of the new ones that have no forces of their positions; all by default.
    """
    engine.enlist(new)
    for index, reason in unknown_elements(new, engine).items():
        engine.set_aside(new, index, reason)
    if "energy" not in new:
        new.energy = torch.full((new.n_systems,), torch.nan, dtype=torch.float64, device=new.device)
    if "forces" not in new:
        new.forces = torch.zeros_like(new.positions)
    if "virial" not in new and any("virial" in part.__needs_keys__ for part in engine.parts):
        new.set("virial", torch.zeros(new.n_systems, 3, 3, dtype=torch.float64, device=new.device), level="system")
    if unprimed is None:
        unprimed = torch.ones(new.n_systems, dtype=torch.bool, device=new.device)
    if batch is None:
        engine.go_on_with(new, unprimed)
        return new
    current = engine.forces_are_current(batch)
    old = engine.roster.unprimed
    old = torch.zeros(batch.n_systems, dtype=torch.bool, device=batch.device) if old is None else old
    joined = Batch.joined([(batch, None), (new, None)], fill=blanks(batch, new))
    engine.go_on_with(joined, torch.cat([old, unprimed]), current)
    return joined


def blanks(one: Batch, other: Batch) -> dict[str, Any]:
    """What a key that only one of two batches has is for the systems of the other: NaN, 0 or false by its type.

    Atoms without velocities rest, as in `moving_batch`.
    """
    found = {}
    for batch, lacking in ((one, other), (other, one)):
        for key in batch.keys():  # noqa: SIM118
            if key not in lacking:
                dtype = batch.get(key).dtype
                found[key] = float("nan") if dtype.is_floating_point else key == MOVE_MASK if dtype == torch.bool else 0
    if "velocities" in found:
        found["velocities"] = 0.0
    return found


def unknown_elements(batch: Batch, engine: Engine) -> dict[int, str]:
    """Systems with an element that the potential does not know, with the reason."""
    type_map = engine.model.spec.type_map
    try:
        type_indices(batch.atomic_numbers, type_map)
    except InputError:
        ptr, found = batch.ptr.tolist(), {}
        for index in range(batch.n_systems):
            try:
                type_indices(batch.atomic_numbers[ptr[index] : ptr[index + 1]], type_map)
            except InputError as error:
                found[index] = str(error)
        return found
    return {}


def moving_batch(structures: Sequence[AtomicData], ids: Sequence[int]) -> Batch:
    """A float64 batch of what dynamics needs of structures: geometry, masses, velocities, held atoms, the potential's inputs.

    ids: `system_id` of each. Labels and other extras are left out; `info` starts empty.
    """
    held = any(MOVE_MASK in one.atom_extras for one in structures)
    moving = any(one.velocities is not None for one in structures)
    weighed = any(one.masses is not None for one in structures)
    bare = [_bare(one, moving, weighed, held) for one in structures]
    batch = Batch.from_data_list(bare, missing_inputs(bare)).to(dtype=torch.float64)
    batch.set(SYSTEM_ID, torch.tensor(list(ids), dtype=torch.int64), level="system")
    return batch


def _bare(data: AtomicData, moving: bool, weighed: bool, held: bool) -> AtomicData:
    """What dynamics needs of a structure, which was checked when it was made."""
    values = {"positions": data.positions, "atomic_numbers": data.atomic_numbers, "pbc": data.pbc}
    if data.cell is not None:
        values["cell"] = data.cell
    if weighed:
        values["masses"] = standard_masses(data.atomic_numbers) if data.masses is None else data.masses
    if moving:
        values["velocities"] = torch.zeros_like(data.positions) if data.velocities is None else data.velocities
    extras: dict[str, dict[str, torch.Tensor]] = {}
    if data.atom_extras or data.system_extras or data.spins is not None:
        found = input_extras(data)
        extras = {"atom": found["atom_extras"], "system": found["system_extras"]}
        values |= {"spins": found["spins"]} if "spins" in found else {}
    if held:
        extras["atom"] = {**extras.get("atom", {}), MOVE_MASK: move_mask(data)}
    return unchecked(values, extras, {})


def move_mask(data: AtomicData) -> torch.Tensor:
    """(n_atoms, 3) bool, true where an atom may move; InputError for a mask of another length."""
    mask = data.atom_extras.get(MOVE_MASK)
    if mask is None:
        return torch.ones(data.n_atoms, 3, dtype=torch.bool)
    return mask.to(torch.bool).reshape(data.n_atoms, -1).expand(-1, 3)


def _in_order(sink: DataSink, batch: Batch | None) -> Batch | None:
    """All systems by their ids."""
    if not len(sink):
        return batch
    found = sink.drain()
    if batch is not None and batch.n_systems:
        found = Batch.joined([(found, None), (batch, None)], fill=blanks(found, batch))
    return found.index_select(found.get(SYSTEM_ID).argsort(stable=True))
