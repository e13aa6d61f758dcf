"""`a | b | c`: stages one behind the other, each on ranks of its own, every system accounted for."""

from __future__ import annotations

import logging
import queue
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from carryall.dynamics.buffers import BufferConfig
from carryall.dynamics.ledger import Ledger, LedgerResults
from carryall.dynamics.pipeline.books import Books
from carryall.dynamics.pipeline.channel import Channel
from carryall.dynamics.pipeline.hub import LEAVING, Desk, Hub, Rules
from carryall.dynamics.pipeline.lines import Keeper, Line, admitting, tell_late_ones
from carryall.dynamics.pipeline.meeting import Reception, World, knock, world
from carryall.dynamics.pipeline.messages import Message
from carryall.dynamics.pipeline.potentials import check_potentials, remember_potentials
from carryall.dynamics.pipeline.report import live_table
from carryall.dynamics.pipeline.settlement import SinkOrOpener, Sinks
from carryall.dynamics.pipeline.source import source_of
from carryall.dynamics.pipeline.stages import PipelineStage, Stage, as_stage, checked, program_of
from carryall.dynamics.pipeline.worker import ASYNC_RECV, COMM_MODES, Conduct, Worker
from carryall.dynamics.results import FINISHED_STRUCTURES, RelaxResult, export
from carryall.dynamics.stopping import StopRequested
from carryall.errors import InputError, nearest
from carryall.exchange.transport import PeerError
from carryall.interrupt import stop_between_steps

SETTINGS = ("comm_mode", "buffer_config", "synchronized", "helping", "sinks", "timeout", "step_timeout", "debug_mode")


class DistributedPipeline:
    """Stages over the ranks of torchrun, rank by rank in the order of the stages; on one rank without it, in turn.

    Rank 0 keeps the ledger and decides where each system is; see `carryall.dynamics.pipeline.hub`. What a system carries
    travels with it, and each stage gives it its fresh state and its `init_fn`.
    """

    def __init__(
        self,
        stages: Sequence[Stage] | Mapping[int, Stage],
        *,
        comm_mode: str = ASYNC_RECV,
        buffer_config: BufferConfig | Mapping[str, int] | None = None,
        synchronized: bool = False,
        helping: bool = False,
        sinks: Sequence[SinkOrOpener] = (),
        timeout: float = 30.0,
        step_timeout: float = 1800.0,
        debug_mode: bool = False,
    ) -> None:
        """stages: at least two dynamics, fused stages or `PipelineStage`s; a mapping is taken in the order of its keys.

        comm_mode: "async_recv": systems are asked for ahead, so that they are there when there is room; "sync": only when
        there is room, and waited for; "fully_async": nor does a rank wait until the ledger has what it handed on.
        buffer_config: systems that a rank may ask for ahead; a quarter of its batch by default.
        synchronized: all ranks step together, to find faults. helping: a rank whose stage has nothing to do works for the one
        with the most systems waiting; not with hooks that write files, which two ranks would share.
        sinks: where results go beside the ledger, in the order in which they are filled: sinks, or functions that open one,
        which are called on rank 0 only; those of the last stage by default.
        timeout: seconds without a sign of life after which a rank counts as gone. step_timeout: seconds that one step may take.
        debug_mode: log every message.
        """
        ordered = [stages[key] for key in sorted(stages)] if isinstance(stages, Mapping) else list(stages)
        self._given = tuple(as_stage(one) for one in ordered)
        self.stages = checked(self._given)
        if comm_mode not in COMM_MODES:
            known = nearest(str(comm_mode), COMM_MODES)
            raise InputError(f"comm_mode must be one of {', '.join(COMM_MODES)}, got {comm_mode!r}{known}")
        for name, value in (("timeout", timeout), ("step_timeout", step_timeout)):
            if not value > 0:
                raise InputError(f"{name} must be more than 0 s, got {value!r}")
        self.comm_mode, self.synchronized, self.helping = comm_mode, synchronized, helping
        self.buffer_config = None if buffer_config is None else BufferConfig.of(buffer_config)
        self.sinks = tuple(sinks) or self.stages[-1].engine.refill.sinks
        self.timeout, self.step_timeout, self.debug_mode = float(timeout), float(step_timeout), debug_mode

    @property
    def n_ranks(self) -> int:
        """Ranks that all stages have together."""
        return sum(one.n_ranks for one in self.stages)

    def stage_of(self, rank: int) -> int:
        """The stage of a rank."""
        return [stage for stage, one in enumerate(self.stages) for _ in range(one.n_ranks)][rank]

    def with_settings(self, **settings: Any) -> DistributedPipeline:
        """The same stages with other settings, those of the constructor."""
        return DistributedPipeline(self._given, **{**self._settings(), **settings})

    def __or__(self, other: Stage | DistributedPipeline) -> DistributedPipeline:
        """`(a | b) | c`: stages in one row; the settings of the left one stay."""
        return chain(self, other)

    def __repr__(self) -> str:
        stages = " | ".join(one.name if one.n_ranks == 1 else f"{one.name} * {one.n_ranks}" for one in self.stages)
        return f"DistributedPipeline({stages}, comm_mode={self.comm_mode!r})"

    def run(
        self,
        structures: Any = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        checkpoint_seconds: float = 10.0,
        progress: bool = True,
        on_start: Callable[[], None] | None = None,
    ) -> Sequence[RelaxResult] | None:
        """Bring every input through all stages; on rank 0 the results in input order, None on the others.

        structures: a batch, or what `relax` takes, of which rank 0 alone reads; None where the first stage has a sampler.
        An input that cannot be worked on, or a system that fails in a stage, is a result "failed" with its reason.
        out: folder for the ledger, finished.extxyz and results.csv; resume: go on with the run in it, with any number of ranks.
        Batches on their way are saved every `checkpoint_seconds`, less often where that would cost more than 3 % of the time.
        progress: a live table on rank 0's terminal. on_start: called on each rank when it has met the others.

        InputError before any rank waits: the number of ranks is neither that of the stages nor 1, or ranks run different
        programs. PeerError: another rank failed or is gone; its own error is in the message. StopRequested (a
        KeyboardInterrupt): SIGTERM or Ctrl-C, everything is saved.
        """
        if resume and out is None:
            raise InputError("resume=True needs out=, the folder of the run")
        if not checkpoint_seconds >= 0:
            raise InputError(f"checkpoint_seconds must be 0 or more, got {checkpoint_seconds}")
        if self.debug_mode:
            logging.getLogger("carryall.dynamics").setLevel(logging.DEBUG)
        with world() as here, stop_between_steps() as requested:
            if here.size not in (1, self.n_ranks):
                raise InputError(
                    f"the pipeline has {len(self.stages)} stages on {self.n_ranks} ranks, torchrun has started {here.size}: "
                    f"start it with --nproc-per-node {self.n_ranks}, or without torchrun to work in turn"
                )
            conduct = Conduct(self.comm_mode, self.buffer_config, self.synchronized, checkpoint_seconds, self.timeout)
            if here.rank:
                self._follow(here, conduct, requested, on_start)
                return None
            return self._lead(here, conduct, requested, structures, out, resume, progress, on_start)

    # -- inside

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS}

    def _follow(
        self, here: World, conduct: Conduct, requested: Callable[[], bool], on_start: Callable[[], None] | None
    ) -> None:
        """A rank that only steps."""
        found = here.share(None)
        if isinstance(found, str):
            raise InputError(found)
        mail: queue.SimpleQueue[Message] = queue.SimpleQueue()
        channel = Channel(knock(found, here.rank, self.timeout, requested), mail.put)
        try:
            channel.send(Message("hello", {"rank": here.rank, "program": program_of(self.stages)}))
            self._work(Worker(here.rank, self.stages, self.stage_of(here.rank), channel, mail, conduct), requested, on_start)
        finally:
            channel.close()

    def _work(self, worker: Worker, requested: Callable[[], bool], on_start: Callable[[], None] | None) -> None:
        """Run a worker; what ends it is told to the hub first."""
        try:
            if on_start is not None:
                on_start()
            worker.run(requested)
        except StopRequested:
            raise
        except BaseException as error:
            worker.channel.send(Message("failed", {"error": f"{type(error).__name__}: {error}"}))
            worker.channel.send(Message("left"))
            raise

    def _lead(
        self,
        here: World,
        conduct: Conduct,
        requested: Callable[[], bool],
        structures: Any,
        out: str | Path | None,
        resume: bool,
        progress: bool,
        on_start: Callable[[], None] | None,
    ) -> Sequence[RelaxResult]:
        """Rank 0, which keeps the books too."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out)
            try:
                hub, lines = self._begin(stack, here, folder, structures, resume)
                others = range(1, here.size)
                reception = stack.enter_context(closing(Reception(len(others), admitting(hub, lines)))) if others else None
            except BaseException as error:
                here.share(f"rank 0 could not begin: {error}")
                raise
            here.share(None if reception is None else reception.address)
            near, far = Pipe()
            lines[0].channel = Channel(near, lambda message: hub.inbox.put((0, message)))
            mail: queue.SimpleQueue[Message] = queue.SimpleQueue()
            channel = Channel(far, mail.put)
            keeper = Keeper(hub, stack.enter_context(live_table(progress)))
            keeper.thread.start()
            ended: BaseException | None = None
            try:
                self._work(Worker(0, self.stages, hub.desks[0].own, channel, mail, conduct), requested, on_start)
            except BaseException as error:
                ended = error
            finally:
                keeper.thread.join(LEAVING + self.timeout)
                tell_late_ones(lines)
                for line in lines:
                    line.close()
                channel.close()
            _raise_first(ended, keeper.failure, hub.error)
            hub.books.close(len(hub.books.known))
            if out is None:
                return list(hub.books.ledger.results())
            export(folder, hub.books.ledger.results(), FINISHED_STRUCTURES)
        return LedgerResults(folder)

    def _begin(self, stack: ExitStack, here: World, folder: Path, structures: Any, resume: bool) -> tuple[Hub, list[Line]]:
        """Open the ledger, the sinks and the inputs; a line for each rank."""
        program = program_of(self.stages)
        ledger = stack.enter_context(Ledger(folder, {"stages": program}, resume))
        sinks = stack.enter_context(Sinks(self.sinks))
        books = Books(ledger, len(self.stages))
        models = [one.engine.model for one in self.stages]
        source = source_of(structures, self.stages[0].engine.refill.sampler, models, books)
        check_potentials(ledger, self.stages)
        first = source.first(books)
        if first is not None:
            remember_potentials(ledger, self.stages, first)
        elif not len(books.known):
            raise InputError("no structures: give at least one")
        names, counts = tuple(one.name for one in self.stages), tuple(one.n_ranks for one in self.stages)
        rules = Rules(names, counts, self.helping or here.size == 1, self.timeout, self.step_timeout, program)
        lines = [Line() for _ in range(here.size)]
        own = [None] if here.size == 1 else [self.stage_of(rank) for rank in range(here.size)]
        desks = [Desk(rank, own[rank], line.send, line.silence, here=rank == 0) for rank, line in enumerate(lines)]
        return Hub(books, source, sinks, rules, desks), lines


def _raise_first(ended: BaseException | None, failure: BaseException | None, error: str | None) -> None:
    """Raise what ended a run: rank 0's own error, the hub's, another rank's, and only then that it was asked to stop.

    torchrun asks all ranks to stop when one has failed.
    """
    if ended is not None and not isinstance(ended, (StopRequested, PeerError)):
        raise ended
    if failure is not None:
        raise failure
    if error is not None:
        raise PeerError(error) from None
    if ended is not None:
        raise ended


def chain(left: Any, right: Any) -> DistributedPipeline:
    """All stages of both in one row; the settings of a pipeline stay, of two those of the left one."""
    settings: dict[str, Any] = {}
    stages: list[PipelineStage] = []
    for one in (left, right):
        if isinstance(one, DistributedPipeline):
            settings = settings or one._settings()
            # names are numbered, and limits passed on, for the whole row
            stages += one._given
        else:
            stages.append(as_stage(one))
    return DistributedPipeline(stages, **settings)
