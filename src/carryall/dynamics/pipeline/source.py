"""Where the inputs of a pipeline come from: a sampler, any structures, or a batch; each becomes a system of the first stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.dynamics.blobs import batch_to_bytes, content_hash
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.inputs import MOVING, InputStream
from carryall.dynamics.memory import n_edges
from carryall.dynamics.pipeline.books import Books, State, TakenUp
from carryall.dynamics.results import RelaxResult
from carryall.dynamics.samplers import Room, SizeAwareSampler
from carryall.dynamics.status import OUTCOME, REASON, STATUS, SYSTEM_ID
from carryall.dynamics.structures import check_structure, structure_iterable
from carryall.errors import InputError
from carryall.graph.potential import Potential


@dataclass(frozen=True, eq=False)
class Source:
    """Inputs that have not been taken up."""

    sampler: SizeAwareSampler | None
    stream: InputStream | None = None
    """What the sampler draws from, where it knows the inputs' files."""
    read_ahead: tuple[TakenUp, ...] = ()
    """Systems of a given batch."""

    @property
    def exhausted(self) -> bool:
        """Whether all were taken up."""
        return self.sampler is None or self.sampler.exhausted

    def draw(self, room: Room, must: bool) -> list[TakenUp]:
        """Inputs that fit into a room; at least one where `must` says so and there is one."""
        if self.sampler is None:
            return []
        return [self._taken_up(index, data) for index, data in self.sampler.draw(room, must)]

    def first(self, books: Books) -> AtomicData | None:
        """An input that is taken up at once, to know the potentials by; None where there is none."""
        if self.read_ahead:
            return self.read_ahead[0].original
        taken = self.draw(Room(1), must=True)
        books.take_up(taken)
        return taken[0].original if taken else None

    def n_left(self, n_known: int) -> int | None:
        """How many were not taken up, with `n_known` inputs known to the books; None where nobody knows."""
        if self.sampler is None:
            return 0
        total = self.sampler.n_total
        return None if total is None else max(total - n_known, 0)

    def _taken_up(self, index: int, data: AtomicData) -> TakenUp:
        state = State(index, data.n_atoms, batch_to_bytes(moving_batch([data], [index]), {}))
        if self.stream is None:
            return TakenUp(state, data, content_hash(data))
        given = self.stream.input(index)
        taken = TakenUp(state, self.stream.original(index), self.stream.hashes[index], given.source, given.frame)
        self.stream.done(index)
        return taken


def source_of(structures: Any, sampler: SizeAwareSampler | None, models: Sequence[Potential], books: Books) -> Source:
    """The source of a run: a sampler of the first stage, or what `run` was given; known inputs are left out.

    models: of the stages; an input that one of them cannot work on fails before it starts.
    """
    if structures is not None and sampler is not None:
        raise InputError("the first stage has a sampler: run() takes no structures then; give them to one of the two")
    if sampler is not None:
        sampler.report(books, partial(_refuse, books, None))
        return Source(sampler)
    if structures is None:
        raise InputError("the pipeline has nothing to work on: give run(structures), or the first stage a sampler")
    if isinstance(structures, Batch):
        return Source(None, read_ahead=tuple(_of_batch(structures, books)))
    stream = InputStream(structure_iterable(structures), _check_for(models), books, (*MOVING, "velocities"))
    cutoff = models[0].spec.cutoff
    drawn = SizeAwareSampler(
        _Sized(stream, structures) if hasattr(structures, "__len__") else stream,
        count_edges=lambda data: n_edges(data, cutoff),
        skip=books,
        on_unreadable=partial(_refuse, books, stream),
    )
    return Source(drawn, stream)


@dataclass(frozen=True, eq=False)
class _Sized:
    """A stream that knows how many inputs there are, where the structures do; not indexed, so that it is read in order."""

    stream: InputStream
    structures: Any

    def __iter__(self) -> Any:
        return iter(self.stream)

    def __len__(self) -> int:
        return len(self.structures)

    @property
    def first_index(self) -> int:
        """Number of the first input."""
        return self.stream.first_index


def _check_for(models: Sequence[Potential]) -> Callable[[AtomicData], None]:
    different = list({id(one): one for one in models}.values())

    def check(data: AtomicData) -> None:
        for one in different:
            check_structure(data, one)

    return check


def _refuse(books: Books, stream: InputStream | None, index: int, reason: str) -> None:
    if stream is None:
        books.refuse(RelaxResult(index, "failed", reason, 0, None, None, None), None)
        return
    books.refuse(stream.failed(index, reason), stream.hashes.get(index))
    stream.done(index)


def _of_batch(batch: Batch, books: Books) -> list[TakenUp]:
    """The systems of a batch with all they carry, numbered by `system_id` or by their order; failed ones stay failed."""
    ids = batch.get(SYSTEM_ID).tolist() if SYSTEM_ID in batch else list(range(batch.n_systems))
    if min(ids, default=0) < 0:
        raise InputError(f"a system of the batch has system_id {min(ids)}: ids are 0 or more")
    if len(set(ids)) < len(ids):
        raise InputError("two systems of the batch have the same system_id: each input has one of its own")
    found = []
    for place, index in enumerate(ids):
        one = batch.index_select([place])
        data = one.get_data(0)
        content = content_hash(data)
        if index in books:
            if books.hash_of(index) != content:
                raise InputError(
                    f"system {index} of the batch is not the structure that this run had there before: give the same batch"
                )
            continue
        if REASON not in one.info[0]:
            for key in (STATUS, OUTCOME):
                if key in one:
                    one.remove(key)
        data = data.replace(info={key: value for key, value in data.info.items() if key != REASON})
        found.append(TakenUp(State(index, data.n_atoms, batch_to_bytes(one, {})), data, content))
    return found
