"""A rank's part in a pipeline: it steps the systems of a stage, hands on those that are done, and takes others."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.buffers import BufferConfig
from carryall.dynamics.engine import Engine
from carryall.dynamics.inflight import WORTH_REFILL, removed, without
from carryall.dynamics.memory import CPU_ATOMS, automatic_limits
from carryall.dynamics.optimizers import FIRE
from carryall.dynamics.pipeline.arrivals import Inbox, entered
from carryall.dynamics.pipeline.books import State
from carryall.dynamics.pipeline.channel import Channel
from carryall.dynamics.pipeline.messages import Message
from carryall.dynamics.pipeline.parcels import delivery, return_of, saved
from carryall.dynamics.pipeline.stages import PipelineStage
from carryall.dynamics.samplers import Room
from carryall.dynamics.screening import STATE_SHARE
from carryall.dynamics.status import SYSTEM_ID
from carryall.dynamics.stopping import StopRequested
from carryall.errors import CarryallError, InputError
from carryall.exchange.transport import PeerError

logger = logging.getLogger("carryall.dynamics")
ALIVE = 1.0
"""Seconds after which the loop over steps says that it goes on."""
SAMPLES = 64
"""Systems that tell how large a batch may be."""
SYNC, ASYNC_RECV, FULLY_ASYNC = COMM_MODES = ("sync", "async_recv", "fully_async")


@dataclass(frozen=True, eq=False)
class Conduct:
    """How a rank works."""

    comm_mode: str
    buffer: BufferConfig | None
    """How many systems it may have beside its batch; None: a quarter of what a batch may hold."""
    synchronized: bool
    checkpoint_seconds: float
    timeout: float


class Worker:
    """Works for one stage after the other, as the hub says, until the hub ends the run."""

    def __init__(
        self,
        rank: int,
        stages: Sequence[PipelineStage],
        own: int | None,
        channel: Channel,
        mail: queue.SimpleQueue[Message],
        conduct: Conduct,
    ) -> None:
        """own: the stage to begin with; None: the hub says. mail: what the channel receives."""
        self.rank, self.stages, self.channel, self.mail, self.conduct = rank, stages, channel, mail, conduct
        self.stage = own
        self.batch: Batch | None = None
        self.inbox = Inbox()
        self._limits: dict[int, Room] = {}
        self._edges: dict[int, int] = {}
        self._claimed: bool | None = None
        """Whether a claim is open, and then whether it was one of an idle rank."""
        self._sent = self._acknowledged = 0
        self._ended: Message | None = None
        self._dismissed = False
        """Whether the hub has nothing more to say."""
        self._assigned: int | None = None
        """Another stage that it has to work for."""
        self._share = False
        """Whether it has to give half of its systems to a rank that has none."""
        self._may_go = False
        now = time.monotonic()
        self._spoke, self._saved, self._wait = now, now, conduct.checkpoint_seconds
        self._step = 0

    # -- the loop

    def run(self, requested: Callable[[], bool]) -> None:
        """Work until the hub says that all is done; PeerError when it ends the run for a fault, StopRequested when asked to."""
        while self._ended is None:
            self._work(requested)
        error = self._ended.facts.get("error")
        self.leave(asked=False, wait=self._ended.kind == "stop")
        if error is not None:
            raise PeerError(error)
        if self._ended.kind == "stop":
            raise StopRequested

    def _work(self, requested: Callable[[], bool]) -> None:
        """Work for one stage, until the hub assigns another or ends the run."""
        with ExitStack() as opened:
            if self.stage is not None:
                opened.enter_context(self._streaming(self.engine))
                self.engine.begin_run(None)
                opened.enter_context(self.engine.opened())
            stage = self.stage
            while self._ended is None and self.stage == stage:
                if requested():
                    self.leave(asked=True, wait=True)
                    raise StopRequested
                self._turn(requested)

    def _turn(self, requested: Callable[[], bool]) -> None:
        """One step, and what is due after it."""
        self._read_mail()
        if self._assigned is not None:
            # a claim that is still open is dropped there
            self._give_back(half=False)
            self.stage, self._assigned, self._claimed = self._assigned, None, None
            return
        if self._share:
            self._share = False
            self._give_back(half=True)
        idle = self.batch is None or not self.engine.n_running(self.batch)
        if not idle:
            assert self.batch is not None
            self.engine.step(self.batch)
            self._step += 1
            idle = not self.engine.n_running(self.batch)
        frequency = 1 if self.stage is None else self.engine.refill.frequency
        if idle or self._step % frequency == 0:
            self._exchange(idle, requested)
        self._look()
        if self.conduct.synchronized and not idle:
            self.channel.send(Message("tick"))
            self._until(lambda: self._may_go, "the other ranks' step", requested)
            self._may_go = False

    @staticmethod
    @contextmanager
    def _streaming(engine: Engine) -> Iterator[None]:
        """Systems leave the engine after its `n_steps` steps of their own."""
        engine.in_pipeline = True
        try:
            yield
        finally:
            engine.in_pipeline = False
            engine.go_on_with(None, None)

    @property
    def engine(self) -> Engine:
        """The engine of the stage that it works for."""
        assert self.stage is not None
        return self.stages[self.stage].engine

    # -- systems that come and go

    def _exchange(self, idle: bool, requested: Callable[[], bool]) -> None:
        while True:
            if self.batch is not None and (idle or self._worth(self.batch.n_systems - self.engine.n_running(self.batch))):
                self.batch = removed(self.engine, self.batch, [_HandOn(self)])
                if self.conduct.comm_mode != FULLY_ASYNC:
                    self._until(lambda: self._sent == self._acknowledged, "word that its systems are in the ledger", requested)
            if self.batch is None and len(self.inbox):
                # a batch begins full, not with what was asked for ahead
                self._ask(self._room(), must=False, wait=False)
                self._until(lambda: self._claimed is None, "systems", requested)
            if self._interrupted:
                return
            self._enter()
            idle = self.batch is None or not self.engine.n_running(self.batch)
            # systems that cannot even start leave again at once
            if self.batch is None or not idle:
                break
        self._claim(idle)
        if self.conduct.comm_mode == SYNC and not idle:
            self._until(lambda: self._claimed is None, "systems", requested)
        elif idle:
            self._until(lambda: len(self.inbox) > 0, "systems", requested)

    def _worth(self, count: int) -> bool:
        return self.batch is None or count >= max(1, WORTH_REFILL * self.batch.n_systems)

    def _enter(self) -> None:
        """Arrived systems enter the batch, as far as they fit."""
        running = 0 if self.batch is None else self.engine.n_running(self.batch)
        if not len(self.inbox) or (running and not self._worth(len(self.inbox))):
            return
        taken = self.inbox.take(self._held(), self.limits)
        if taken:
            self.batch = entered(self.engine, self.batch, taken)
            self._edges |= {state.id: edges for state, _, edges in taken if edges}

    @property
    def limits(self) -> Room:
        """What a batch of the stage may hold: as given, or measured on the first systems."""
        assert self.stage is not None
        given = self.stages[self.stage].limits
        if given is not None:
            return given
        if self.stage not in self._limits:
            samples = [batch.get_data(0) for batch in self.inbox.batches[:SAMPLES]]
            if not samples:
                return Room(SAMPLES, CPU_ATOMS[0])
            model, skin = self.engine.model, self.engine.skin
            try:
                found = automatic_limits(lambda: FIRE(model, convergence_hook=-1.0, skin=skin), samples)
            except InputError:
                # one that the potential cannot work on: it fails by itself, and others tell
                return Room(SAMPLES, CPU_ATOMS[0])
            self._limits[self.stage] = Room(None, found.max_atoms, found.max_edges)
        return self._limits[self.stage]

    def _held(self) -> Room:
        """What the batch holds."""
        if self.batch is None:
            return Room(0, 0, 0)
        ids = self.batch.get(SYSTEM_ID).tolist() if self._edges else ()
        # counted as a system came in, which is near enough for a limit of memory
        self._edges = {index: self._edges.get(index, 0) for index in ids}
        return Room(self.batch.n_systems, self.batch.n_atoms, sum(self._edges.values()))

    def _claim(self, idle: bool) -> None:
        """Ask for systems, unless that was done already and nothing has changed."""
        must = idle and not len(self.inbox)
        if self._claimed is not None and (self._claimed or not must):
            return
        room = Room(0, 0) if self.stage is None else self._room()
        if must or not (room.n_systems == 0 or room.n_atoms == 0):
            self._ask(room, must, self.conduct.comm_mode != SYNC or must)

    def _ask(self, room: Room, must: bool, wait: bool) -> None:
        """Ask the hub for systems. must: for one at least; wait: until there are some, be it long."""
        self._claimed = must
        facts = {"stage": self.stage, "n_systems": room.n_systems, "n_atoms": room.n_atoms, "must": must, "wait": wait}
        self.channel.send(Message("claim", facts))

    def _room(self) -> Room:
        """What it can take: what the batch has room for, and the buffer, less what waits in the inbox."""
        limits, held, buffer = self.limits, self._held(), self.conduct.buffer
        prefetch = self.conduct.comm_mode != SYNC
        ahead = Room(0, 0)
        if prefetch and buffer is not None:
            ahead = Room(buffer.num_systems, buffer.num_nodes)
        elif prefetch:
            ahead = Room((limits.n_systems or 0) // 4, (limits.n_atoms or 0) // 4)
        return Room(
            _left(limits.n_systems, ahead.n_systems, (held.n_systems or 0) + len(self.inbox)),
            _left(limits.n_atoms, ahead.n_atoms, (held.n_atoms or 0) + self.inbox.n_atoms),
        )

    def hand_on(self, batch: Batch) -> None:
        """Send systems that are done with the stage; the hub tells when they are in the ledger."""
        assert self.stage is not None
        self._sent += 1
        self.channel.send(delivery(self.stage, self.stages[self.stage].name, self.engine, batch, self._sent))

    def _give_back(self, half: bool) -> None:
        """Send back systems that are not done: all, as the rank works for another stage, or half, for a rank without work."""
        if self.batch is not None:
            self.batch = removed(self.engine, self.batch, [_HandOn(self)])
        held = 0 if self.batch is None else self.batch.n_systems
        count = (held + len(self.inbox)) // 2 if half else held + len(self.inbox)
        untouched = self.inbox.drained(count)
        rows = list(range(held - (count - len(untouched)), held))
        engine = None if self.stage is None else self.engine
        self.channel.send(return_of(self.stage, engine, self.batch, rows, untouched, half))
        if self.batch is not None and rows:
            self.batch = without(self.engine, self.batch, rows)
        self.save()

    # -- the ledger

    def _look(self) -> None:
        """Say that the loop goes on, and save what is on its way, when it is time."""
        now = time.monotonic()
        if now - self._spoke >= ALIVE:
            self._spoke = now
            self.channel.send(Message("alive", {"step": self._step}))
            self._check_hub("at a step")
        if now - self._saved >= self._wait:
            self.save()
            self._saved = time.monotonic()
            self._wait = max(self.conduct.checkpoint_seconds, (self._saved - now) / STATE_SHARE)

    def save(self) -> None:
        """Have the ledger keep the batch as it is."""
        self.channel.send(saved(self.stage, None if self.stage is None else self.engine, self.batch, self._step))

    def leave(self, asked: bool, wait: bool) -> None:
        """Save, and tell the hub that this rank works no more. wait: until the ledger has it."""
        self.save()
        self.channel.send(Message("left", {"asked": asked}))
        deadline = time.monotonic() + self.conduct.timeout
        while wait and not self._dismissed and time.monotonic() < deadline:
            try:
                if self.mail.get(timeout=ALIVE).kind in ("end", "closed"):
                    return
            except queue.Empty:
                pass

    # -- mail

    def _read_mail(self) -> None:
        while True:
            try:
                self._take(self.mail.get_nowait())
            except queue.Empty:
                return

    def _until(self, there: Callable[[], bool], what: str, requested: Callable[[], bool]) -> None:
        """Wait until something is there, the run ends, or someone asks to stop; PeerError when rank 0 is silent."""
        while not (there() or self._interrupted or requested()):
            try:
                self._take(self.mail.get(timeout=ALIVE / 4))
            except queue.Empty:
                self._check_hub(f"waiting for {what}")
            self._look()

    @property
    def _interrupted(self) -> bool:
        """Whether the hub wants something else."""
        return self._ended is not None or self._assigned is not None

    def _check_hub(self, doing: str) -> None:
        if self.channel.silence > self.conduct.timeout:
            raise PeerError(
                f"rank {self.rank} heard nothing from rank 0, which keeps the ledger, for {self.conduct.timeout:.0f} s "
                f"({doing}): rank 0 was stopped, or the network is cut"
            )

    def _take(self, message: Message) -> None:
        facts = message.facts
        logger.debug("rank %d got %s %s", self.rank, message.kind, {key: facts[key] for key in facts if key != "primed"})
        if message.kind == "systems":
            self._claimed = None
            rows = zip(facts["ids"], facts["n_atoms"], message.blobs, facts["fresh"], facts["primed"], strict=True)
            states = [State(*row) for row in rows]
            self.inbox.add(states, self._cutoff_for_edges())
        elif message.kind == "assign":
            self._claimed, self._assigned = None, facts["stage"]
        elif message.kind == "share":
            self._share = True
        elif message.kind == "taken":
            self._acknowledged = facts["number"]
        elif message.kind == "go":
            self._may_go = True
        elif self._ended is not None and message.kind in ("end", "closed"):
            # the first word counts: why the run ends
            self._dismissed = True
        elif message.kind == "closed":
            raise PeerError(
                f"rank {self.rank}: the connection to rank 0, which keeps the ledger, ended without a word: rank 0 was killed, "
                f"or its machine is gone ({facts['reason']})"
            )
        elif message.kind in ("end", "stop"):
            self._ended = message
        else:
            raise CarryallError(f"rank {self.rank} got a message of kind {message.kind!r}, which it does not know")

    def _cutoff_for_edges(self) -> float | None:
        assert self.stage is not None
        known = self.stages[self.stage].limits or self._limits.get(self.stage)
        return None if known is not None and known.n_edges is None else self.engine.model.spec.cutoff


class _HandOn:
    """The sink of a stage: what is written to it is sent to the hub."""

    capacity, is_full = None, False

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __len__(self) -> int:
        return 0

    def write(self, batch: Batch, mask: Tensor | Sequence[bool] | np.ndarray | None = None) -> None:
        """Send the systems of `mask` (n_systems,) bool on."""
        rows = None if mask is None else torch.as_tensor(mask).nonzero().squeeze(1)
        self._worker.hand_on(batch if rows is None else batch.index_select(rows))

    def read(self) -> Batch:
        """The systems are with the hub."""
        raise CarryallError("systems that were handed on cannot be read back")

    drain = read

    def zero(self) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        """Nothing to close."""


def _left(limit: int | None, ahead: int | None, used: int) -> int | None:
    return None if limit is None else max(0, limit + (ahead or 0) - used)
