"""The structures of a long run as they come: checked one by one, known again when a run is resumed, kept while on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Sequence
from typing import Any, Protocol

from carryall.data.atomic_data import AtomicData, unchecked
from carryall.data.fields import FIELDS
from carryall.dynamics.blobs import content_hash, structure_from_bytes, structure_to_bytes
from carryall.dynamics.results import RelaxResult
from carryall.dynamics.samplers import Unreadable
from carryall.dynamics.structures import Check, Input, checked_input, each, first_index_of, read_input
from carryall.errors import CarryallError

MOVING = ("positions", "atomic_numbers", "cell", "pbc", "masses", "charges", "spins")
"""Fields of a structure that a relaxation reads."""


class Before(Protocol):
    """What an earlier run knows of inputs: which were taken up (`in`), and what they were."""

    def __contains__(self, index: object) -> bool: ...
    def hash_of(self, index: int) -> bytes | None:
        """Content hash of an input that was taken up; None where it could not be read."""
        ...


class InputStream:
    """Iterates over what a sampler draws: structures without labels, `Unreadable` for what cannot be worked on.

    It reads ahead only when asked to `peek`, and keeps an input until `done` is told.
    """

    def __init__(self, structures: Any, check: Check, before: Before, keep: Sequence[str] = MOVING) -> None:
        """structures: as `structure_iterable` gives them. check: InputError for what cannot be worked on.

        before: what an earlier run knows of inputs. keep: fields of a structure that are passed on.
        """
        self.first_index = first_index_of(structures)
        """Number of the first input: a shard of a larger run goes on where the one before it ends."""
        self._source = enumerate(each(structures), self.first_index)
        self._check, self._before, self._keep = check, before, frozenset(keep)
        self._ahead: deque[Input] = deque()
        self._held: dict[int, Input] = {}
        self._bytes: dict[int, bytes] = {}
        self.hashes: dict[int, bytes] = {}
        """Of the inputs that are kept."""
        self.n_read = 0
        """Inputs that came so far."""

    def peek(self, count: int) -> list[Input]:
        """The next `count` inputs, fewer at the end; they still come."""
        while len(self._ahead) < count:
            following = self._pulled()
            if following is None:
                break
            self._ahead.append(following)
        return list(self._ahead)

    def trust(self) -> None:
        """All inputs have been checked: they are only converted from now on."""
        self._check = _nothing

    def __iter__(self) -> Iterator[AtomicData | Unreadable]:
        while (one := self._ahead.popleft() if self._ahead else self._pulled()) is not None:
            if one.index in self._before:
                yield Unreadable("it was taken up before")  # the sampler skips it
                continue
            self._held[one.index] = one
            if one.data is not None:
                self.hashes[one.index] = content_hash(one.data)
            yield _moving(one.data, self._keep) if one.data is not None and one.reason is None else Unreadable(one.reason or "")

    def input(self, index: int) -> Input:
        """An input that is kept."""
        return self._held[index]

    def original(self, index: int) -> AtomicData:
        """The structure of an input that is kept, as it was given."""
        data = self._held[index].data
        assert data is not None
        return data

    def as_bytes(self, index: int) -> bytes:
        """An input that is kept, for `take_up`."""
        if index not in self._bytes:
            one = self._held[index]
            assert one.data is not None
            facts = {"source": one.source, "frame": one.frame, "info": one.data.info}
            self._bytes[index] = structure_to_bytes(one.data.replace(info=facts))
        return self._bytes[index]

    def take_up(self, index: int, blob: bytes, content: bytes) -> None:
        """Keep an input of an earlier run that is on its way."""
        data = structure_from_bytes(blob)
        facts = data.info
        self._held[index] = Input(index, data.replace(info=facts["info"]), None, facts["source"], facts["frame"])
        self._bytes[index], self.hashes[index] = blob, content

    def failed(self, index: int, reason: str) -> RelaxResult:
        """The result of an input that was not worked on."""
        one = self._held[index]
        return RelaxResult(index, "failed", reason, 0, None, None, one.data, one.source, one.frame)

    def done(self, index: int) -> None:
        """Forget an input."""
        for table in (self._held, self._bytes, self.hashes):
            table.pop(index, None)

    def _pulled(self) -> Input | None:
        following: tuple[int, Any] | None = next(self._source, None)
        if following is None:
            return None
        self.n_read += 1
        if following[0] not in self._before:
            return checked_input(*following, self._check)
        one, known = read_input(*following), self._before.hash_of(following[0])
        if known is not None and (one.data is None or content_hash(one.data) != known):
            where = "" if one.source is None else f" ({one.source}{'' if one.frame is None else f', frame {one.frame}'})"
            raise CarryallError(
                f"input {one.index}{where} is not the structure that this run had there before: "
                "give the same inputs in the same order, or write elsewhere"
            )
        return one


def _nothing(data: AtomicData) -> None:
    pass


def _moving(data: AtomicData, keep: Container[str]) -> AtomicData:
    """The fields to keep and all extras, without facts."""
    values = {name: value for name in FIELDS if name in keep and (value := getattr(data, name)) is not None}
    return unchecked(values, {"atom": data.atom_extras, "system": data.system_extras}, {})
