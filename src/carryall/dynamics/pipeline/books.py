"""The books of a pipeline: where every input is, in the ledger, changed in transactions that keep each in one place."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carryall.data.atomic_data import AtomicData
from carryall.dynamics.blobs import batch_from_bytes, batch_to_bytes, structure_from_bytes, structure_to_bytes
from carryall.dynamics.ledger import FINISHED, IN_STAGE, Ledger
from carryall.dynamics.results import RelaxResult
from carryall.dynamics.status import SYSTEM_ID
from carryall.errors import CarryallError


@dataclass(frozen=True, slots=True)
class Waiting:
    """A system that waits for its stage; its state is in the ledger."""

    id: int
    n_atoms: int


@dataclass(frozen=True, eq=False)
class State:
    """A system as it came into a stage, or as it was given back."""

    id: int
    n_atoms: int
    blob: bytes
    """A batch of this one system, by `batch_to_bytes`."""
    fresh: bool = True
    """Whether it has not begun in its stage."""
    primed: bool = False
    """Whether its forces are those of its positions."""


@dataclass(frozen=True, eq=False)
class TakenUp:
    """An input with its first state."""

    state: State
    original: AtomicData
    content: bytes
    source: str | None = None
    frame: int | None = None


class Books:
    """Writes to a ledger where systems of a pipeline with `n_stages` stages are.

    A system that has been taken up has a row in `systems`, and in `travelling` the state with which it came into its stage. A
    stage's saved batch is in `in_flight`, by rank: after a kill it tells how far its systems had come. A finished system has
    its row in `systems` only.
    """

    def __init__(self, ledger: Ledger, n_stages: int) -> None:
        self.ledger, self.n_stages = ledger, n_stages
        self.known = {index for (index,) in ledger.rows("SELECT id FROM systems")}
        """Inputs that were taken up, or are done."""
        self.n_refused = 0
        """Inputs that failed before they were taken up, since `counts` was called."""
        self.settle()

    # -- what is known

    def __contains__(self, index: object) -> bool:
        return index in self.known

    def __len__(self) -> int:
        """Inputs that are done."""
        return len(self.ledger)

    def hash_of(self, index: int) -> bytes | None:
        """Content hash of an input that was taken up; None where it could not be read."""
        return self.ledger.hash_of(index)

    def waiting(self, stage: int) -> list[Waiting]:
        """Systems that have come into a stage, the first first; of stage `n_stages`, those that no sink has taken."""
        rows = self.ledger.rows("SELECT id, n_atoms FROM travelling WHERE stage = ? ORDER BY id", stage)
        return [Waiting(*row) for row in rows]

    def counts(self) -> tuple[list[int], list[int]]:
        """For each stage how many have failed in it, and how many have passed it."""
        self.n_refused = 0
        return stage_counts(self.ledger.rows(STAGE_COUNTS), self.n_stages)

    def states(self, ids: Sequence[int]) -> list[State]:
        """States with which systems came into their stages."""
        found = []
        for index in ids:
            ((n_atoms, blob, fresh, primed),) = self.ledger.rows(
                "SELECT n_atoms, state, fresh, primed FROM travelling WHERE id = ?", index
            )
            found.append(State(index, n_atoms, blob, bool(fresh), bool(primed)))
        return found

    def original(self, index: int) -> tuple[AtomicData, str | None, int | None]:
        """An input on its way, as it was given, its file and its place there."""
        ((blob, source, frame),) = self.ledger.rows("SELECT structure, source, frame FROM systems WHERE id = ?", index)
        return structure_from_bytes(blob), source, frame

    # -- what changes

    def settle(self) -> None:
        """After a kill: systems go on from where they were last saved, and belong to no rank."""
        parts = self.ledger.rows("SELECT batch FROM in_flight")
        states = [one for (blob,) in parts for one in self._saved_states(blob)]
        with self.ledger.transaction() as database:
            database.executemany(
                "UPDATE travelling SET fresh = 0, primed = ?, state = ? WHERE id = ? AND stage = ?",
                [(state.primed, state.blob, state.id, stage) for stage, state in states],
            )
            database.execute("DELETE FROM in_flight")

    def take_up(self, inputs: Sequence[TakenUp]) -> None:
        """Inputs enter the first stage."""
        rows = [
            (one.state.id, IN_STAGE, 0, one.content, one.source, one.frame, structure_to_bytes(one.original)) for one in inputs
        ]
        with self.ledger.transaction() as database:
            names = "id, state, stage, hash, source, frame, structure"
            database.executemany(f"INSERT INTO systems ({names}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            database.executemany(_TRAVELLING, [_row(0, one.state) for one in inputs])
        self.known.update(one.state.id for one in inputs)

    def move(self, states: Sequence[State], stage: int, to: int) -> None:
        """Systems of a stage go on to another, or back into the same one."""
        with self.ledger.transaction() as database:
            for one in states:
                changed = database.execute("DELETE FROM travelling WHERE id = ? AND stage = ?", (one.id, stage)).rowcount
                _expect_one(changed, one.id, f"came from stage {stage}")
            database.executemany(_TRAVELLING, [_row(to, one) for one in states])
            database.executemany("UPDATE systems SET stage = ? WHERE id = ?", [(to, one.id) for one in states])

    def finish(self, results: Iterable[RelaxResult], stages: Sequence[int | None], facts: Mapping[str, Any]) -> None:
        """Inputs are done, in the stages named; `facts` of the run are kept in the same transaction."""
        names = "state = ?, stage = ?, outcome = ?, reason = ?, steps = ?, energy = ?, fmax = ?, structure = ?"
        with self.ledger.transaction() as database:
            for one, stage in zip(results, stages, strict=True):
                blob = None if one.structure is None else structure_to_bytes(one.structure)
                row = (FINISHED, stage, one.outcome, one.reason, one.steps, one.energy, one.fmax, blob, one.index, FINISHED)
                changed = database.execute(f"UPDATE systems SET {names} WHERE id = ? AND state != ?", row).rowcount
                _expect_one(changed, one.index, "is done")
            database.executemany("DELETE FROM travelling WHERE id = ?", [(one.index,) for one in results])
            self.ledger.set_facts(database, facts)

    def refuse(self, result: RelaxResult, content: bytes | None) -> None:
        """An input that was never taken up has failed."""
        self.ledger.add([result], {} if content is None else {result.index: content})
        self.known.add(result.index)
        self.n_refused += 1

    def save(self, rank: int, stage: int, primed: Sequence[bool], blob: bytes, step_count: int) -> None:
        """Keep the batch of a rank, in the place of the one kept before."""
        head = batch_head(stage, primed)
        with self.ledger.transaction() as database:
            database.execute("INSERT OR REPLACE INTO in_flight VALUES (?, ?, ?)", (rank, step_count, head + blob))

    def forget(self, rank: int) -> None:
        """A rank has nothing on its way."""
        with self.ledger.transaction() as database:
            database.execute("DELETE FROM in_flight WHERE part = ?", (rank,))

    def close(self, n_inputs: int) -> None:
        """Everything is done."""
        with self.ledger.transaction() as database:
            database.execute("DELETE FROM in_flight")
            self.ledger.set_facts(database, {"n_inputs": n_inputs, "ended": time.time()})

    # -- inside

    def _saved_states(self, blob: bytes) -> list[tuple[int, State]]:
        """Systems of a saved batch with their stage."""
        stage, primed, rest = split_head(blob)
        batch, _ = batch_from_bytes(rest)
        counts, found = batch.atom_counts, []
        for place, index in enumerate(batch.get(SYSTEM_ID).tolist()):
            one = batch_to_bytes(batch.index_select([place]), {})
            found.append((stage, State(index, counts[place], one, False, primed[place])))
        return found


_TRAVELLING = "INSERT INTO travelling (id, stage, fresh, primed, n_atoms, state) VALUES (?, ?, ?, ?, ?, ?)"


STAGE_COUNTS = "SELECT stage, outcome = 'failed', count(*) FROM systems GROUP BY 1, 2"


def stage_counts(rows: Iterable[tuple[Any, ...]], n_stages: int) -> tuple[list[int], list[int]]:
    """For each stage how many systems have failed in it, and how many have passed it, of the rows of `STAGE_COUNTS`."""
    failed, passed = [0] * n_stages, [0] * n_stages
    for stage, has_failed, count in rows:
        # what could not even be read has no stage: it counts to the first
        at = 0 if stage is None else stage
        if has_failed and at < n_stages:
            failed[at] += count
        for before in range(min(at, n_stages)):
            passed[before] += count
    return failed, passed


def _row(stage: int, one: State) -> tuple[Any, ...]:
    return one.id, stage, one.fresh, one.primed, one.n_atoms, one.blob


def _expect_one(changed: int, index: int, what: str) -> None:
    if changed != 1:
        raise CarryallError(
            f"the ledger knows nothing of system {index} that {what}: another program wrote to it, or carryall has a fault"
        )


def batch_head(stage: int, primed: Sequence[bool]) -> bytes:
    """Stage of a saved batch and which of its systems have forces, before its bytes."""
    return stage.to_bytes(4, "little") + len(primed).to_bytes(4, "little") + bytes(primed)


def split_head(blob: bytes) -> tuple[int, list[bool], bytes]:
    """The inverse of `batch_head`, and the rest."""
    count = int.from_bytes(blob[4:8], "little")
    return int.from_bytes(blob[:4], "little"), [bool(one) for one in blob[8 : 8 + count]], blob[8 + count :]
