"""What becomes of a system that leaves a pipeline: a result for the ledger, and a batch for the sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carryall.data.batch import Batch
from carryall.dynamics.blobs import batch_from_bytes
from carryall.dynamics.pipeline.books import Books
from carryall.dynamics.results import OUTCOMES, RelaxResult
from carryall.dynamics.sinks.joining import FILLED_KEYS, PADDED_KEYS, joined_with_blanks
from carryall.dynamics.status import FMAX, OUTCOME, REASON, SYSTEM_ID, Outcome
from carryall.dynamics.structures import finished_structure
from carryall.dynamics.thermo import max_force

HISTORY = "stages"
"""Key of `info` with what each stage made of a system: its name, outcome and steps."""


def result_of(books: Books, batch: Batch, place: int) -> RelaxResult:
    """The result of a system of a batch that is done."""
    index = int(batch.get(SYSTEM_ID)[place])
    original, source, frame = books.original(index)
    outcome = int(batch.get(OUTCOME)[place])
    failed, facts = outcome == Outcome.FAILED, batch.info[place]
    history: Sequence[Mapping[str, Any]] = facts.get(HISTORY, [])
    last = f"in stage {len(history) - 1} ({history[-1]['stage']}): " if history else ""
    data = finished_structure(original, batch, place)
    kept = {key: value for key, value in facts.items() if key not in (REASON, FILLED_KEYS, PADDED_KEYS)}
    data = data.replace(info={**data.info, **kept})
    energy = fmax = None
    if not failed:
        energy = float(batch.energy[place])
        fmax = float((batch.get(FMAX) if FMAX in batch else max_force(batch))[place])
    reason = f"{last}{facts.get(REASON, 'it failed')}" if failed else None
    steps = sum(int(one["steps"]) for one in history)
    return RelaxResult(index, OUTCOMES[Outcome(outcome)], reason, steps, energy, fmax, data, source, frame)


def stage_of(facts: Mapping[str, Any], n_stages: int) -> int:
    """The stage in which a system that is done has failed; `n_stages` where it has passed them all."""
    return max(len(facts.get(HISTORY, [])) - 1, 0) if REASON in facts else n_stages


def joined(blobs: Sequence[bytes]) -> Batch:
    """Batches of one system each as one batch."""
    return joined_with_blanks([batch_from_bytes(one)[0] for one in blobs])
