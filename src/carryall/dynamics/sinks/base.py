"""What a sink is: where finished systems go, each with everything that it carries, and how several are filled in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self, TypeAlias, runtime_checkable

import filelock
import numpy as np
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.levels import mask_index
from carryall.errors import InputError

Mask: TypeAlias = "Tensor | np.ndarray | Sequence[bool] | None"


class SinkFullError(InputError):
    """More systems than fit; nothing was written."""

    def __init__(self, message: str, fits: int) -> None:
        super().__init__(message)
        self.fits = fits
        """How many systems would have fitted."""


@runtime_checkable
class DataSink(Protocol):
    """A place for systems. What is written is a copy; systems come back in the order in which they were written."""

    @property
    def capacity(self) -> int | None:
        """Systems that it can hold; None for no limit."""

    @property
    def is_full(self) -> bool:
        """Whether no further system fits."""

    def __len__(self) -> int:
        """Systems that it holds."""

    def write(self, batch: Batch, mask: Mask = None) -> None:
        """Add the systems of `batch` where `mask` (n_systems,) bool is true, all by default, with every key and their info.

        SinkFullError when they do not all fit; whatever it raises, nothing was written then.
        """

    def read(self) -> Batch:
        """All systems, as `carryall.dynamics.sinks.joining` joins them; InputError when there is none."""

    def drain(self) -> Batch:
        """All systems, which are in the sink no longer; InputError when there is none."""

    def zero(self) -> None:
        """Forget all systems."""

    def close(self) -> None:
        """Let go of files; a closed sink takes nothing more."""


class SinkBase:
    """What the sinks here have in common: the capacity and its check."""

    def __init__(self, capacity: int | None) -> None:
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0):
            raise InputError(
                f"the capacity of {type(self).__name__} must be an integer of at least 0 or None, got {capacity!r}"
            )
        self._capacity = capacity

    @property
    def capacity(self) -> int | None:
        """Systems that it can hold; None for no limit."""
        return self._capacity

    @property
    def is_full(self) -> bool:
        """Whether no further system fits."""
        return self._capacity is not None and len(self) >= self._capacity

    def __len__(self) -> int:
        raise NotImplementedError

    def __bool__(self) -> bool:
        # An empty sink is a sink: `sink or other` must not pass it over.
        return True

    def read(self) -> Batch:
        """All systems in the order in which they were written; InputError when there is none."""
        raise NotImplementedError

    def zero(self) -> None:
        """Forget all systems."""
        raise NotImplementedError

    def drain(self) -> Batch:
        """All systems, which are in the sink no longer; InputError when there is none."""
        found = self.read()
        self.zero()
        return found

    def close(self) -> None:
        """Let go of what is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} systems, capacity={self._capacity})"

    def _chosen(self, batch: Batch, mask: Mask) -> np.ndarray:
        """Indices (k,) int64 of the systems to write, which fit."""
        chosen = mask_index(mask, batch.n_systems)
        if self._capacity is not None and len(self) + len(chosen) > self._capacity:
            fits = max(0, self._capacity - len(self))
            raise SinkFullError(
                f"{len(chosen)} systems do not fit into {type(self).__name__}: it holds {len(self)} of {self._capacity}, "
                f"{fits} more fit; nothing was written",
                fits,
            )
        return chosen

    def _check_not_empty(self) -> None:
        if len(self) == 0:
            raise InputError(f"{type(self).__name__} holds no system: nothing to read")


def exclusive(path: Path) -> filelock.FileLock:
    """A lock for the one process that writes to a file; InputError when another has it."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist: make it first")
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"{path}: another process, or another sink, writes to it: wait for it, or write elsewhere") from None
    return lock


def write_in_order(sinks: Sequence[DataSink], batch: Batch, mask: Mask = None) -> None:
    """Write the systems of `mask` to the first sinks that have room, in order: what does not fit into one goes to the next.

    SinkFullError, before anything is written, when all together have too little room. When a sink itself fails, such as by a
    full disk, the error says which systems had been written to the sinks before it.
    """
    chosen = mask_index(mask, batch.n_systems)
    rooms = [len(chosen) if sink.capacity is None else max(0, sink.capacity - len(sink)) for sink in sinks]
    if sum(rooms) < len(chosen):
        raise SinkFullError(
            f"{len(chosen)} systems do not fit into the {len(sinks)} sinks: {sum(rooms)} fit, nothing was written. "
            "Give a further sink or one without a capacity",
            sum(rooms),
        )
    first = 0
    for sink, room in zip(sinks, rooms, strict=True):
        taken = chosen[first : first + room]
        if not len(taken):
            continue
        here = np.zeros(batch.n_systems, dtype=bool)
        here[taken] = True
        try:
            sink.write(batch, here)
        except Exception as error:
            if first:
                error.add_note(f"systems {chosen[:first].tolist()} of the batch are in the sinks before {sink!r} already")
            raise
        first += len(taken)
