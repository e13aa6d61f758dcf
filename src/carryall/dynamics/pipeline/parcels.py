"""What a rank sends to the hub: systems that are done with its stage, systems that it gives back, and its batch as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.blobs import batch_to_bytes
from carryall.dynamics.engine import Engine
from carryall.dynamics.pipeline.books import State
from carryall.dynamics.pipeline.messages import Message
from carryall.dynamics.pipeline.outcome import HISTORY
from carryall.dynamics.results import OUTCOMES
from carryall.dynamics.status import OUTCOME, REASON, SYSTEM_ID, Outcome


def delivery(stage: int, name: str, engine: Engine, batch: Batch, number: int) -> Message:
    """Systems that are done with a stage, each with what the stage made of it in its `info`."""
    outcomes = batch.get(OUTCOME).tolist()
    steps = sum(part.steps(batch) for part in engine.parts)
    assert isinstance(steps, Tensor)
    blobs = []
    for place, taken in enumerate(steps.tolist()):
        one = batch.index_select([place])
        said = {"stage": name, "outcome": OUTCOMES[Outcome(outcomes[place])], "steps": taken}
        one.info[0][HISTORY] = [*one.info[0].get(HISTORY, []), said]
        blobs.append(batch_to_bytes(one, {}))
    facts = {"stage": stage, "ids": batch.get(SYSTEM_ID).tolist(), "n_atoms": batch.atom_counts, "number": number}
    return Message("deliver", {**facts, "failed": [REASON in info for info in batch.info]}, blobs)


def return_of(
    stage: int | None,
    engine: Engine | None,
    batch: Batch | None,
    rows: Sequence[int],
    untouched: Sequence[State],
    half: bool,
) -> Message:
    """Systems `rows` of a batch as they are, and others that have not entered it; half of what a rank has, or all."""
    facts: dict[str, Any] = {"stage": stage, "half": half, "ids": [], "n_atoms": [], "primed": []}
    blobs: list[bytes] = []
    if engine is not None and batch is not None and len(rows):
        names, counts, primed = batch.get(SYSTEM_ID).tolist(), batch.atom_counts, primed_of(engine, batch)
        facts |= {"ids": [names[i] for i in rows], "n_atoms": [counts[i] for i in rows], "primed": [primed[i] for i in rows]}
        blobs = [batch_to_bytes(batch.index_select([i]), {}) for i in rows]
    return Message("give_back", {**facts, "untouched": [(one.id, one.n_atoms) for one in untouched]}, blobs)


def saved(stage: int | None, engine: Engine | None, batch: Batch | None, step: int) -> Message:
    """The batch on its way; without one, that there is none."""
    facts = {"stage": stage, "step": step}
    if batch is None or engine is None:
        return Message("save", facts)
    return Message("save", {**facts, "primed": primed_of(engine, batch)}, [batch_to_bytes(batch, {})])


def primed_of(engine: Engine, batch: Batch) -> list[bool]:
    """Which systems have the forces of their positions."""
    unprimed = engine.roster.unprimed
    if not engine.forces_are_current(batch):
        return [False] * batch.n_systems
    return [True] * batch.n_systems if unprimed is None else (~unprimed).tolist()
