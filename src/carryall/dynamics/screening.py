"""Many structures through one optimizer, in flight: drawn as room gets free, written when done, saved on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.inputs import InputStream
from carryall.dynamics.ledger import InFlight
from carryall.dynamics.memory import BatchLimits, n_edges
from carryall.dynamics.results import OUTCOMES, RelaxResult
from carryall.dynamics.samplers import SizeAwareSampler
from carryall.dynamics.status import FMAX, OUTCOME, REASON, SYSTEM_ID, Outcome
from carryall.dynamics.stopping import StopRequested
from carryall.dynamics.structures import finished_structure
from carryall.dynamics.thermo import max_force
from carryall.errors import InputError

STATE_SHARE = 0.03
"""Part of the time that saving the batch on its way may take."""


class Store(Protocol):
    """Where results go: a `Ledger`, or memory."""

    def add(self, results: Iterable[RelaxResult], hashes: Mapping[int, bytes]) -> None:
        """Keep results, all or none."""
        ...

    def __contains__(self, index: object) -> bool: ...
    def __len__(self) -> int: ...
    def hash_of(self, index: int) -> bytes | None:
        """Content hash of an input that is done."""
        ...

    def in_flight(self) -> InFlight | None:
        """What an earlier run left on its way."""
        ...

    def save_in_flight(self, state: InFlight) -> None:
        """Keep what is on its way."""
        ...

    def clear_in_flight(self) -> None:
        """Nothing is on its way."""
        ...


class MemoryStore:
    """Results of a run that keeps nothing on disk."""

    def __init__(self) -> None:
        self._results: dict[int, RelaxResult] = {}

    def add(self, results: Iterable[RelaxResult], hashes: Mapping[int, bytes]) -> None:
        """Keep results."""
        self._results |= {one.index: one for one in results}

    def results(self) -> list[RelaxResult]:
        """All of them, in input order."""
        return [self._results[index] for index in sorted(self._results)]

    def __contains__(self, index: object) -> bool:
        return index in self._results

    def __len__(self) -> int:
        return len(self._results)

    def hash_of(self, index: int) -> bytes | None:
        """Nothing is known of an earlier run."""
        return None

    def in_flight(self) -> InFlight | None:
        """Nothing is left of an earlier run."""
        return None

    def save_in_flight(self, state: InFlight) -> None:
        """Memory ends with the process."""

    def clear_in_flight(self) -> None:
        """Nothing to clear."""


class TakenUp:
    """Inputs that need no drawing: those that are done, and those that an earlier run left on their way."""

    def __init__(self, store: Store, state: InFlight | None) -> None:
        self._store, self._hashes = store, {} if state is None else state.hashes

    def __contains__(self, index: object) -> bool:
        return index in self._hashes or index in self._store

    def hash_of(self, index: int) -> bytes | None:
        """Content hash of such an input."""
        return self._hashes.get(index) or self._store.hash_of(index)


class ResultSink:
    """Turns finished systems into results as they leave the batch; holds none itself."""

    capacity = None
    is_full = False

    def __init__(self, store: Store, stream: InputStream, steps_key: str, tell: Callable[[RelaxResult], None]) -> None:
        """steps_key: of the batch, with the steps of each system. tell: called with each result once it is kept."""
        self._store, self._stream, self._steps_key, self._tell = store, stream, steps_key, tell

    def __len__(self) -> int:
        return 0

    def write(self, batch: Batch, mask: Tensor | Sequence[bool] | np.ndarray | None = None) -> None:
        """Keep what became of the systems of `mask` (n_systems,) bool, None for all."""
        rows = range(batch.n_systems) if mask is None else torch.as_tensor(mask).nonzero().squeeze(1).tolist()
        outcomes, energies = batch.get(OUTCOME).tolist(), batch.energy.tolist()
        largest = (batch.get(FMAX) if FMAX in batch else max_force(batch)).tolist()
        names, steps = batch.get(SYSTEM_ID).tolist(), batch.get(self._steps_key).tolist()
        results = []
        for i in rows:
            given, data = self._stream.input(names[i]), finished_structure(self._stream.original(names[i]), batch, i)
            outcome, failed = OUTCOMES[Outcome(outcomes[i])], outcomes[i] == Outcome.FAILED
            reason = batch.info[i].get(REASON) if failed else None
            energy, fmax = (None, None) if failed else (energies[i], largest[i])
            results.append(RelaxResult(names[i], outcome, reason, steps[i], energy, fmax, data, given.source, given.frame))
        self.keep(results)

    def keep(self, results: Sequence[RelaxResult]) -> None:
        """Keep results, and forget their inputs."""
        if not results:
            return
        self._store.add(results, self._stream.hashes)
        for one in results:
            self._stream.done(one.index)
            self._tell(one)

    def read(self) -> Batch:
        """InputError: the systems are results by now."""
        raise InputError("a ResultSink holds no systems: read the results")

    drain = read

    def zero(self) -> None:
        """Nothing to forget."""


class StateSaver:
    """Saves the batch on its way, often, but so that it takes at most STATE_SHARE of the time; ends the run when asked to."""

    stage = HookStageEnum.AFTER_STEP
    frequency = 1

    def __init__(self, store: Store, stream: InputStream, seconds: float, requested: Callable[[], bool]) -> None:
        self._store, self._stream, self._requested = store, stream, requested
        self._seconds = self._wait = seconds
        self._saved = time.monotonic()

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Save when it is time; raise StopRequested when that is wanted."""
        stop = self._requested()
        if stop or time.monotonic() - self._saved >= self._wait:
            began = time.monotonic()
            self.save(batch, dynamics)
            self._saved = time.monotonic()
            self._wait = max(self._seconds, (self._saved - began) / STATE_SHARE)
        if stop:
            raise StopRequested

    def save(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Save now."""
        ids = batch.get(SYSTEM_ID).tolist()
        originals = {index: self._stream.as_bytes(index) for index in ids}
        hashes = {index: self._stream.hashes[index] for index in ids}
        current = dynamics.forces_are_current(batch)
        self._store.save_in_flight(InFlight(batch, dynamics.completed_steps, current, originals, hashes))


@dataclass(frozen=True, eq=False)
class Screening:
    """A run: what makes the optimizer, what fits into a batch, where inputs come from and results go."""

    make: Callable[..., BaseDynamics]
    """Called with `sampler` and `sinks` for work in flight, with neither for a system alone; `hooks` are added to its own."""
    stream: InputStream
    sink: ResultSink
    taken_up: TakenUp
    limits: BatchLimits
    refusal: Callable[[AtomicData], str | None]
    """Why a structure that exceeds the limits cannot even be run alone."""
    errors: str
    hooks: Sequence[Any]
    refill_frequency: int

    def run(self, state: InFlight | None) -> None:
        """Work until every input is done; `state`: systems to go on with."""
        waiting: list[tuple[int, AtomicData]] = []

        def on_oversized(index: int, data: AtomicData, reason: str) -> None:
            if (why := self.refusal(data)) is not None:
                self._fail(index, why)
            else:
                waiting.append((index, data))

        cutoff = self.make().model.spec.cutoff
        sampler = SizeAwareSampler(
            self.stream,
            self.limits.max_atoms,
            self.limits.max_edges,
            count_edges=None if self.limits.max_edges is None else lambda data: n_edges(data, cutoff),
            skip=self.taken_up,
            on_unreadable=self._fail,
            on_oversized=on_oversized,
        )
        engine = self.make(sampler=sampler, sinks=[self.sink], hooks=self.hooks, refill_frequency=self.refill_frequency)
        batch = None
        if state is not None:
            batch = state.batch
            engine.restore(batch, state.step_count, state.forces_current)
        left = engine.run(batch)
        assert left is None or left.n_systems == 0, "a system was left on its way"
        for index, data in waiting:
            alone = self.make(hooks=self.hooks).run(moving_batch([data], [index]))
            assert alone is not None
            self.sink.write(alone)

    def _fail(self, index: int, reason: str) -> None:
        if self.errors == "raise":
            raise InputError(f"structure {index}: {reason}")
        self.sink.keep([self.stream.failed(index, reason)])
