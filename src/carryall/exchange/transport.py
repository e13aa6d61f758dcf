"""How rows move between ranks: what a transport has to offer, and how ranks agree that something is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from carryall.errors import CarryallError, InputError

Messages = Sequence[tuple[int, Tensor]]
"""Peers and contiguous uint8 buffers, none of them empty."""


class PeerError(CarryallError, ConnectionError):
    """Another rank is gone, was silent for too long, or sent something else than was due; the message names both ranks."""


class Transport(Protocol):
    """Moves data between the ranks of one group; every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This process among the `size`."""
        ...

    @property
    def size(self) -> int:
        """Processes in the group."""
        ...

    def device(self, device: torch.device) -> torch.device:
        """Where messages have to lie, for data on `device`."""
        ...

    def send_receive(self, sends: Messages, receives: Messages) -> None:
        """Point to point: send buffers, and fill those to receive. Both ends know who sends what; others wait for nothing.

        A rank that has nothing to send or receive calls it too: transports may count calls to tell messages apart.
        """
        ...

    def all_reduce(self, values: Tensor) -> Tensor:
        """A new tensor, the sum over all ranks; bit by bit the same on each."""
        ...

    def all_to_all(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """int64 vectors, one to each rank, to those that came from each; for setting up only."""
        ...


def agree(transport: Transport, problem: str | None) -> None:
    """InputError on every rank when one has a problem, naming the ranks; collective."""
    if transport.size == 1:
        if problem is not None:
            raise InputError(problem)
        return
    if not int(transport.all_reduce(torch.tensor([problem is not None], dtype=torch.int64))):
        return
    text = torch.tensor(list((problem or "").encode()), dtype=torch.int64)
    found = [bytes(part.tolist()).decode() for part in transport.all_to_all([text] * transport.size)]
    named = [f"rank {rank}: {message}" for rank, message in enumerate(found) if message]
    more = f" (and {len(named) - 3} more ranks)" if len(named) > 3 else ""
    raise InputError("; ".join(named[:3]) + more)
