"""Rank 0's keeper of the books: hands systems to the ranks of each stage, takes them back when they are done, writes it down.

One thread on one rank decides where each system is, so that no two ranks ever have to agree: a system is in the ledger before
a rank works on it, and its rank lets go of it only when the ledger has what became of it.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from carryall.data.batch import Batch
from carryall.dynamics.pipeline.books import Books, State, Waiting
from carryall.dynamics.pipeline.meeting import GATHERING
from carryall.dynamics.pipeline.messages import Message
from carryall.dynamics.pipeline.outcome import joined, result_of, stage_of
from carryall.dynamics.pipeline.queues import StageQueue
from carryall.dynamics.pipeline.report import LIVE, StageCount, live_facts
from carryall.dynamics.pipeline.settlement import Sinks
from carryall.dynamics.pipeline.source import Source
from carryall.dynamics.samplers import Room
from carryall.dynamics.sinks.base import SinkFullError

TICK, LEAVING = 1.0, 15.0
"""Seconds between looks at the ranks; and that ranks have to leave in, once a run stops."""
SHAREABLE = 4
"""Systems that a rank must have at least, to give half of them to one that has none."""


@dataclass(eq=False)
class Desk:
    """What the hub knows of a rank."""

    rank: int
    own: int | None
    """Its stage; None where one rank works for all."""
    send: Callable[[Message], None]
    silence: Callable[[], float]
    at: int | None = None
    """The stage that it works for."""
    claim: Message | None = None
    """What it waits for."""
    held: set[int] = field(default_factory=set)
    """Systems that it has."""
    moving: bool = False
    """Whether it was told of another stage, and has not yet given back what it had of the one before."""
    sharing: bool = False
    """Whether it was asked to give back half of them."""
    spoke: float = field(default_factory=time.monotonic)
    """When its loop over steps last said something."""
    step: int = 0
    ticked: bool = False
    here: bool = False
    left: bool = False


@dataclass(frozen=True, eq=False)
class Rules:
    """How a pipeline is run."""

    names: tuple[str, ...]
    """Of the stages."""
    n_ranks: tuple[int, ...]
    """Of each stage."""
    helping: bool
    timeout: float
    step_timeout: float
    program: Any
    """Description of the stages, the same on every rank."""


class Hub:
    """Serves until every input is done, or something ends the run."""

    def __init__(self, books: Books, source: Source, sinks: Sinks, rules: Rules, desks: Sequence[Desk]) -> None:
        self.books, self.source, self.sinks, self.rules = books, source, sinks, rules
        self.desks = {one.rank: one for one in desks}
        self.inbox: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self.queues = [StageQueue() for _ in range(books.n_stages)]
        self.failed, self.passed = books.counts()
        self.error: str | None = None
        """Why the run ended before its time."""
        self.stopped = False
        """Whether it was asked to stop."""
        self._ending: float | None = None
        self._began = time.monotonic()
        self._passed_before = list(self.passed)
        self._tick = 0.0

    # -- the loop

    def serve(self, show: Callable[[list[StageCount], float], None]) -> None:
        """Answer the ranks until all have left. show: called every second with where the systems are."""
        self._settle_sinks()
        self.books.take_up(self.source.read_ahead)
        for stage, waiting in enumerate(self.queues):
            waiting.add(self.books.waiting(stage))
        self.failed, self.passed = self.books.counts()
        self._passed_before = list(self.passed)
        while not all(one.left for one in self.desks.values()):
            try:
                rank, message = self.inbox.get(timeout=TICK / 2)
            except queue.Empty:
                pass
            else:
                self._handle(self.desks[rank], message)
            self._look(show)
        self._tell(show)

    def _handle(self, desk: Desk, message: Message) -> None:
        if message.kind != "closed":
            desk.spoke = time.monotonic()
        getattr(self, f"_on_{message.kind}")(desk, message)

    # -- what ranks say

    def _on_hello(self, desk: Desk, message: Message) -> None:
        desk.here = True
        if message.facts["program"] != self.rules.program:
            self.end_with(
                f"rank {desk.rank} runs another program than rank 0: its stages are {message.facts['program']}, here they are "
                f"{self.rules.program}; start the same script with the same settings on all ranks"
            )

    def _on_alive(self, desk: Desk, message: Message) -> None:
        desk.step = message.facts["step"]

    def _on_claim(self, desk: Desk, message: Message) -> None:
        if desk.moving:
            # it was sent before the rank knew
            return
        desk.claim, desk.at = message, message.facts["stage"]
        self._serve(desk)
        self._release()
        self._end_when_done()

    def _on_deliver(self, desk: Desk, message: Message) -> None:
        stage, ids, failed = (message.facts[name] for name in ("stage", "ids", "failed"))
        states = [State(*row) for row in zip(ids, message.facts["n_atoms"], message.blobs, strict=True)]
        last = stage == self.books.n_stages - 1
        done = [one for one, fails in zip(states, failed, strict=True) if fails or last]
        going = [] if last else [one for one, fails in zip(states, failed, strict=True) if not fails]
        self.books.move(done, stage, self.books.n_stages)
        self.books.move(going, stage, stage + 1)
        if not self._finish([one.blob for one in done]):
            return
        if going:
            self.queues[stage + 1].add(Waiting(one.id, one.n_atoms) for one in going)
        self.failed[stage] += sum(failed)
        self.passed[stage] += len(failed) - sum(failed)
        desk.held.difference_update(ids)
        desk.send(Message("taken", {"number": message.facts["number"]}))
        self._serve_all()
        self._end_when_done()

    def _on_give_back(self, desk: Desk, message: Message) -> None:
        stage, facts = message.facts["stage"], message.facts
        changed = [
            State(index, n_atoms, blob, False, primed)
            for index, n_atoms, primed, blob in zip(facts["ids"], facts["n_atoms"], facts["primed"], message.blobs, strict=True)
        ]
        untouched = [Waiting(index, n_atoms) for index, n_atoms in facts["untouched"]]
        if stage is not None:
            self.books.move(changed, stage, stage)
            self.queues[stage].add([*(Waiting(one.id, one.n_atoms) for one in changed), *untouched])
        desk.held.difference_update([*facts["ids"], *(one.id for one in untouched)])
        desk.sharing, desk.moving = False, desk.moving and facts["half"]
        self._serve_all()

    def _on_save(self, desk: Desk, message: Message) -> None:
        facts = message.facts
        if message.blobs:
            self.books.save(desk.rank, facts["stage"], facts["primed"], message.blobs[0], facts["step"])
        else:
            self.books.forget(desk.rank)

    def _on_tick(self, desk: Desk, message: Message) -> None:
        desk.ticked = True
        self._release()

    def _on_failed(self, desk: Desk, message: Message) -> None:
        self.end_with(f"rank {desk.rank} ({self._role(desk)}) failed: {message.facts['error']}")

    def _on_left(self, desk: Desk, message: Message) -> None:
        desk.left, desk.claim = True, None
        if message.facts.get("asked") and not self.stopped and self.error is None:
            self.stop()
        desk.send(Message("end"))

    def _on_closed(self, desk: Desk, message: Message) -> None:
        if not desk.left:
            desk.left = True
            self.end_with(
                f"the connection to rank {desk.rank} ({self._role(desk)}, {len(desk.held)} systems, step {desk.step}) ended "
                f"without a word: it was killed, or its machine is gone ({message.facts['reason']})"
            )

    # -- what ranks get

    def _serve_all(self) -> None:
        for desk in self.desks.values():
            self._serve(desk)
        self._release()

    def _serve(self, desk: Desk) -> None:
        """Answer what a rank waits for, as far as there is an answer."""
        if desk.claim is None or self._ending is not None:
            return
        facts = desk.claim.facts
        stage = self._stage_for(desk, facts["must"])
        if stage != facts["stage"]:
            desk.claim, desk.at, desk.moving = None, stage, True
            desk.send(Message("assign", {"stage": stage}))
            return
        taken = [] if stage is None else self._taken(stage, Room(facts["n_systems"], facts["n_atoms"]), facts["must"])
        if not taken and facts["wait"]:
            if facts["must"]:
                self._ask_to_share(desk)
            return
        desk.claim = None
        desk.held.update(one.id for one in taken)
        told = {"stage": stage, "ids": [one.id for one in taken], "n_atoms": [one.n_atoms for one in taken]}
        flags = {"fresh": [one.fresh for one in taken], "primed": [one.primed for one in taken]}
        desk.send(Message("systems", {**told, **flags}, [one.blob for one in taken]))

    def _ask_to_share(self, idle: Desk) -> None:
        """No system waits for a rank that has none: the rank with the most gives it half of them."""
        if any(one.sharing for one in self.desks.values()):
            return
        loaded = [one for one in self.desks.values() if self.rules.helping or one.own == idle.own]
        most = max(loaded, key=lambda one: len(one.held))
        if len(most.held) >= SHAREABLE and not most.left:
            most.sharing = True
            most.send(Message("share"))

    def _stage_for(self, desk: Desk, idle: bool) -> int | None:
        """The stage that a rank should work for now: its own, or another one that needs it."""
        at = desk.claim.facts["stage"] if desk.claim is not None else desk.at
        if at is not None and self._has_work(at):
            return int(at)
        if desk.own is not None and at != desk.own and self._has_work(desk.own):
            return desk.own
        stages = [stage for stage in range(self.books.n_stages) if self._has_work(stage)]
        if idle and stages and (desk.own is None or (self.rules.helping and desk.own not in stages)):
            return stages[0] if desk.own is None else max(stages, key=self._backlog)
        return desk.own if at is None else int(at)

    def _has_work(self, stage: int) -> bool:
        return len(self.queues[stage]) > 0 or (stage == 0 and not self.source.exhausted)

    def _backlog(self, stage: int) -> float:
        more = self.source.n_left(len(self.books.known)) if stage == 0 else 0
        return len(self.queues[stage]) + (math.inf if more is None else more)

    def _taken(self, stage: int, room: Room, must: bool) -> list[State]:
        """Systems for a rank of a stage: its fair share of those that wait, as far as they fit."""
        backlog = self._backlog(stage)
        if not backlog:
            return []
        ranks = len(self.desks) if self.rules.helping else self.rules.n_ranks[stage]
        most = room.n_systems if math.isinf(backlog) else max(1, math.ceil(backlog / ranks))
        if room.n_systems is not None and most is not None:
            most = min(most, room.n_systems)
        queued = self.queues[stage].take(room, must and stage > 0, most)
        if stage > 0 or (most is not None and len(queued) >= most):
            return self.books.states([one.id for one in queued])
        atoms = None if room.n_atoms is None else max(0, room.n_atoms - sum(one.n_atoms for one in queued))
        rest = Room(None if most is None else most - len(queued), atoms)
        new = self.source.draw(rest, must and not queued)
        self.books.take_up(new)
        if must and not queued and not new:
            queued = self.queues[stage].take(room, True, most)
        return [*self.books.states([one.id for one in queued]), *(one.state for one in new)]

    # -- the end of systems, and of the run

    def _finish(self, blobs: Sequence[bytes]) -> bool:
        """Results of systems that are done: to the sinks, then to the ledger. False when no sink has room for them."""
        if not blobs:
            return True
        batch = joined(blobs)
        try:
            facts = self.sinks.write(batch)
        except SinkFullError as error:
            # they are in the ledger with their states, as systems that wait for a sink
            self.end_with(f"{error}; nothing is lost: give the run a further sink and resume it")
            return False
        self._record(batch, facts)
        return True

    def _settle_sinks(self) -> None:
        """Results that a sink has but not the ledger, and those that no sink had room for."""
        waiting = self.books.states([one.id for one in self.books.waiting(self.books.n_stages)])
        there = self.sinks.unknown(self.books.ledger)
        written = [one.blob for one in waiting if one.id in there]
        if written:
            self._record(joined(written), self.sinks.lengths())
        self._finish([one.blob for one in waiting if one.id not in there])

    def _record(self, batch: Batch, facts: dict[str, Any]) -> None:
        """Results of systems that are in the sinks."""
        results = [result_of(self.books, batch, place) for place in range(batch.n_systems)]
        stages = [stage_of(info, self.books.n_stages) for info in batch.info]
        self.books.finish(results, stages, facts)

    def _end_when_done(self) -> None:
        if self._ending is not None or any(one.held for one in self.desks.values()):
            return
        if all(not len(one) for one in self.queues) and self.source.exhausted:
            self._end(Message("end"))

    def end_with(self, error: str) -> None:
        """End the run with an error; every rank saves what it has and leaves."""
        if self.error is None and self._ending is None:
            self.error = error
            self._end(Message("stop", {"error": error}))

    def give_up(self, error: str) -> None:
        """End the run when nobody serves it any more: ranks leave at once, and nothing more is written."""
        self.end_with(error)
        for desk in self.desks.values():
            desk.send(Message("end"))

    def stop(self) -> None:
        """End the run as asked for; every rank saves what it has and leaves."""
        if self._ending is None:
            self.stopped = True
            self._end(Message("stop", {"error": None}))

    def _end(self, message: Message) -> None:
        self._ending = time.monotonic()
        for desk in self.desks.values():
            if not desk.left:
                desk.send(message)
            # one that has not come yet has nothing to save
            desk.left = desk.left or not desk.here

    def _release(self) -> None:
        """Where ranks step together: all go on when each has done its step, or waits for systems."""
        if all(one.ticked or one.left or (one.claim is not None and one.claim.facts["must"]) for one in self.desks.values()):
            for desk in self.desks.values():
                if desk.ticked:
                    desk.ticked = False
                    desk.send(Message("go"))

    # -- every second

    def _look(self, show: Callable[[list[StageCount], float], None]) -> None:
        now = time.monotonic()
        if now - self._tick < TICK:
            return
        self._tick = now
        self._tell(show)
        for desk in self.desks.values():
            if desk.left:
                continue
            if not desk.here and now - self._began > max(GATHERING.total_seconds(), self.rules.timeout):
                desk.left = True
                self.end_with(f"rank 0 waited {now - self._began:.0f} s for rank {desk.rank}, which has never come")
            elif desk.silence() > self.rules.timeout:
                desk.left = True
                self.end_with(
                    f"rank 0 heard nothing from rank {desk.rank} ({self._role(desk)}) for {self.rules.timeout:.0f} s while it "
                    f"waited for its next word: it was stopped, or the network is cut; it has {len(desk.held)} systems"
                )
            elif now - desk.spoke > self.rules.step_timeout:
                desk.left = True
                self.end_with(
                    f"rank 0 waited {self.rules.step_timeout:.0f} s for rank {desk.rank} ({self._role(desk)}) to end step "
                    f"{desk.step + 1} with {len(desk.held)} systems: it hangs, or step_timeout is too short for the model"
                )
        if self._ending is not None and now - self._ending > LEAVING:
            for desk in self.desks.values():
                # who does not leave is in one long step; what it had is in the ledger as last saved
                desk.left = True

    def _tell(self, show: Callable[[list[StageCount], float], None]) -> None:
        more = self.source.n_left(len(self.books.known))
        counts = [
            StageCount(
                name,
                None if stage == 0 and more is None else len(self.queues[stage]) + (more or 0 if stage == 0 else 0),
                sum(len(desk.held) for desk in self.desks.values() if desk.at == stage),
                self.passed[stage],
                self.failed[stage] + (0 if stage else self.books.n_refused),
                self.passed[stage] - self._passed_before[stage],
            )
            for stage, name in enumerate(self.rules.names)
        ]
        seconds = time.monotonic() - self._began
        self.books.ledger.set_fact(LIVE, live_facts(counts, seconds))
        show(counts, seconds)

    def _role(self, desk: Desk) -> str:
        stage = desk.own if desk.at is None else desk.at
        return "no stage yet" if stage is None else f"stage {stage}: {self.rules.names[stage]}"
