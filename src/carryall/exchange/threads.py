"""Ranks that are threads of one process: to try and to test a parallel model without MPI or torchrun.

Messages go through memory. A rank that waits for one that will never come is told at once: its peer has ended, has failed, or
all ranks wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import TypeVar

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.exchange.transport import Messages

T = TypeVar("T")


class NobodySendsError(InputError):
    """A rank waits in vain; the reason is another rank's."""


class Group:
    """The mail of `size` ranks, and who still takes part."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._news = Condition()
        self._mail: dict[tuple[int, int], deque[Tensor]] = {(a, b): deque() for a in range(size) for b in range(size)}
        self._ended: dict[int, str] = {}
        self._waits: dict[int, int] = {}

    def put(self, source: int, target: int, values: Tensor) -> None:
        """Send a copy."""
        with self._news:
            self._mail[source, target].append(values.detach().clone())
            self._news.notify_all()

    def get(self, source: int, target: int) -> Tensor:
        """The next message; NobodySendsError when there will be none."""
        with self._news:
            box = self._mail[source, target]
            self._waits[target] = source
            while not box:
                if why := self._hopeless(source, target):
                    self._news.notify_all()
                    raise NobodySendsError(why)
                self._news.wait()
            del self._waits[target]
            return box.popleft()

    def end(self, rank: int, error: Exception | None) -> None:
        """The rank takes no part any more."""
        with self._news:
            reason = "has ended" if error is None else f"has failed ({type(error).__name__}: {error})"
            self._ended[rank] = reason
            self._news.notify_all()

    def _hopeless(self, source: int, target: int) -> str | None:
        waits = f"rank {target} waits for a message of rank {source}"
        if source in self._ended:
            return f"{waits}, which {self._ended[source]}: every rank has to make every exchange, one without atoms too"
        running = [rank for rank in range(self.size) if rank not in self._ended]
        if all(rank in self._waits and not self._mail[self._waits[rank], rank] for rank in running):
            return f"{waits}, and so do all others: ranks have to make the same exchanges in the same order"
        return None


class ThreadTransport:
    """One rank of a group in threads; see `run_ranks`."""

    def __init__(self, rank: int, group: Group) -> None:
        self.rank, self.size, self._group = rank, group.size, group
        self.messages: list[tuple[int, int]] = []
        """(peer, bytes) of each message sent point to point."""

    def device(self, device: torch.device) -> torch.device:
        """Data stays where it is."""
        return device

    def send_receive(self, sends: Messages, receives: Messages) -> None:
        """Send all, then receive; InputError when a message is not as long as this rank expects."""
        for peer, buffer in sends:
            self.messages.append((peer, buffer.numel()))
            self._group.put(self.rank, peer, buffer)
        for peer, buffer in receives:
            found = self._group.get(peer, self.rank)
            if found.shape != buffer.shape:
                raise InputError(
                    f"rank {peer} sent {found.numel()} bytes, rank {self.rank} expects {buffer.numel()}: ranks have to make "
                    "the same exchanges in the same order"
                )
            buffer.copy_(found)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the group; InputError where ranks sum different things."""
        parts = self._everyones([values] * self.size)
        kinds = [f"{part.dtype} {list(part.shape)}" for part in parts]
        if len(set(kinds)) > 1:
            raise InputError(f"ranks disagree on what is summed, rank by rank: {', '.join(kinds)}")
        return torch.stack(parts).sum(0, dtype=values.dtype)

    def all_to_all(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """One to each, one from each."""
        return self._everyones(rows)

    def _everyones(self, rows: Sequence[Tensor]) -> list[Tensor]:
        for peer, row in enumerate(rows):
            self._group.put(self.rank, peer, row)
        return [self._group.get(peer, self.rank) for peer in range(self.size)]


def run_ranks(size: int, function: Callable[[ThreadTransport], T]) -> list[T]:
    """What the function returns on each rank, each in a thread of its own.

    Raises what the first rank that failed raised, rather than what others say who waited for it.
    """
    group = Group(size)

    def run(rank: int) -> T:
        error: Exception | None = None
        try:
            return function(ThreadTransport(rank, group))
        except Exception as caught:
            error = caught
            raise
        finally:
            group.end(rank, error)

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [future.exception() for future in futures]
    failed = [error for error in errors if error is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, NobodySendsError)):
        raise error
    return [future.result() for future in futures]
