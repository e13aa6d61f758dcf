"""Ranks that are played: they speak to a hub as workers do, in an order drawn by chance, and are killed by chance."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from carryall.data import Batch
from carryall.dynamics import Outcome, Room
from carryall.dynamics.blobs import batch_from_bytes, batch_to_bytes
from carryall.dynamics.pipeline.hub import Desk
from carryall.dynamics.pipeline.messages import Message, decode, encode
from carryall.dynamics.pipeline.outcome import HISTORY
from carryall.dynamics.status import OUTCOME, REASON

NEEDS, LEFT_OVER = "needs", "done_steps"
"""Keys of a played system: (n_stages,) steps that it takes in each stage, 0 where it fails; steps taken in its stage."""


class Killed(BaseException):
    """All ranks were killed."""


@dataclass(frozen=True)
class Play:
    """How ranks work."""

    n_ranks: tuple[int, ...]
    helping: bool = False
    comm_mode: str = "async_recv"
    synchronized: bool = False
    n_systems: int = 4
    n_atoms: int | None = None
    ahead: int = 1
    """Systems that a rank has beside its batch."""


def stepped(x: float, stage: int) -> float:
    """What a step of a stage makes of a system's number."""
    return 0.75 * x + stage + 1


def needs_of(index: int, n_stages: int, fails: bool) -> list[int]:
    """Steps of a system in each stage; it fails where there are none."""
    needs = [1 + (index + 2 * stage) % 4 for stage in range(n_stages)]
    if fails:
        needs[index % n_stages] = 0
    return needs


def expected(needs: Sequence[int]) -> tuple[float, int, int | None]:
    """The number of a system at its end, the steps that it takes, and the stage in which it fails."""
    x, steps = 1.0, 0
    for stage, count in enumerate(needs):
        x += 100.0 * stage  # what a stage does to a fresh system
        for _ in range(count):
            x = stepped(x, stage)
        steps += count
        if not count:
            return x, steps, stage
    return x, steps, None


@dataclass(eq=False)
class System:
    """One system at a played rank."""

    id: int
    n_atoms: int
    batch: Batch

    @property
    def x(self) -> float:
        return float(self.batch.get("x")[0])

    def set(self, x: float, steps: int, outcome: Outcome) -> None:
        self.batch.set("x", torch.tensor([x], dtype=torch.float64), level="system")
        self.batch.set(LEFT_OVER, torch.tensor([steps]), level="system")
        self.batch.set(OUTCOME, torch.tensor([int(outcome)]), level="system")

    def begin(self, stage: int) -> None:
        """Come into a stage."""
        fails = not int(self.batch.get(NEEDS)[0, stage])
        self.set(self.x + 100.0 * stage, 0, Outcome.FAILED if fails else Outcome.RUNNING)
        if fails:
            self.batch.info[0][REASON] = "drawn by chance"

    def step(self, stage: int) -> None:
        """One step of a stage."""
        steps = int(self.batch.get(LEFT_OVER)[0]) + 1
        done = steps >= int(self.batch.get(NEEDS)[0, stage])
        self.set(stepped(self.x, stage), steps, Outcome.CONVERGED if done else Outcome.RUNNING)

    @property
    def running(self) -> bool:
        return int(self.batch.get(OUTCOME)[0]) == Outcome.RUNNING


@dataclass(eq=False)
class Player:
    """A rank: what `Worker` says and when, without its steps."""

    rank: int
    play: Play
    stage: int | None
    random: random.Random
    out: deque[bytes] = field(default_factory=deque)
    coming: deque[bytes] = field(default_factory=deque)
    """Under way from the hub."""
    mail: deque[Message] = field(default_factory=deque)
    batch: dict[int, System] = field(default_factory=dict)
    inbox: deque[tuple[System, bool]] = field(default_factory=deque)
    claimed: bool | None = None
    assigned: int | None = None
    ended: Message | None = None
    sent: int = 0
    acknowledged: int = 0
    share: bool = False
    may_go: bool = False
    wants_to_stop: bool = False
    waits: bool = False

    def run(self) -> Iterator[None]:
        self.send("hello", {"rank": self.rank, "program": "a play"})
        while self.ended is None:
            if self.wants_to_stop:
                self.save()
                self.send("left", {"asked": True})
                return
            yield from self.turn()
        self.save()
        self.send("left", {"asked": False})

    def send(self, kind: str, facts: dict[str, Any] | None = None, blobs: Sequence[bytes] = ()) -> None:
        self.out.append(encode(Message(kind, facts or {}, blobs)))

    # -- a turn, as the worker has it

    def turn(self) -> Iterator[None]:
        self.read()
        if self.assigned is not None:
            self.give_back(half=False)
            self.stage, self.assigned, self.claimed = self.assigned, None, None
            yield
            return
        if self.share:
            self.share = False
            self.give_back(half=True)
        idle = not self.n_running
        for one in self.batch.values():
            if one.running and self.stage is not None:
                one.step(self.stage)
        now_idle = not self.n_running
        if now_idle or self.random.random() < 0.6:
            yield from self.exchange(now_idle)
        if self.random.random() < 0.3:
            self.save()
        if self.play.synchronized and not idle:
            self.send("tick")
            yield from self.until(lambda: self.may_go)
            self.may_go = False
        yield

    def exchange(self, idle: bool) -> Iterator[None]:
        while True:
            done = [one for one in self.batch.values() if not one.running]
            if done and (idle or self.random.random() < 0.7):
                self.hand_on(done)
                if self.play.comm_mode != "fully_async":
                    yield from self.until(lambda: self.sent == self.acknowledged)
            if not self.batch and self.inbox:
                self.ask(self.room(), must=False, wait=False)
                yield from self.until(lambda: self.claimed is None)
            if self.interrupted:
                return
            self.enter()
            idle = not self.n_running
            if not self.batch or not idle:
                break
        self.claim(idle)
        if self.play.comm_mode == "sync" and not idle:
            yield from self.until(lambda: self.claimed is None)
        elif idle:
            yield from self.until(lambda: len(self.inbox) > 0)

    def until(self, there: Callable[[], bool]) -> Iterator[None]:
        self.read()
        while not (there() or self.interrupted or self.wants_to_stop):
            self.waits = True
            yield
            self.read()
        self.waits = False

    @property
    def interrupted(self) -> bool:
        return self.ended is not None or self.assigned is not None

    @property
    def n_running(self) -> int:
        return sum(one.running for one in self.batch.values())

    def enter(self) -> None:
        passed = []
        while self.inbox:
            one, fresh = self.inbox.popleft()
            atoms = sum(other.n_atoms for other in self.batch.values()) + one.n_atoms
            fits = len(self.batch) < self.play.n_systems and atoms <= (self.play.n_atoms or math.inf)
            if self.batch and not fits:
                passed.append((one, fresh))
                continue
            if fresh:
                assert self.stage is not None
                one.begin(self.stage)
            self.batch[one.id] = one
        self.inbox.extend(passed)

    def claim(self, idle: bool) -> None:
        must = idle and not len(self.inbox)
        if self.claimed is not None and (self.claimed or not must):
            return
        room = Room(0, 0) if self.stage is None else self.room()
        if must or 0 not in (room.n_systems, room.n_atoms):
            self.ask(room, must, self.play.comm_mode != "sync" or must)

    def room(self) -> Room:
        ahead = 0 if self.play.comm_mode == "sync" else self.play.ahead
        held = len(self.batch) + len(self.inbox)
        atoms = sum(one.n_atoms for one in self.batch.values()) + sum(one.n_atoms for one, _ in self.inbox)
        most = None if self.play.n_atoms is None else max(0, self.play.n_atoms + 4 * ahead - atoms)
        return Room(max(0, self.play.n_systems + ahead - held), most)

    def ask(self, room: Room, must: bool, wait: bool) -> None:
        self.claimed = must
        facts = {"stage": self.stage, "n_systems": room.n_systems, "n_atoms": room.n_atoms, "must": must, "wait": wait}
        self.send("claim", facts)

    def hand_on(self, done: Sequence[System]) -> None:
        blobs = []
        for one in done:
            steps, outcome = int(one.batch.get(LEFT_OVER)[0]), int(one.batch.get(OUTCOME)[0])
            said = {"stage": f"stage {self.stage}", "outcome": outcome, "steps": steps}
            one.batch.info[0][HISTORY] = [*one.batch.info[0].get(HISTORY, []), said]
            blobs.append(batch_to_bytes(one.batch, {}))
            del self.batch[one.id]
        self.sent += 1
        failed = [REASON in one.batch.info[0] for one in done]
        facts = {
            "stage": self.stage,
            "ids": [one.id for one in done],
            "n_atoms": [one.n_atoms for one in done],
            "failed": failed,
        }
        self.send("deliver", {**facts, "number": self.sent}, blobs)

    def give_back(self, half: bool) -> None:
        if done := [one for one in self.batch.values() if not one.running]:
            self.hand_on(done)
        held = len(self.batch) + len(self.inbox)
        count = held // 2 if half else held
        untouched = [self.inbox.pop()[0] for _ in range(min(count, len(self.inbox)))]
        left = list(self.batch.values())[len(self.batch) - (count - len(untouched)) :]
        facts = {
            "stage": self.stage,
            "ids": [one.id for one in left],
            "n_atoms": [one.n_atoms for one in left],
            "primed": [True] * len(left),
            "untouched": [(one.id, one.n_atoms) for one in untouched],
            "half": half,
        }
        self.send("give_back", facts, [batch_to_bytes(one.batch, {}) for one in left])
        for one in left:
            del self.batch[one.id]
        self.save()

    def save(self) -> None:
        facts: dict[str, Any] = {"stage": self.stage, "step": 0}
        if not self.batch:
            self.send("save", facts)
            return
        joined = Batch.joined([(one.batch, None) for one in self.batch.values()])
        self.send("save", {**facts, "primed": [True] * len(self.batch)}, [batch_to_bytes(joined, {})])

    def read(self) -> None:
        while self.mail:
            message = self.mail.popleft()
            facts = message.facts
            if message.kind == "systems":
                self.claimed = None
                for index, n_atoms, blob, fresh in zip(
                    facts["ids"], facts["n_atoms"], message.blobs, facts["fresh"], strict=True
                ):
                    # what another stage is to work on must never come here
                    assert facts["stage"] == self.stage or not facts["ids"], (facts, self.stage)
                    self.inbox.append((System(index, n_atoms, batch_from_bytes(blob)[0]), fresh))
            elif message.kind == "assign":
                self.claimed, self.assigned = None, facts["stage"]
            elif message.kind == "share":
                self.share = True
            elif message.kind == "taken":
                self.acknowledged = facts["number"]
            elif message.kind == "go":
                self.may_go = True
            elif message.kind in ("end", "stop"):
                self.ended = message
            else:
                raise AssertionError(message.kind)


class Stage:
    """In the place of the hub's inbox: lets the players play until one of them has said something."""

    def __init__(self, play: Play, seed: int, trouble: Callable[[int], str | None]) -> None:
        """trouble: by the number of the event "kill" (all ranks), "die" (one), "stop" (one is asked to), or None."""
        chance = random.Random(seed)
        self.play, self.random, self.trouble = play, chance, trouble
        stages = [stage for stage, count in enumerate(play.n_ranks) for _ in range(count)]
        own: list[int | None] = [None] if len(play.n_ranks) == 1 and play.helping else [*stages]
        self.players = [Player(rank, play, at, random.Random(chance.random())) for rank, at in enumerate(own)]
        self.acts = {one.rank: one.run() for one in self.players}
        self.events = 0

    def desks(self) -> list[Desk]:
        """The hub's view of the players."""
        return [
            Desk(one.rank, one.stage, lambda message, to=one: to.coming.append(encode(message)), lambda: 0.0, here=True)
            for one in self.players
        ]

    def get(self, timeout: float) -> tuple[int, Message]:
        """The next thing that a player says; fails where nobody will ever say anything again."""
        while True:
            self.events += 1
            assert self.events < 20000, "it never ends"
            found = self._troubled(self.trouble(self.events))
            if found is not None:
                return found
            saying = [one for one in self.players if one.out]
            hearing = [one for one in self.players if one.coming]
            acting = [one for one in self.players if one.rank in self.acts and not (one.waits and not one.mail)]
            assert saying or hearing or acting, f"all wait for ever: {self._state()}"
            one, kind = self.random.choice(
                [(one, "say") for one in saying] + [(one, "hear") for one in hearing] + [(one, "act") for one in acting]
            )
            if kind == "say":
                return one.rank, decode(one.out.popleft())
            if kind == "hear":
                one.mail.append(decode(one.coming.popleft()))
            elif next(self.acts[one.rank], StopIteration) is StopIteration:
                del self.acts[one.rank]

    def _troubled(self, what: str | None) -> tuple[int, Message] | None:
        alive = [one for one in self.players if one.rank in self.acts]
        if what == "kill":
            raise Killed
        if what is None or not alive:
            return None
        one = self.random.choice(alive)
        if what == "stop":
            one.wants_to_stop, one.waits = True, False
            return None
        del self.acts[one.rank]
        lost = self.random.randint(0, len(one.out))  # the last words may be lost
        for _ in range(lost):
            one.out.pop()
        one.out.append(encode(Message("closed", {"reason": "it died"})))
        return None

    def _state(self) -> list[Any]:
        return [(one.rank, one.stage, list(one.batch), [two.id for two, _ in one.inbox], one.claimed) for one in self.players]
