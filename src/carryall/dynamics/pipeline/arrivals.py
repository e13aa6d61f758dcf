"""Systems that a stage has been given: those that wait for room at the rank, and how they enter the batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch

from carryall.data.batch import Batch
from carryall.dynamics.blobs import batch_from_bytes
from carryall.dynamics.engine import Engine
from carryall.dynamics.inflight import admitted
from carryall.dynamics.memory import n_edges
from carryall.dynamics.pipeline.books import State
from carryall.dynamics.samplers import Room
from carryall.dynamics.sinks.joining import Signature, signature_of
from carryall.dynamics.status import OUTCOME, PREVIOUS_ENERGY, STATUS, Outcome


class Inbox:
    """Systems that have arrived and are not in the batch yet, the oldest first."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[State, Batch, int]] = deque()
        self._edges: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._arrived)

    @property
    def n_atoms(self) -> int:
        """Atoms of all."""
        return sum(one.n_atoms for one, _, _ in self._arrived)

    @property
    def batches(self) -> list[Batch]:
        """The systems, each as a batch."""
        return [batch for _, batch, _ in self._arrived]

    def add(self, states: Iterable[State], cutoff: float | None) -> None:
        """Systems arrive. cutoff: Å, where edges are counted."""
        for one in states:
            batch, _ = batch_from_bytes(one.blob)
            self._arrived.append((one, batch, 0 if cutoff is None else n_edges(batch.get_data(0), cutoff)))

    def take(self, held: Room, limits: Room) -> list[tuple[State, Batch, int]]:
        """Systems that fit beside what a batch holds, in order; one in any case where it holds none."""
        systems, atoms, edges = held.n_systems or 0, held.n_atoms or 0, held.n_edges or 0
        taken: list[tuple[State, Batch, int]] = []
        passed: list[tuple[State, Batch, int]] = []
        while self._arrived:
            one = self._arrived.popleft()
            fits = _within(systems + 1, limits.n_systems) and _within(atoms + one[0].n_atoms, limits.n_atoms)
            if systems and not (fits and _within(edges + one[2], limits.n_edges)):
                passed.append(one)
                continue
            taken.append(one)
            systems, atoms, edges = systems + 1, atoms + one[0].n_atoms, edges + one[2]
        self._arrived.extend(passed)
        return taken

    def drained(self, most: int) -> list[State]:
        """The last that came, at most `most`, which are here no longer."""
        return [self._arrived.pop()[0] for _ in range(min(most, len(self._arrived)))]


def entered(engine: Engine, batch: Batch | None, arrived: Sequence[tuple[State, Batch, int]]) -> Batch:
    """The batch with systems that arrived: fresh ones begin the stage, others go on where they were."""
    alike: dict[tuple[bool, Signature], list[tuple[State, Batch]]] = {}
    for state, one, _ in arrived:
        alike.setdefault((state.fresh, signature_of(one)), []).append((state, one))
    for (fresh, _), members in alike.items():
        joined = Batch.joined([(one, None) for _, one in members])
        unprimed = torch.tensor([not state.primed for state, _ in members], device=joined.device)
        if fresh:
            begin(engine, joined)
            if engine.refill.init_fn is not None:
                engine.refill.init_fn(joined)
            # a batch that another run has stepped may have the state of one
            engine.enlist(joined, fresh=True)
        batch = admitted(engine, batch, joined, unprimed)
    assert batch is not None
    return batch


def begin(engine: Engine, batch: Batch) -> None:
    """Systems that another stage has brought to its end run again, in the entry stage of this one; failed ones stay aside."""
    if STATUS in batch and OUTCOME in batch:
        failed = batch.get(OUTCOME) == int(Outcome.FAILED)
        status = torch.full_like(batch.get(STATUS), engine.entry_status)
        batch.set(STATUS, torch.where(failed, torch.full_like(status, engine.exit_status), status))
        batch.set(OUTCOME, torch.where(failed, batch.get(OUTCOME), torch.full_like(status, int(Outcome.RUNNING))))
    if PREVIOUS_ENERGY in batch:
        # the energies of another stage may be those of another potential
        batch.set(PREVIOUS_ENERGY, torch.full_like(batch.get(PREVIOUS_ENERGY), torch.nan))


def _within(value: int, limit: int | None) -> bool:
    return limit is None or value <= limit
