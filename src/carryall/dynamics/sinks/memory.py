"""Finished systems in main memory."""

from __future__ import annotations

from carryall.data.batch import Batch
from carryall.dynamics.sinks.base import Mask, SinkBase
from carryall.dynamics.sinks.joining import joined_with_blanks, with_levels_of


class MemorySink(SinkBase):
    """Holds systems in main memory, whatever device they come from.

    >>> sink = MemorySink(capacity=100)
    >>> len(sink), sink.is_full
    (0, False)
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self._parts: list[Batch] = []
        self._levels: dict[str, str] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def write(self, batch: Batch, mask: Mask = None) -> None:
        """Add a copy of the systems of `mask`, all by default; SinkFullError, with nothing added, when they do not all fit."""
        chosen = self._chosen(batch, mask)
        if not len(chosen):
            return
        levels = with_levels_of(batch, self._levels)
        self._parts.append(batch.index_select(chosen).to("cpu"))
        self._levels = levels
        self._count += len(chosen)

    def read(self) -> Batch:
        """All systems in the order in which they were written; InputError when there is none."""
        self._check_not_empty()
        return joined_with_blanks(self._parts)

    def zero(self) -> None:
        """Forget all systems."""
        self._parts, self._levels, self._count = [], {}, 0
